"""A trained small SAM at another resolution, weights carried over.

Coarse models learn many pictures a minute, fine ones draw better outlines: train coarse first, then
go on finer from what is known.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.segmenter.small import SmallSamConfig, build_small_sam

PATCHES = "image_encoder.patch_embed.proj.weight"
POSITIONS = "image_encoder.pos_embed"


@torch.no_grad()
def resize_sam(
    sam: Sam, config: SmallSamConfig, image_size: int, patch_size: int
) -> tuple[Sam, SmallSamConfig]:
    """The same SAM for pictures and patches of other sides, in pixels.

    With patches of half the side it sees a picture as the old one would see it enlarged twofold.
    Position embeddings are interpolated.

    Raises:
        InputError: the old patch is no multiple of the new one, or the new one does not divide the
            picture.
    """
    if config.patch_size % patch_size or image_size % patch_size:
        raise InputError(
            f"no way from {config.patch_size} px patches to {patch_size} px on {image_size} px",
            hint="choose a divisor of both the old patch and the picture.",
        )
    resized = replace(config, image_size=image_size, patch_size=patch_size)
    weights = dict(sam.state_dict())
    # A filter over an enlarged picture meets each pixel n x n times: the sum of its weights there.
    times = config.patch_size // patch_size
    weights[PATCHES] = times**2 * F.avg_pool2d(weights[PATCHES], times)
    places = weights[POSITIONS].permute(0, 3, 1, 2)
    places = F.interpolate(
        places, size=(resized.grid, resized.grid), mode="bicubic", align_corners=False
    )
    weights[POSITIONS] = places.permute(0, 2, 3, 1).contiguous()
    made = build_small_sam(resized)
    made.load_state_dict(weights)
    return made, resized
