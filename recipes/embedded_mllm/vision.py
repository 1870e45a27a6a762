"""Stage 1 of base training: the vision tower learns to tell, at every patch, what lies there.

A referring dialogue gives a few bits of training signal per picture. If every patch must tell its
object's name, colour, box, rank among objects of the same name, and position relative to others, a
picture gives thousands of bits, and a small tower learns in minutes what would take hours with
dialogues. The heads used here are not shipped: :mod:`recipes.embedded_mllm.projector` folds them
into LLaVA's projector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from recipes.embedded_mllm.scenes import LABEL_SIDE, BaseScene, Thing

FREQUENCIES = 8
"""Frequencies of the code of one coordinate, geometric from 1/4 to 8 cycles per side."""
CODE = 2 * FREQUENCIES
SIDES = ("left", "right", "top", "bottom")
FLAGS = (
    "only", "one of two", "one of three",
    *SIDES, "biggest", "smallest", "middle across", "middle down",
)  # fmt: skip
CELLS = 3
"""Resolution of an object's outline in a patch: ``CELLS`` x ``CELLS`` cells."""
SAMPLES = 2 * CELLS
"""A patch's targets come from ``SAMPLES`` x ``SAMPLES`` places of the object map."""
MARGIN = 0.06
BOXES_PER_BATCH = 512
"""Size of the sample of patches with a box loss: their 1000-way softmaxes are expensive."""


def fourier(values: Tensor) -> Tensor:
    """Code of coordinates in 0–1, shape (..., ``CODE``): sines, then cosines, each of rms 1."""
    rates = 0.25 * 32 ** (torch.arange(FREQUENCIES) / (FREQUENCIES - 1))
    angle = 2 * math.pi * values[..., None] * rates
    return torch.cat([angle.sin(), angle.cos()], -1) * math.sqrt(2)


def number_codes(steps: int = 1000) -> Tensor:
    """Codes of the dialogue's numbers, at the centres of their intervals: (steps, ``CODE``)."""
    return fourier((torch.arange(steps) + 0.5) / steps)


