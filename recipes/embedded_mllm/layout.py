"""Initial meaning of the decoder's channels, and initial directions of words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.embedded_mllm.vision import CELLS, CODE, Questions
from sam4mllm_tool.datasets.vqa import BACKGROUND

WORD_WIDTH = 62  # two heads of 31 value channels; the 32nd carries a quarter of a patch
STRENGTH = 4.0  # a flag's value in an embedding
SENSES: dict[str, tuple[str, ...]] = {
    "left": ("left", "leftmost"),
    "right": ("right", "rightmost"),
    "top": ("top", "topmost", "highest", "upper", "higher", "above"),
    "bottom": ("bottom", "bottommost", "lowest", "lower", "below"),
    "biggest": ("biggest", "largest", "bigger", "larger", "big"),
    "smallest": ("smallest", "tiniest", "smaller", "small", "little"),
    "middle across": ("second",),
    "middle down": ("second",),
    "only": ("only",),
    "one of two": ("two", "both"),
    "one of three": ("three",),
}
"""Words that start with the same meaning, by the flag of stage 1 that they name."""


class Layout:
    """Meaning of the decoder's channels."""

    number = slice(0, CODE)
    place = slice(CODE, 3 * CODE)
    place_x = slice(CODE, 2 * CODE)
    place_y = slice(2 * CODE, 3 * CODE)
    box = slice(3 * CODE, 7 * CODE)
    word = slice(7 * CODE, 7 * CODE + WORD_WIDTH)
    relation = slice(word.stop, word.stop + 48)
    quarter = slice(relation.stop, relation.stop + 4)
    cells = slice(quarter.stop, quarter.stop + CELLS**2)
    flags = cells.stop
    names = (
        "text", "number", "comma", "paren", "point", "anchor", "newline", "answer", "image",
        "start", "word", "slot", "open", "open2", "open4", "open6", "found",
        "count0", "count1", "count2", "count3",
    )  # fmt: skip
    # Where an answer stores what lies at its point: only other tokens use these channels.
    seen_word = slice(CODE, CODE + WORD_WIDTH)
    seen_box = slice(seen_word.stop, seen_word.stop + WORD_WIDTH)

    @classmethod
    def flag(cls, name: str) -> int:
        """Channel of a flag."""
        return cls.flags + cls.names.index(name)

    @classmethod
    def edge(cls, index: int) -> slice:
        """Channels with the code of one edge of the seen object's box."""
        return slice(cls.box.start + index * CODE, cls.box.start + (index + 1) * CODE)


@dataclass(frozen=True)
class Meanings:
    """Orthogonal directions in the word channels, one per concept."""

    concepts: tuple[str, ...]
    directions: Tensor  # (concepts, WORD_WIDTH), norm sqrt(WORD_WIDTH)
    spare: Tensor  # unused directions, same norm

    def of(self, concept: str) -> Tensor:
        """The direction of a concept."""
        return self.directions[self.concepts.index(concept)]


def make_meanings(questions: Questions, seed: int = 0) -> Meanings:
    """Directions for names, colours and senses of a world."""
    senses = [words[0] for words in SENSES.values()]
    concepts = tuple(dict.fromkeys([*questions.names, *questions.colours, *senses, BACKGROUND]))
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WORD_WIDTH, WORD_WIDTH, generator=generator))[0]
    basis = basis * math.sqrt(WORD_WIDTH)
    return Meanings(concepts, basis[: len(concepts)], basis[len(concepts) :])
