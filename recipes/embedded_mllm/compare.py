"""A new decoder layer that compares boxes: ``python -m recipes.embedded_mllm.compare START OUT …``.

Whether a point lies on the object in question is a comparison: of the box of the object at the
point with the box that the question names. Gradient descent hardly learns this from one-bit
answers, so it is built in: four heads of the new layer, one per edge, are fitted to the states of
the trained model. The query of a point's y token is the code of an edge of the object there; the
keys of the box's numbers are the codes of their values; the start token gets the attention if no
number matches. The heads add the direction in which a point's state raises the answer "Yes". All
other outputs of the layer start at zero.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from recipes.embedded_mllm.early import SEEN, normalised
from recipes.embedded_mllm.forward import forward
from recipes.embedded_mllm.lessons import TOPICS, Plan, Teacher
from recipes.embedded_mllm.model import build_model, shape_of
from recipes.embedded_mllm.packing import Packer
from recipes.embedded_mllm.scenes import SceneShards
from recipes.embedded_mllm.vision import CODE, fourier

PAIRS = slice(5, 13)
"""Rotary pairs that hardly turn within a dialogue: they compare contents at any distance."""
NULL = 13
"""The rotary pair with which a point attends to the start token if nothing matches."""
Model: TypeAlias = LlavaForConditionalGeneration


@dataclass
class States:
    """Normalised input states of the new layer for T tokens, and indices into them."""

    tokens: Tensor  # T x width
    points: Tensor  # N: tokens of a point's y
    seen: Tensor  # N x 4: box of the object there, NaN on background
    on: Tensor  # N: 0 background, 1 the target, 2 another object
    edges: Tensor  # M x 4: tokens of a question's box
    numbers: Tensor  # M x 4: their values, as fractions
    starts: Tensor  # start tokens
    toward_yes: Tensor  # width: direction in which a point's state raises "Yes"


def inserted(model: Model, tokenizer: Any, at: int) -> Model:
    """The same model with a new layer after ``at`` layers, whose output is zero."""
    shape = shape_of(model)
    deeper = build_model(tokenizer, replace(shape, text_layers=shape.text_layers + 1))
    layers = model.model.language_model.layers
    weights = {k: v for k, v in model.state_dict().items() if ".language_model.layers." not in k}
    deeper.load_state_dict(weights, strict=False)
    for number, layer in enumerate(deeper.model.language_model.layers):
        if number != at:
            layer.load_state_dict(layers[number - (number > at)].state_dict())
    new = deeper.model.language_model.layers[at]
    for parameter in new.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    torch.nn.init.zeros_(new.self_attn.o_proj.weight)
    torch.nn.init.zeros_(new.mlp.down_proj.weight)
    return deeper


def states_of(model: Model, packer: Packer, scenes: list[Any], seed: int) -> States:
    """States in round-2 lessons about overlapping objects, and the gradient of the answers."""
    teacher, plan = Teacher(random.Random(seed)), Plan(list_sizes=(9,), hard=0.5, jitter=0.1)
    yes, no = packer.ids("Yes", "No")
    collected: dict[str, list[Any]] = {name: [] for name in States.__annotations__}
    offset = 0
    for scene in scenes:
        lesson = teacher.points(scene, plan)
        if lesson is None:
            continue
        packed = packer.pack([[lesson]])
        looks = packer.looks(packed)
        picture = torch.from_numpy(np.array(scene.image[None]))
        _, hidden, layers = forward(model, picture, packed)
        early = layers[SEEN]
        logits = model.lm_head(hidden[0])
        answers = torch.isin(packed.targets[0], torch.tensor([yes, no]))
        raised = (logits[answers, yes] - logits[answers, no]).sum()
        (gradient,) = torch.autograd.grad(raised, early)
        truth = [int(scene.object_at(x, y)) for x, y in looks.points.tolist()]
        affirmed = packed.targets[0][answers] == yes
        collected["tokens"].append(normalised(early[0].detach()))
        collected["points"] += [offset + place for place in looks.places.tolist()]
        collected["seen"] += [scene.things[t].box if t >= 0 else (np.nan,) * 4 for t in truth]
        collected["on"] += [
            1 if yes_here else 2 * (t >= 0)
            for yes_here, t in zip(affirmed.tolist(), truth, strict=True)
        ]
        places, numbers = packer.last_box(packed)
        collected["edges"].append([offset + place for place in places])
        collected["numbers"].append([(number + 0.5) / 1000 for number in numbers])
        collected["starts"].append(offset)
        collected["toward_yes"].append(gradient[0, looks.places].mean(0))
        offset += packed.tokens.shape[1]
    return States(
        torch.cat(collected["tokens"]), torch.tensor(collected["points"]),
        torch.tensor(np.array(collected["seen"], dtype=np.float32)), torch.tensor(collected["on"]),
        torch.tensor(collected["edges"]), torch.tensor(collected["numbers"]),
        torch.tensor(collected["starts"]),
        torch.stack(collected["toward_yes"]).mean(0),
    )  # fmt: skip


def fitted(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows that read y (T x n) from states x (T x width), by least squares: n x width."""
    w = torch.ones(len(x)) if weights is None else weights
    a, b = x.double() * w[:, None], y.double()
    gram = a.T @ x.double()
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(gram + ridge, a.T @ b)
    return solved.T.float()


