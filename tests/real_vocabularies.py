"""Tokenizers with the published vocabularies of Llama-3 and Qwen, from packages that carry them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

IMAGE = "<image>"
IMAGE_ID = 128256
"""The first free id behind Llama-3's own, which llava-hf's conversion gives the image token."""


@cache
def llama3(adds_start: bool = False) -> Any:
    """Llama-3's vocabulary with an image token.

    Args:
        adds_start: the tokenizer writes ``<|begin_of_text|>`` by itself, as Meta's does since May
            2024; before, only the chat template wrote it.
    """
    backend = deepcopy(_llama3())
    if adds_start:
        add_start(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        pad_token="<|eot_id|>", extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def add_start(backend: Any) -> None:
    """Let a tokenizer with Llama-3's start token write it before every text."""
    start = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, backend.token_to_id(start))]
    )


@cache
def _llama3() -> Any:
    from llama_models.llama3.tokenizer import Tokenizer

    special = list(Tokenizer.get_instance().special_tokens)
    model = _package("llama_models") / "llama3" / "tokenizer.model"
    return TikTokenConverter(str(model), extra_special_tokens=[*special, IMAGE]).converted()


@cache
def qwen() -> Any:
    """Qwen's vocabulary, which Qwen2-VL, Qwen2.5-VL and InternVL over Qwen share."""
    single_digits = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE]
    file = _package("dashscope") / "resources" / "qwen.tiktoken"
    backend = TikTokenConverter(
        str(file), pattern=single_digits, extra_special_tokens=special
    ).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE}, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
