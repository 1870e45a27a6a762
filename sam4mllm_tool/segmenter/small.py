"""A small SAM: segment_anything's modeling classes in a small configuration, in safetensors.

`build_sam` of segment_anything fixes 1024 px and ViT-B/L/H; everything else about the
architecture is configurable, so a `Sam` built here works wherever `build_sam`'s does
(`SamPredictor`, this package's segmenter).
"""

import json
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.image_encoder import Attention
from torch import nn

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.segmenter.drawn_prompts import DrawnPromptEncoder
from sam4mllm_tool.segmenter.weights import filled, read_weights

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "sam4mllm-small-sam"


@dataclass(frozen=True)
class SmallSamConfig:
    """Sizes of a small SAM.

    Attributes:
        image_size: side of the square input, pixels; larger pictures are scaled down to it.
        patch_size: side of a patch, pixels. Mask logits come four per patch and axis.
        embed_dim: width of the image encoder.
        depth: blocks of the image encoder.
        num_heads: attention heads of the image encoder.
        window_size: side of an attention window, patches.
        global_blocks: indices of blocks that attend over the whole image.
        prompt_dim: width of image embedding, prompt encoder and mask decoder.
        decoder_depth: two-way blocks of the mask decoder.
        decoder_mlp_dim: hidden width of the mask decoder's feed-forward layers.
        decoder_heads: attention heads of the mask decoder.
        drawn_prompts: boxes and points are also drawn onto the image embedding.
    """

    image_size: int = 256
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 6
    num_heads: int = 6
    window_size: int = 8
    global_blocks: tuple[int, ...] = (2, 5)
    prompt_dim: int = 128
    decoder_depth: int = 2
    decoder_mlp_dim: int = 256
    decoder_heads: int = 4
    drawn_prompts: bool = False

    @property
    def grid(self) -> int:
        """Side of the image embedding, patches; mask logits are four times as fine."""
        return self.image_size // self.patch_size


class FusedAttention(Attention):
    """segment_anything's attention in one fused call: the same numbers in half the time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B x H x W x C in and out."""
        batch, height, width, _ = x.shape
        mixed = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        queries, keys, values = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(seen.transpose(1, 2).reshape(batch, height, width, -1))


def build_small_sam(config: SmallSamConfig) -> Sam:
    """A `Sam` of the given configuration with random weights, float32."""
    encoder = ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=4.0,
        out_chans=config.prompt_dim,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=False,
        window_size=config.window_size,
        global_attn_indexes=config.global_blocks,
    )
    for block in encoder.blocks:
        block.attn = FusedAttention(config.embed_dim, config.num_heads)
    prompts = DrawnPromptEncoder if config.drawn_prompts else PromptEncoder
    prompt_encoder = prompts(
        embed_dim=config.prompt_dim,
        image_embedding_size=(config.grid, config.grid),
        input_image_size=(config.image_size, config.image_size),
        mask_in_chans=16,
    )
    decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(
            depth=config.decoder_depth,
            embedding_dim=config.prompt_dim,
            mlp_dim=config.decoder_mlp_dim,
            num_heads=config.decoder_heads,
        ),
        transformer_dim=config.prompt_dim,
        iou_head_depth=3,
        iou_head_hidden_dim=config.prompt_dim,
    )
    return Sam(encoder, prompt_encoder, decoder)


def save_small_sam(sam: Sam, config: SmallSamConfig, directory: Path) -> None:
    """Write `config.json` and half-precision `model.safetensors` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    description = {"model_type": MODEL_TYPE, **asdict(config)}
    (directory / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in sam.state_dict().items()}
    safetensors.torch.save_file(weights, directory / WEIGHTS_FILE)


def load_small_sam_config(directory: Path) -> SmallSamConfig:
    """Read the configuration of a saved small SAM.

    Raises:
        CheckpointError: no such file, or not a small SAM's configuration.
    """
    try:
        description = json.loads((directory / CONFIG_FILE).read_text())
        if description.pop("model_type") != MODEL_TYPE:
            raise KeyError("model_type")
        description["global_blocks"] = tuple(description["global_blocks"])
        description.setdefault("drawn_prompts", False)  # older configurations lack it
        known = {field.name for field in fields(SmallSamConfig)}
        return SmallSamConfig(**{key: description[key] for key in known})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no small SAM in {directory}: {error!r}",
            hint="Give a directory written by save_small_sam.",
        ) from error


def load_small_sam(directory: Path, device: torch.device | None = None) -> Sam:
    """Load a saved small SAM, in float32 and evaluation mode, onto a device (default: CPU).

    Raises:
        CheckpointError: files are missing, corrupt or do not match each other.
        DeviceOutOfMemory: the device is too small for it.
    """
    config = load_small_sam_config(directory)
    weights = read_weights(directory / WEIGHTS_FILE, device or torch.device("cpu"))
    return filled(partial(build_small_sam, config), weights, str(directory / WEIGHTS_FILE))
