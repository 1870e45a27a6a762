"""Initial weights of LLaVA's projector: it outputs what the dense heads of stage 1 read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recipes.embedded_mllm.init import place_codes
from recipes.embedded_mllm.layout import SENSES, STRENGTH, Layout, Meanings
from recipes.embedded_mllm.model import BaseShape
from recipes.embedded_mllm.vision import CELLS, CODE, FLAGS, DenseHeads, Questions
from sam4mllm_tool.datasets.vqa import BACKGROUND


@torch.no_grad()
def fold_projector(
    model: Any,
    heads: DenseHeads,
    questions: Questions,
    meanings: Meanings,
    features: Tensor,
    shape: BaseShape,
) -> dict[str, float]:
    """Make the projector write the outputs of the dense heads into the decoder's channels.

    LLaVA's projector is ``linear, gelu, linear``; ``gelu(x + 3) - 3`` is nearly ``x``.

    Args:
        model: the model whose projector is written.
        heads: trained with the tower.
        questions: what the heads answer.
        meanings: directions of the words.
        features: (pictures, patches, width) of the tower on training pictures, to fit a read-out
            of each patch's place, whose code training has weakened.
        shape: of the model.

    Returns:
        fraction of the place code's variance that the fitted read-out explains.
    """
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    for weight in (first.weight, second.weight):
        weight.normal_(0, 0.1 / math.sqrt(weight.shape[1]))
    first.bias.zero_()
    second.bias.zero_()
    second.weight[:, : 6 * CODE + questions.count + 1] = 0

    def copy_channels(rows: slice, target: slice, weight: Tensor, bias: Tensor) -> None:
        first.weight[rows], first.bias[rows] = weight, bias + 3
        second.weight[target, rows] = torch.eye(weight.shape[0])
        second.bias[target] = -3

    place, constant, explained = _fit_places(features, place_codes(shape))
    copy_channels(slice(0, 2 * CODE), Layout.place, place, constant)
    codes = heads.boxes(features)
    rms = codes.pow(2).mean().sqrt()
    copy_channels(
        slice(2 * CODE, 6 * CODE), Layout.box, heads.boxes.weight / rms, heads.boxes.bias / rms
    )
    start, groups = 6 * CODE, questions.groups
    rows = slice(start, start + questions.count)
    first.weight[rows], first.bias[rows] = 0.4 * heads.answers.weight, 0.4 * heads.answers.bias
    words = [
        *questions.names,
        *questions.colours,
        *(SENSES[f][0] if f in SENSES else f for f in FLAGS),
    ]
    for index, word in enumerate(words):
        gain = 0.18 if word in questions.colours else 0.3  # colours have the largest logits
        second.weight[Layout.word, start + index] = gain * meanings.of(word)
    relations = groups["relations"]
    count = min(relations.stop - relations.start, Layout.relation.stop - Layout.relation.start)
    for index in range(count):
        second.weight[Layout.relation.start + index, start + relations.start + index] = 1.0
    cells = slice(start + groups["cells"].start, start + groups["cells"].stop)
    first.bias[cells] += 3
    second.weight[Layout.cells, cells] = 0.6 * torch.eye(CELLS**2)
    second.bias[Layout.cells] = -3 * 0.6
    empty = start + questions.count  # background: high if all cells are answered with no
    first.weight[empty] = -0.5 * heads.answers.weight[groups["cells"]].mean(0)
    first.bias[empty] = -0.5 * heads.answers.bias[groups["cells"]].mean()
    second.weight[Layout.word, empty] = 0.25 * meanings.of(BACKGROUND)
    second.bias[Layout.flag("image")] = STRENGTH
    return {"place": explained}


def _fit_places(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, float]:
    """Least squares, with intercept, from features to the codes of the patches' places."""
    x = features.flatten(0, 1).double()
    y = codes.double().repeat(len(features), 1)
    centre = x.mean(0)
    centred = x - centre
    covariance = centred.T @ centred / len(x)
    ridge = 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + ridge.double(), centred.T @ y / len(x)).T
    constant = y.mean(0) - weight @ centre
    residual = y - x @ weight.T - constant
    explained = 1 - residual.pow(2).mean() / (y - y.mean(0)).pow(2).mean()
    return weight.float(), constant.float(), float(explained)
