"""Cross-entropy that knows numbers: near misses cost less, and punctuation hardly counts.

For vocabularies in which each of 000 … 999 is one token, as in Llama-3's and the embedded model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sam4mllm_tool.errors import InputError

SPREAD = 6.0
"""Standard deviation, in steps of the number line, of the label smoothing of coordinates."""
NUMBER, PUNCTUATION, END = 0.6, 0.05, 0.2
"""Weights of coordinates, of what stands between them, and of the end of a turn."""


class TokenLoss:
    """Weighted losses of tokens, coordinates smoothed along the number line.

    Args:
        tokenizer: of the model.
        spread: see :data:`SPREAD`.

    Raises:
        InputError: its numbers are not one token each.
    """

    def __init__(self, tokenizer: Any, spread: float = SPREAD) -> None:
        convert = tokenizer.convert_tokens_to_ids
        self.first = convert("000")
        if convert([f"{n:03d}" for n in range(1000)]) != list(range(self.first, self.first + 1000)):
            raise InputError(
                "coordinates cannot be smoothed: 000 … 999 are not a row of tokens here",
                hint="Train with plain cross-entropy (smoothing 0).",
            )
        steps = torch.arange(1000)
        near = torch.exp(-0.5 * ((steps[:, None] - steps) / spread) ** 2)
        self.near = near / near.sum(1, keepdim=True)
        self.weights = torch.ones(len(tokenizer) + 64)
        self.weights[self.first : self.first + 1000] = NUMBER
        for token in (",", "]", "Ċ", "(", "Ġ(", ")"):
            if token in tokenizer.get_vocab():
                self.weights[convert(token)] = PUNCTUATION
        self.weights[tokenizer.eos_token_id] = END

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V) logits and N targets → the weighted mean, and each token's own loss."""
        logs = functional.log_softmax(logits.float(), -1)
        each = -logs.gather(1, targets[:, None])[:, 0]
        number = (targets >= self.first) & (targets < self.first + 1000)
        steps = targets[number] - self.first
        near = self.near.to(logs.device)[steps]
        each = each.masked_scatter(
            number, -(near * logs[number, self.first : self.first + 1000]).sum(-1)
        )
        weights = self.weights.to(logs.device)[targets]
        return (each * weights).sum() / weights.sum(), each.detach()
