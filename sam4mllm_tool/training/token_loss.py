"""Cross-entropy for coordinates: near misses cost less, and punctuation has little weight.

A coordinate's target is a bell curve over its neighbours on the number line. How a vocabulary
writes 000 … 999 is looked up in it. Where each is one token (Llama-3's groups of three digits, the
embedded model's words), the bell is spread over those tokens. Where each is three digits (Qwen,
Gemma), a digit's target is the bell's total over the numbers that continue with this digit, given
the digits before it. Numbers outside brackets, such as a year in an answer, are not coordinates and
are left unchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sam4mllm_tool.errors import InputError

SPREAD = 6.0
"""Standard deviation, in steps of the number line, of the label smoothing of coordinates."""
NUMBER, PUNCTUATION, END = 0.6, 0.05, 0.2
"""Weights of coordinates, of what stands between them, and of the end of a turn."""
NUMBERS = 1000


class TokenLoss:
    """Weighted losses of tokens, coordinates smoothed along the number line.

    Args:
        tokenizer: of the model.
        spread: see :data:`SPREAD`.

    Raises:
        InputError: its numbers are neither one token each nor three digits.
    """

    def __init__(self, tokenizer: Any, spread: float = SPREAD) -> None:
        written = number_tokens(tokenizer)
        self.width = len(written[0])
        alphabet = list(dict.fromkeys(token for tokens in written for token in tokens))
        size = len(tokenizer) + 64
        self.alphabet = torch.tensor(alphabet)
        self.place = torch.full((size,), -1)
        self.place[self.alphabet] = torch.arange(len(alphabet))
        self.near = _soft_targets(written, alphabet, spread)
        texts = [_plain(text) for text in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        self.opens = _marked(size, (text.endswith(("[", "(", ",")) for text in texts))
        self.closes = _marked(size, (text.startswith((",", "]", ")")) for text in texts))
        self.between = _marked(size, (bool(text) and set(text) <= set(" (,)]") for text in texts))
        self.end = int(tokenizer.eos_token_id)

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V) logits and N targets in their order → the weighted mean, and each token's loss."""
        logs = functional.log_softmax(logits.float(), -1)
        each = -logs.gather(1, targets[:, None])[:, 0]
        starts, numbers = self._coordinates(targets)
        near, alphabet = self.near.to(logs.device), self.alphabet.to(logs.device)
        for digit in range(self.width):
            places = starts + digit
            smoothed = -(near[numbers, digit] * logs[places][:, alphabet]).sum(-1)
            each = each.index_put((places,), smoothed)
        weights = self.weigh(targets)
        return (each * weights).sum() / weights.sum(), each.detach()

    def weigh(self, targets: Tensor) -> Tensor:
        """How much each of N targets, in their order, counts in the mean."""
        starts, _ = self._coordinates(targets)
        weights = torch.ones(len(targets), device=targets.device)
        weights[targets == self.end] = END
        beside = torch.zeros_like(targets, dtype=torch.bool)
        beside[starts - 1] = beside[starts + self.width] = True
        weights[beside & self._of(self.between, targets)] = PUNCTUATION
        for digit in range(self.width):
            weights[starts + digit] = NUMBER / self.width
        return weights

    def _coordinates(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Where numbers between brackets or commas begin among the targets, and which they are."""
        width, places = self.width, self._of(self.place, targets)
        if len(targets) < width + 2:
            return targets[:0], targets[:0]
        windows = places.unfold(0, width, 1)[1:-1]
        good = (
            (windows >= 0).all(1)
            & self._of(self.opens, targets)[: -width - 1]
            & self._of(self.closes, targets)[width + 1 :]
        )
        base = round(NUMBERS ** (1 / width))
        powers = base ** torch.arange(width - 1, -1, -1, device=targets.device)
        return torch.nonzero(good)[:, 0] + 1, (windows[good] * powers).sum(1)

    @staticmethod
    def _of(table: Tensor, targets: Tensor) -> Tensor:
        return table.to(targets.device)[targets]


def number_tokens(tokenizer: Any) -> list[list[int]]:
    """The tokens of 000 … 999 between brackets and commas: one each, or three digits each.

    Raises:
        InputError: neither; some numbers have two tokens, say, or share one with a bracket.
    """
    written = []
    for number in range(NUMBERS):
        text = f"[{number:03d},{number:03d}]"
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        written.append(
            [token for token, (start, end) in zip(found["input_ids"], found["offset_mapping"],
                                                  strict=True) if 1 <= start < end <= 4]
        )  # fmt: skip
    lengths = {len(tokens) for tokens in written}
    distinct = {token for tokens in written for token in tokens}
    if (lengths, len(distinct)) not in (({1}, NUMBERS), ({3}, 10)):
        raise InputError(
            "coordinates cannot be smoothed: 000 … 999 are neither one token nor three digits each "
            f"in this vocabulary, but {min(lengths)} to {max(lengths)} tokens",
            hint="Train with plain cross-entropy (smoothing 0).",
        )
    return written


def _soft_targets(written: list[list[int]], alphabet: list[int], spread: float) -> Tensor:
    """(numbers, tokens per number, alphabet): the target of each token of each number."""
    steps = np.arange(NUMBERS)
    bell = np.exp(-0.5 * ((steps[:, None] - steps) / spread) ** 2)
    places = {token: place for place, token in enumerate(alphabet)}
    tokens = np.array([[places[token] for token in some] for some in written])
    found = np.zeros((NUMBERS, tokens.shape[1], len(alphabet)), np.float32)
    for digit in range(tokens.shape[1]):
        # Numbers that agree in all digits before this one, and what each has here.
        prefix = (tokens[:, None, :digit] == tokens[None, :, :digit]).all(-1)
        np.add.at(found[:, digit].T, tokens[:, digit], (bell * prefix).T)
    return torch.from_numpy(found / found.sum(-1, keepdims=True))


def _plain(token: str | None) -> str:
    """A token's text, a leading space as a space."""
    return (token or "").replace("Ġ", " ").replace("▁", " ")


def _marked(size: int, values: Any) -> Tensor:
    found = torch.zeros(size, dtype=torch.bool)
    marks = torch.tensor(list(values), dtype=torch.bool)
    found[: len(marks)] = marks
    return found
