"""A LLaVA of about 100M parameters with random weights, for timing; it knows nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sam4mllm_tool.formats.sam4mllm import NO_TARGET, SYSTEM_PROMPT, Sam4MllmFormat
from sam4mllm_tool.types import Box, Point, TargetCount

_SPECIAL = ["<|begin|>", "<|end|>", "<image>", "<|user|>", "<|assistant|>"]
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] != 'system' %}{{ '<|' + m['role'] + '|>' }}{% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_PATCH = 14


def random_llava(image_tokens: int, seed: int = 0, layers: int = 10) -> tuple[Any, Any, int]:
    """(model, processor, image tokens): a square picture of about ``image_tokens`` patches."""
    torch.manual_seed(seed)
    grid = round(image_tokens**0.5)
    tokenizer = _tokenizer()
    vision = {
        "model_type": "siglip_vision_model", "image_size": _PATCH * grid, "patch_size": _PATCH,
        "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 6, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2304,
        "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    _spread(model, seed)
    side = {"height": _PATCH * grid, "width": _PATCH * grid}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": _PATCH * grid}, crop_size=side), tokenizer,
        patch_size=_PATCH, vision_feature_select_strategy="full", num_additional_image_tokens=0,
        chat_template=_TEMPLATE,
    )  # fmt: skip
    return model.eval(), processor, grid * grid


def _spread(model: Any, seed: int) -> None:
    """Weights wide enough that replies depend on picture and question."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            attention = "q_proj" in name or "k_proj" in name
            std = (1.5 if attention else 1.0) / weight[0].numel() ** 0.5
            wide = "embed_tokens" in name or "lm_head" in name
            weight.data.normal_(0.0, 0.1 if wide else std, generator=generator)


def mix_answers(model: Any, words: Sequence[int], slots: Sequence[torch.Tensor]) -> None:
    """Set the output rows of yes and no so that the slots' answers are mixed.

    Random rows would say the same at every slot. Both get a common part, which makes one of them
    likely, and opposite parts along the direction in which the slots differ most; the mean over
    slots, and what the answers before do to it, are left out of that direction.

    Args:
        model: the model.
        words: ids of yes and no.
        slots: final hidden states of an answer's slots, each (slots, width): after nothing but
            yes, and after nothing but no.
    """
    means = torch.stack([some.mean(0) for some in slots])
    around = torch.cat([some - some.mean(0) for some in slots])
    basis = torch.linalg.qr(means.T).Q
    around = around - (around @ basis) @ basis.T
    apart = torch.linalg.svd(around, full_matrices=False)[2][0]
    common = means.mean(0) * 20 / means.mean(0).norm() ** 2
    rows = model.get_output_embeddings().weight.data
    rows[words[0]] = common + apart / (around @ apart).std()
    rows[words[1]] = common - apart / (around @ apart).std()


def _tokenizer() -> Any:
    """Words, three-digit numbers and punctuation as tokens, about as many as Llama-3 would use."""
    form, size = Sam4MllmFormat(), (1000, 1000)
    texts = [SYSTEM_PROMPT, NO_TARGET, form.ask_boxes("", TargetCount.ONE, size)]
    texts.append(form.ask_points("", Box(0, 0, 1, 1), [Point(0, 0)], size))
    words = sorted({w for text in texts for w in re.findall(r"[A-Za-z]+", text)} | {"Yes", "No"})
    whole = [f"{n:03d}" for n in range(1000)] + [s + w for w in words for s in ("", "Ġ")]
    whole += ["Ġ(", "),", "Ġ["]
    pieces = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *whole]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    pattern = Regex(r"Yes|No|\d{3}| ?\p{L}+| ?[^\s\p{L}\d]|\s")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_SPECIAL[0], eos_token=_SPECIAL[1],
        pad_token=_SPECIAL[0], extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
