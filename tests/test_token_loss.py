"""Smoothed coordinates: by hand, and on the published vocabularies of Llama-3 and Qwen."""

from __future__ import annotations

import math

import pytest
import real_vocabularies
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from sam4mllm_tool import embedded
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.mllm.loading import load_processor
from sam4mllm_tool.training.token_loss import END, NUMBER, PUNCTUATION, TokenLoss


def test_numbers_are_smoothed_and_brackets_weigh_little() -> None:
    tokenizer = load_processor(embedded.MLLM).tokenizer
    convert = tokenizer.convert_tokens_to_ids
    loss = TokenLoss(tokenizer, spread=2.0)
    targets = torch.tensor([convert(t) for t in ("[", "500", ",", "Yes", ",", "500", "</s>")])
    logits = torch.zeros(7, len(tokenizer))
    logits[1, convert("503")] = logits[5, convert("503")] = 5.0
    mean, each = loss(logits, targets)
    # Each token's own loss is plain cross-entropy, but that a coordinate's is spread over
    # neighbours. The last number stands in no brackets.
    logs = torch.log_softmax(logits, -1)
    near = torch.exp(-0.5 * ((torch.arange(1000) - 500) / 2.0) ** 2)
    first = convert("000")
    expected = -logs.gather(1, targets[:, None])[:, 0]
    expected[1] = -(near / near.sum() * logs[1, first : first + 1000]).sum()
    torch.testing.assert_close(each, expected)
    weights = torch.tensor([1.0, NUMBER, PUNCTUATION, 1.0, 1.0, 1.0, END])
    torch.testing.assert_close(mean, (each * weights).sum() / weights.sum())
    far = logits.clone()
    far[1, convert("503")], far[1, convert("560")] = 0.0, 5.0
    assert loss(far, targets)[1][1] > each[1] + 0.2  # a near miss costs less than a far one


BOXES = "[281,251,863,999] [299,300,007,020]"


@pytest.mark.parametrize("family", ["llama3", "qwen"])
def test_smoothing_on_published_vocabularies(family: str) -> None:
    """Llama-3 writes 281 as one token, its ids in no order; Qwen as three digits."""
    tokenizer = getattr(real_vocabularies, family)()
    loss = TokenLoss(tokenizer, spread=4.0)
    assert loss.width == {"llama3": 1, "qwen": 3}[family]
    said = tokenizer(f"In 1999, 128 (or 12) dogs. {BOXES}", add_special_tokens=False)
    targets = torch.tensor([*said["input_ids"], tokenizer.eos_token_id])
    numbers = [281, 251, 863, 999, 299, 300, 7, 20]
    starts, found = loss._coordinates(targets)
    assert found.tolist() == numbers
    logits = torch.randn(len(targets), len(tokenizer), generator=torch.Generator().manual_seed(1))
    _, each = loss(logits, targets)
    logs = torch.log_softmax(logits, -1)
    plain = -logs.gather(1, targets[:, None])[:, 0]
    smoothed = {int(start) + digit for start in starts for digit in range(loss.width)}
    others = [place for place in range(len(targets)) if place not in smoothed]
    torch.testing.assert_close(each[others], plain[others])
    for start, number in zip(starts.tolist(), numbers, strict=True):
        bell = [math.exp(-0.5 * ((n - number) / 4.0) ** 2) for n in range(1000)]
        for digit in range(loss.width):
            # All numbers that begin as this one does, each asked of the tokenizer by itself.
            total = value = 0.0
            for n in range(1000):
                if digit and f"{n:03d}"[:digit] != f"{number:03d}"[:digit]:
                    continue
                piece = f"{n:03d}"[digit] if loss.width == 3 else f"{n:03d}"
                value -= bell[n] * float(
                    logs[start + digit, tokenizer.convert_tokens_to_ids(piece)]
                )
                total += bell[n]
            assert float(each[start + digit]) == pytest.approx(value / total, rel=1e-4), number


def test_vocabularies_whose_numbers_are_neither_are_left_alone() -> None:
    """Byte-pair merges of two digits; and a bracket that is one token with a digit."""
    letters = list("0123456789[],()")
    for merged in (("2", "8"), ("[", "0")):
        vocabulary = {text: n for n, text in enumerate([*letters, "".join(merged)])}
        backend = Tokenizer(BPE(vocabulary, [merged]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="]")
        with pytest.raises(InputError, match="cannot be smoothed"):
            TokenLoss(tokenizer)
