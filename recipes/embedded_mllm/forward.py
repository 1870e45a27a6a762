"""The model's own forward pass in two steps, so that base training can use what lies between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from recipes.embedded_mllm.packing import Packed

ATTENTION = "chunks"
CHUNK = 112
"""Queries per matrix product of attention: later ones see more keys."""


def chunked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float = 1.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as plain matrix products, the keys behind a chunk of queries left out.

    PyTorch's fused CPU kernel is slow with a mask, in bfloat16 by three times, and does not know
    that half of a causal mask is empty. Without a mask it is fast in float32.
    """
    if attention_mask is None:
        causal = bool(module.is_causal) and query.shape[2] == key.shape[2] > 1
        with torch.autocast("cpu", enabled=False):
            fused = functional.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), is_causal=causal, scale=scaling
            )
        return fused.transpose(1, 2), None
    query, length, parts = query * scaling, query.shape[2], []
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(
            ~attention_mask, torch.finfo(query.dtype).min
        )
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        seen = key.shape[2] - length + end
        scores = query[:, :, start:end] @ key[:, :, :seen].transpose(-1, -2)
        scores = scores + attention_mask[:, :, start:end, :seen].to(scores.dtype)
        parts.append(scores.softmax(-1) @ value[:, :, :seen])
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, chunked_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 B x H x W x 3 → what the image processor gives: float B x 3 x H x W in -1…1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def tower_features(tower: Any, pixels: Tensor) -> Tensor:
    """The features LLaVA takes from the tower: (B, patches, width)."""
    side = tower.config.image_size
    if pixels.shape[-1] != side:
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    features: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return features


def forward(
    model: Any, pictures: Tensor, packed: Packed, layer: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """What LLaVA's own forward computes.

    Returns:
        features: of the tower, (B, patches, width).
        hidden: last states of the decoder, B x L x width.
        early: its states after ``layer`` layers.
    """
    features = tower_features(model.model.vision_tower, to_pixels(pictures))
    seen = model.model.multi_modal_projector(features)
    embedded = model.get_input_embeddings()(packed.tokens)
    places = packed.tokens == model.config.image_token_id
    embedded = embedded.masked_scatter(places[..., None], seen.to(embedded.dtype))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else embedded.dtype
    read = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=torch.zeros(packed.mask.shape, dtype=dtype).masked_fill_(
            ~packed.mask, torch.finfo(dtype).min
        ),
        position_ids=packed.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return features, read.last_hidden_state, read.hidden_states[layer]
