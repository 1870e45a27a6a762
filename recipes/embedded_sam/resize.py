"""A trained small SAM at another resolution or with more layers, its weights carried over.

Coarse models learn from many pictures per minute, fine ones draw better outlines: train a coarse
model first, then continue with a finer one.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.segmenter.small import SmallSamConfig, build_small_sam

PATCHES = "image_encoder.patch_embed.proj.weight"
POSITIONS = "image_encoder.pos_embed"
BLOCKS = "image_encoder.blocks."


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
            f"cannot go from {config.patch_size} px patches to {patch_size} px on {image_size} px",
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


@torch.no_grad()
def extend_sam(
    sam: Sam, config: SmallSamConfig, new_blocks: Collection[int] = (), drawn_prompts: bool = False
) -> tuple[Sam, SmallSamConfig]:
    """The same SAM with further encoder blocks and drawn prompts, which change nothing yet.

    Args:
        sam, config: what there is.
        new_blocks: indices, in the extended encoder, of the new (windowed) blocks.
        drawn_prompts: whether it can learn to draw its prompts (see `DrawnPromptEncoder`).
    """
    depth = config.depth + len(new_blocks)
    kept = [place for place in range(depth) if place not in new_blocks]
    extended = replace(
        config,
        depth=depth,
        global_blocks=tuple(kept[place] for place in config.global_blocks),
        drawn_prompts=drawn_prompts or config.drawn_prompts,
    )
    made = build_small_sam(extended)
    weights = dict(made.state_dict()) | {
        _moved(name, kept): value for name, value in sam.state_dict().items()
    }
    for place in new_blocks:  # a block adds to what it is given: adding nothing, it is not there
        for last in ("attn.proj", "mlp.lin2"):
            for part in ("weight", "bias"):
                weights[f"{BLOCKS}{place}.{last}.{part}"].zero_()
    made.load_state_dict(weights)
    return made, extended


def _moved(name: str, kept: Sequence[int]) -> str:
    """A weight's name when old block number n is new block `kept[n]`."""
    if not name.startswith(BLOCKS):
        return name
    number, rest = name.removeprefix(BLOCKS).split(".", 1)
    return f"{BLOCKS}{kept[int(number)]}.{rest}"