@torch.no_grad()
def write_comparing(layer: Any, states: States, sharpness: float, strength: float) -> None:
    """Fit and write the heads; see the module's docstring.

    Args:
        layer: the new layer.
        states: of the model with the new layer.
        sharpness: attention score of an edge that matches exactly.
        strength: increase of a point's "Yes" logit if all four edges match.
    """
    attention = layer.self_attn
    width = attention.head_dim
    half, root = width // 2, width**0.25
    x, generator = states.tokens, torch.Generator().manual_seed(0)
    random_tokens = torch.randint(len(x), (4000,), generator=generator)
    random_tokens = random_tokens[~torch.isin(random_tokens, states.edges)]
    pairs = torch.arange(PAIRS.start, PAIRS.stop)
    rows = torch.cat([pairs, pairs + half])
    push = strength / states.toward_yes.pow(2).sum() * states.toward_yes
    seen = states.on > 0
    code = fourier(states.seen.nan_to_num(0))
    code[~seen] = 0
    scale = (sharpness / CODE) ** 0.5 * root
    for edge in range(4):
        head = edge * width
        for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
            weight[head : head + width] = 0
        attention.q_proj.weight[head + rows] = scale * fitted(x[states.points], code[:, edge])
        edge_tokens = states.edges[:, edge]
        other_tokens = torch.cat(
            [random_tokens, states.edges[:, [e for e in range(4) if e != edge]].flatten()]
        )
        keys = torch.cat([edge_tokens, states.starts, other_tokens])
        weights = torch.cat(
            [
                torch.full((len(edge_tokens),), 3.0),
                torch.ones(len(states.starts) + len(other_tokens)),
            ]
        )
        target_codes = torch.zeros(len(keys), CODE)
        target_codes[: len(edge_tokens)] = fourier(states.numbers[:, edge])
        attention.k_proj.weight[head + rows] = scale * fitted(x[keys], target_codes, weights)
        is_start = torch.zeros(len(keys), 1)
        is_start[len(edge_tokens) : len(edge_tokens) + len(states.starts)] = 1
        ones = torch.ones(len(states.points), 1)
        limit = (0.7 * sharpness) ** 0.5 * root
        attention.q_proj.weight[head + NULL] = limit * fitted(x[states.points], ones)[0]
        attention.k_proj.weight[head + NULL] = limit * fitted(x[keys], is_start)[0]
        is_edge = torch.zeros(len(keys), 1)
        is_edge[: len(edge_tokens)] = 1
        attention.v_proj.weight[head] = fitted(x[keys], is_edge, weights)[0]
        attention.o_proj.weight[:, head] = push / 4


def main() -> None:
    """Insert the layer, fit it on crowded scenes, and save the deeper model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=Path, required=True, help="shards with crowded scenes")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--sharpness", type=float, default=14.0)
    parser.add_argument("--strength", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.start)
    model = LlavaForConditionalGeneration.from_pretrained(options.start, dtype=torch.float32)
    model = inserted(model, tokenizer, SEEN)
    packer = Packer(tokenizer, shape_of(model).grid ** 2, TOPICS)
    shards = SceneShards(options.scenes, "train")
    scenes = [shards[index] for index in range(options.count)]
    states = states_of(model, packer, scenes, 0)
    layer = model.model.language_model.layers[SEEN]
    write_comparing(layer, states, options.sharpness, options.strength)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
