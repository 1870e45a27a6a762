"""The model's forward pass in steps, so that base training can use the intermediate states."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from recipes.embedded_mllm.packing import Packed

ATTENTION = "float32 in chunks"
CHUNK = 288
"""Queries per call of the attention kernel; each call gets the keys up to its last query."""


@torch.autocast("cpu", enabled=False)
def chunked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in float32, without the keys that come after a chunk of queries.

    PyTorch's CPU kernel is two to three times slower in bfloat16, which autocast would choose, and
    does not skip the masked half of a causal mask.
    """
    query, key, value = query.float(), key.float(), value.float()
    attend = partial(functional.scaled_dot_product_attention, scale=scaling)
    if attention_mask is None:
        causal = bool(module.is_causal) and query.shape[2] == key.shape[2] > 1
        return attend(query, key, value, is_causal=causal).transpose(1, 2), None
    length, parts = query.shape[2], []
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        seen = key.shape[2] - length + end
        mask = attention_mask[:, :, start:end, :seen]
        parts.append(attend(query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], mask))
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, chunked_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 B x H x W x 3 → as from the image processor: float B x 3 x H x W in -1…1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def tower_features(tower: Any, pixels: Tensor) -> Tensor:
    """The features LLaVA takes from the tower: (B, patches, width)."""
    side = tower.config.image_size
    if pixels.shape[-1] != side:
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    features: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return features


def forward(
    model: Any, pictures: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The same computation as LLaVA's own forward.

    Returns:
        features: of the tower, (B, patches, width).
        hidden: last states of the decoder, B x L x width.
        states: of the decoder before the first layer and after each.
    """
    features = tower_features(model.model.vision_tower, to_pixels(pictures))
    seen = model.model.multi_modal_projector(features)
    embedded = model.get_input_embeddings()(packed.tokens)
    places = packed.tokens == model.config.image_token_id
    embedded = embedded.masked_scatter(places[..., None], seen.to(embedded.dtype))
    read = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=torch.zeros(packed.mask.shape).masked_fill_(~packed.mask, -torch.inf),
        position_ids=packed.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return features, read.last_hidden_state, read.hidden_states
