"""Many lessons about a picture in one sequence, with the same results as if each were read alone.

The prefix (system prompt and image) comes once, with causal attention. Every lesson attends to the
prefix and to itself, and its positions continue from the prefix. So plain ``generate`` gives the
same results as the packed pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.embedded_mllm.lessons import Lesson
from recipes.embedded_mllm.model import ASSISTANT, END, IMAGE, START, USER
from sam4mllm_tool.formats.sam4mllm import STEPS, SYSTEM_PROMPT

IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """A batch of sequences, padded on the right; B x L unless stated otherwise.

    Attributes:
        tokens: input ids.
        targets: the next token where it is part of the loss, else -100 (already shifted).
        topics: index of the lesson's topic at each target, -1 elsewhere.
        positions: position ids.
        mask: bool B x 1 x L x L, True where a token may attend.
    """

    tokens: Tensor
    targets: Tensor
    topics: Tensor
    positions: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Looks:
    """The N points that are written in a batch of sequences.

    Attributes:
        rows, places: sequence and position of the token of the point's y.
        points: N x 2, fractions of the sides.
        answers: whether round 2 answers "Yes" (1) or "No" (0); -1 in other lessons.
    """

    rows: Tensor
    places: Tensor
    points: Tensor
    answers: Tensor


class Packer:
    """Turns lessons into token sequences."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, patches: int, topics: Sequence[str]
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._id = tokenizer.convert_tokens_to_ids
        self._topics = {topic: index for index, topic in enumerate(topics)}
        self._patches = patches
        self.prefix = [self._id(START), *self.encode(SYSTEM_PROMPT), self._id(USER)]
        self.prefix += [self._id(IMAGE)] * patches

        numbers = self._id([f"{number:03d}" for number in range(STEPS)])
        self._number = torch.full((len(tokenizer) + 64,), -1)
        self._number[torch.tensor(numbers)] = torch.arange(STEPS)
        self._opens = torch.tensor(self._id(["(", "Ġ("]))
        self._answers = torch.tensor(self._id(["Yes", "No"]))

    def ids(self, *tokens: str) -> list[int]:
        """Ids of tokens by their text."""
        return list(self._id(list(tokens)))

    def last_box(self, packed: Packed) -> tuple[list[int], list[int]]:
        """Positions and values of the numbers in the first sequence's last ``[a,b,c,d]``."""
        number = self._number[packed.tokens[0]]
        four = torch.stack([number[place : len(number) - 6 + place] for place in (0, 2, 4, 6)], 1)
        start = int((four >= 0).all(1).nonzero()[-1])
        return [start + place for place in (0, 2, 4, 6)], four[start].tolist()

    def looks(self, packed: Packed) -> Looks:
        """Every ``(xxx,yyy)`` of the sequences."""
        tokens = packed.tokens
        number = self._number[tokens]
        opens = torch.isin(tokens, self._opens)
        written = opens[:, :-3] & (number[:, 1:-2] >= 0) & (number[:, 3:] >= 0)
        rows, starts = written.nonzero(as_tuple=True)
        values = torch.stack([number[rows, starts + 1], number[rows, starts + 3]], -1)
        # Points and answers are in the same order, both within a list and across lists.
        round_two = self._topics["points"]
        asked = packed.topics[rows, starts + 3] == round_two
        answered = (packed.topics == round_two) & torch.isin(packed.targets, self._answers)
        answers = torch.full((len(rows),), -1)
        answers[asked] = (packed.targets[answered] == self._answers[0]).long()
        return Looks(rows, starts + 3, (values + 0.5) / STEPS, answers)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text in which special tokens do not occur."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def lesson(self, lesson: Lesson) -> tuple[list[int], list[int]]:
        """Tokens after the prefix, and their targets: the tokens in the loss, else -100."""
        tokens: list[int] = []
        taught: list[int] = []
        for number, turn in enumerate(lesson.turns):
            asked = ([self._id(USER)] if number else []) + self.encode(turn.question)
            asked += [self._id(ASSISTANT), *self.encode("\n")]
            reply = [*self.encode(turn.reply), self._id(END)]
            tokens += asked + reply
            taught += [IGNORED] * len(asked) + (reply if turn.taught else [IGNORED] * len(reply))
        return tokens, taught

    def pack(self, batch: Sequence[Sequence[Lesson]], longest: int = 4096) -> Packed:
        """Sequences for a batch of pictures; lessons that no longer fit are left out."""
        sequences = [self._sequence(lessons, longest) for lessons in batch]
        length = -(-max(len(tokens) for tokens, *_ in sequences) // 16) * 16
        columns = []
        for column, filler in enumerate((0, IGNORED, -1, 0, -1)):
            rows = [one[column] + [filler] * (length - len(one[column])) for one in sequences]
            columns.append(torch.tensor(rows))
        tokens, taught, topics, positions, lesson = columns
        targets, topics = taught.roll(-1, 1), topics.roll(-1, 1)
        targets[:, -1], topics[:, -1] = IGNORED, -1
        same = lesson[:, :, None] == lesson[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = causal & (same | (lesson == 0)[:, None, :])
        return Packed(tokens, targets, topics, positions, mask[:, None])

    def _sequence(self, lessons: Sequence[Lesson], longest: int) -> tuple[list[int], ...]:
        start = len(self.prefix)
        tokens, taught = list(self.prefix), [IGNORED] * start
        topics, positions, numbers = [-1] * start, list(range(start)), [0] * start
        for number, lesson in enumerate(lessons, 1):
            added, targets = self.lesson(lesson)
            if len(tokens) + len(added) > longest:
                continue
            tokens += added
            taught += targets
            topics += [self._topics[lesson.topic]] * len(added)
            positions += range(start, start + len(added))
            numbers += [number] * len(added)
        return tokens, taught, topics, positions, numbers