@dataclass(frozen=True)
class Questions:
    """The yes/no questions that every patch answers about its object, in groups.

    The order is: names; colours; ``FLAGS``; for every side and name, "lies on that side of an
    object of this name"; for each cell of the patch, how much of it the object covers.
    """

    names: tuple[str, ...]
    colours: tuple[str, ...]

    @property
    def groups(self) -> dict[str, slice]:
        """Slice of each group in the answers."""
        sizes = {
            "names": len(self.names),
            "colours": len(self.colours),
            "flags": len(FLAGS),
            "relations": len(SIDES) * len(self.names),
            "cells": CELLS**2,
        }
        ends = np.cumsum(list(sizes.values()))
        return {
            name: slice(int(end) - size, int(end))
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    @property
    def count(self) -> int:
        """Number of all questions."""
        return self.groups["cells"].stop

    def of_thing(self, number: int, things: tuple[Thing, ...]) -> NDArray[np.float32]:
        """Answers for object ``number`` of a scene, cells left at zero."""
        thing = things[number]
        answers = np.zeros(self.count, dtype=np.float32)
        answers[self.names.index(thing.name)] = 1
        if thing.colour is not None:
            answers[len(self.names) + self.colours.index(thing.colour)] = 1
        answers[self.groups["flags"]] = _flags(number, things)
        start = self.groups["relations"].start
        for other in things:
            if other is not thing:
                for side, there in enumerate(_sides_of(thing, other)):
                    index = start + side * len(self.names) + self.names.index(other.name)
                    answers[index] = max(answers[index], there)
        return answers


def patch_answers(
    scene: BaseScene, questions: Questions, grid: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Targets for the patches of a scene.

    Returns:
        answers: (grid * grid, questions.count), 0–1; all zero on background.
        boxes: (grid * grid, 4), fractions of the sides; NaN on background.
    """
    places = ((np.arange(grid * SAMPLES) + 0.5) / (grid * SAMPLES) * LABEL_SIDE).astype(int)
    seen = scene.labels[np.ix_(places, places)]
    seen = seen.reshape(grid, SAMPLES, grid, SAMPLES).transpose(0, 2, 1, 3)
    seen = seen.reshape(grid * grid, SAMPLES, SAMPLES)
    covered = np.stack(
        [(seen == number + 1).sum((1, 2)) for number in range(len(scene.things))], axis=1
    )
    main, busy = covered.argmax(1), covered.max(1) > 0
    of_things = np.stack(
        [questions.of_thing(number, scene.things) for number in range(len(scene.things))]
    )
    boxes = np.array([thing.box for thing in scene.things], dtype=np.float32)
    answers = np.where(busy[:, None], of_things[main], 0).astype(np.float32)
    on_main = (seen == (main + 1)[:, None, None]).reshape(-1, CELLS, 2, CELLS, 2).mean((2, 4))
    answers[:, questions.groups["cells"]] = on_main.reshape(-1, CELLS**2)
    return answers, np.where(busy[:, None], boxes[main], np.nan).astype(np.float32)


def question_weights(questions: Questions) -> Tensor:
    """Weight of each question in training with dialogues: ranks are the hardest."""
    weights = torch.ones(questions.count)
    weights[questions.groups["flags"]] = 3.0
    return weights


def point_answers(
    scenes: Sequence[BaseScene],
    rows: Sequence[int],
    points: Sequence[Sequence[float]],
    questions: Questions,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Targets for points: as :func:`patch_answers`, without cells.

    Args:
        scenes: of the batch.
        rows: index of the scene of each of N points.
        points: N points, fractions of the sides.
        questions: the dense questions.
    """
    answers = np.zeros((len(rows), questions.count), dtype=np.float32)
    boxes = np.full((len(rows), 4), np.nan, dtype=np.float32)
    of_things: dict[tuple[int, int], NDArray[np.float32]] = {}
    for index, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
        scene = scenes[row]
        if (number := scene.object_at(x, y)) < 0:
            continue
        if (row, number) not in of_things:
            of_things[row, number] = questions.of_thing(number, scene.things)
        answers[index], boxes[index] = of_things[row, number], scene.things[number].box
    return answers, boxes


class DenseHeads(nn.Module):
    """Linear read-outs of patch features: yes/no logits and the codes of a box."""

    def __init__(self, width: int, questions: Questions) -> None:
        super().__init__()
        self.questions = questions
        self.answers = nn.Linear(width, questions.count)
        self.boxes = nn.Linear(width, 4 * CODE)
        nn.init.zeros_(self.answers.weight)
        nn.init.constant_(self.answers.bias, -3.0)
        nn.init.normal_(self.boxes.weight, std=0.3 / math.sqrt(width))
        self.register_buffer("codes", number_codes(), persistent=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(..., width) → logits (..., questions), number logits (..., 4, 1000)."""
        return self.answers(features), self.numbers(features)

    def numbers(self, features: Tensor) -> Tensor:
        """(..., width) → logits of the four box numbers, (..., 4, 1000)."""
        return self.boxes(features).unflatten(-1, (4, CODE)) @ self.codes.T / 4


def dense_loss(
    heads: DenseHeads, features: Tensor, answers: Tensor, boxes: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Binary cross-entropy of all questions and cross-entropy of box numbers.

    Args:
        heads: the read-outs.
        features: (pictures, patches, width) of the tower.
        answers, boxes: as :func:`patch_answers` gives, stacked over pictures.
        weights: (questions,) weight of each question.

    Returns:
        the loss and its parts for the log.
    """
    logits = heads.answers(features)
    each = functional.binary_cross_entropy_with_logits(logits, answers, reduction="none")
    answer_loss = (each * weights).sum(-1).mean()
    covered = (~boxes[..., 0].isnan()).nonzero()
    busy = covered[torch.randperm(len(covered))[:BOXES_PER_BATCH]].unbind(1)
    truth = (boxes[busy] * 1000).long().clamp(0, 999)
    numbers = heads.numbers(features[busy])
    box_loss = functional.cross_entropy(numbers.flatten(0, 1), truth.flatten())
    return answer_loss + 0.3 * box_loss, {"answers": answer_loss.item(), "boxes": box_loss.item()}


def _flags(number: int, things: tuple[Thing, ...]) -> list[float]:
    """The ``FLAGS`` of an object among those of its name; ranks only if there are several."""
    thing = things[number]
    same_name = [other for other in things if other.name == thing.name]
    count = len(same_name)
    flags = [float(count == size) for size in (1, 2, 3)]
    if count == 1:
        return [*flags, *[0.0] * (len(FLAGS) - 3)]
    x, y = ([other.centre[axis] for other in same_name] for axis in (0, 1))
    areas = [other.full_area for other in same_name]
    here = (thing.centre[0], thing.centre[1])
    flags += [here[0] == min(x), here[0] == max(x), here[1] == min(y), here[1] == max(y)]
    flags += [thing.full_area == max(areas), thing.full_area == min(areas)]
    middle = [count == 3 and min(v) < h < max(v) for v, h in ((x, here[0]), (y, here[1]))]
    return [float(flag) for flag in [*flags, *middle]]


def _sides_of(thing: Thing, other: Thing) -> list[float]:
    """Whether ``thing`` lies clearly to the left, right, top, bottom of ``other``."""
    dx, dy = (thing.centre[axis] - other.centre[axis] for axis in (0, 1))
    return [
        float(-dx > MARGIN and -dx > abs(dy)),
        float(dx > MARGIN and dx > abs(dy)),
        float(-dy > MARGIN and -dy > abs(dx)),
        float(dy > MARGIN and dy > abs(dx)),
    ]
