"""Initial weights of the embedded MLLM."""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration

from sam4mllm_tool.training.base_model import BaseShape
from sam4mllm_tool.training.base_vision import CODE, fourier


@torch.no_grad()
def init_vision(model: LlavaForConditionalGeneration, shape: BaseShape) -> None:
    """Give each patch the code of its place, in the code the numbers use."""
    tower = model.model.vision_tower
    places = tower.embeddings.position_embedding.weight
    middles = (torch.arange(shape.grid) + 0.5) / shape.grid
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    places.normal_(0, 0.02)
    places[:, :CODE] = fourier(x.flatten())
    places[:, CODE : 2 * CODE] = fourier(y.flatten())
    pixels = tower.embeddings.patch_embedding.weight
    pixels.normal_(0, pixels[0].numel() ** -0.5)
