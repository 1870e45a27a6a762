"""The model's own forward pass in two steps, so that base training can use what lies between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recipes.embedded_mllm.packing import Packed


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 B x H x W x 3 → what the image processor gives: float B x 3 x H x W in -1…1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def tower_features(tower: Any, pixels: Tensor) -> Tensor:
    """The features LLaVA takes from the tower: (B, patches, width)."""
    features: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return features


def forward(model: Any, pictures: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Tower features, and hidden states of the decoder: what LLaVA's own forward computes."""
    features = tower_features(model.model.vision_tower, to_pixels(pictures))
    seen = model.model.multi_modal_projector(features)
    embedded = model.get_input_embeddings()(packed.tokens)
    places = packed.tokens == model.config.image_token_id
    embedded = embedded.masked_scatter(places[..., None], seen.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    return features, hidden
