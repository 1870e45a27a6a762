"""EfficientViT-SAM: SAM's prompt encoder and mask decoder behind a fast convolutional encoder.

Architecture after Zhang, Cai and Han, "EfficientViT-SAM" (arXiv 2402.05008), and Cai et al.,
"EfficientViT" (arXiv 2205.14756), whose linear attention it uses. Prompt encoder and mask decoder
are segment_anything's own classes. The names of the weights are those of the published files, so
that these load as they are.

The encoder's input is 512 px (L models) or 1024 px (XL models), scaled and padded as in
SAM; prompts and mask logits are in SAM's 1024 px frame for all of them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from sam4mllm_tool.errors import CheckpointError

FRAME_SIDE = 1024
"""Side of the frame that prompts are given in, pixels."""
GRID = 64
"""Side of the image embedding; mask logits are four times as fine."""
WIDTH = 256
"""Channels of neck, image embedding, prompt encoder and mask decoder."""
HEAD_WIDTH = 32
"""Channels per attention head."""
NORM_EPS = 1e-6
"""Epsilon of every normalisation layer, including those of the mask decoder."""

Kind = Literal["plain", "fused", "inverted", "attention"]


@dataclass(frozen=True)
class Stage:
    """A stage of the backbone; each but the first begins with a block of stride 2.

    Attributes:
        width: channels.
        depth: number of blocks after the first one.
        kind: of these blocks.
        expansion: hidden channels of a block per channel; four times as many in the first one.
        kernel: of the attention's second scale.
    """

    width: int
    depth: int
    kind: Kind
    expansion: int
    kernel: int = 5


@dataclass(frozen=True)
class Variant:
    """A size of EfficientViT-SAM.

    Attributes:
        image_side: side of the square input, pixels.
        stages: of the backbone; the last three feed the neck.
        neck_depth: blocks of the neck.
        neck_expansion: their hidden channels per channel.
    """

    image_side: int
    stages: tuple[Stage, ...]
    neck_depth: int
    neck_expansion: int


def _large(neck_depth: int, *depths: int) -> Variant:
    kinds: tuple[Kind, ...] = ("plain", "fused", "fused", "inverted", "attention")
    shapes = zip((32, 64, 128, 256, 512), depths, kinds, (1, 4, 4, 4, 6), strict=True)
    return Variant(512, tuple(Stage(*shape) for shape in shapes), neck_depth, 1)


def _extra_large(neck_depth: int, *depths: int) -> Variant:
    kinds: tuple[Kind, ...] = ("plain", "fused", "fused", "fused", "attention", "attention")
    shapes = zip((32, 64, 128, 256, 512, 1024), depths, kinds, (1, 4, 4, 4, 4, 6), strict=True)
    return Variant(1024, tuple(Stage(*shape, kernel=3) for shape in shapes), neck_depth, 4)


VARIANTS = {
    "l0": _large(4, 1, 1, 1, 4, 4),
    "l1": _large(8, 1, 1, 1, 6, 6),
    "l2": _large(12, 1, 2, 2, 8, 8),
    "xl0": _extra_large(6, 0, 1, 1, 2, 3, 3),
    "xl1": _extra_large(12, 1, 2, 2, 4, 6, 6),
}
"""The published sizes."""

_STAGE = re.compile(r"image_encoder\.backbone\.stages\.(\d+)\.")
_NECK_BLOCK = re.compile(r"image_encoder\.neck\.middle\.op_list\.(\d+)\.")


def variant_of(weights: Mapping[str, object]) -> Variant | None:
    """The size of the model in a state dict, ``None`` if it is of another architecture.

    Raises:
        CheckpointError: an EfficientViT-SAM of an unpublished size.
    """
    stages, neck_depth = _count(_STAGE, weights), _count(_NECK_BLOCK, weights)
    if not stages or not neck_depth:
        return None
    for variant in VARIANTS.values():
        if (len(variant.stages), variant.neck_depth) == (stages, neck_depth):
            return variant
    raise CheckpointError(
        f"no published EfficientViT-SAM has {stages} stages and {neck_depth} blocks in its neck",
        hint=f"Use one of the published sizes: {', '.join(VARIANTS)}.",
    )


def build_efficientvit_sam(variant: Variant) -> Sam:
    """A ``Sam`` of the given size with random weights, float32."""
    sam = Sam(
        ImageEncoder(variant),
        PromptEncoder(
            embed_dim=WIDTH,
            image_embedding_size=(GRID, GRID),
            input_image_size=(FRAME_SIDE, FRAME_SIDE),
            mask_in_chans=16,
        ),
        MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8),
            transformer_dim=WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=WIDTH,
        ),
    )
    for module in sam.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            module.eps = NORM_EPS
    return sam


class ImageEncoder(nn.Module):
    """Picture (n, 3, side, side), normalised and padded → embedding (n, 256, 64, 64).

    In bfloat16 the attention's quotient and the upsampling are computed in float32.
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.img_size = variant.image_side
        self.backbone = Backbone(variant.stages)
        self.neck = Neck([stage.width for stage in variant.stages], variant)
        self.norm = LayerNorm2d(WIDTH, NORM_EPS)

    def forward(self, picture: Tensor) -> Tensor:
        """Backbone, neck, normalisation."""
        return self.norm(self.neck(self.backbone(picture)))


class Backbone(nn.Module):
    """Stages whose outputs are (n, width, side / 2^stage / 2, …), from fine to coarse."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        first, *later = stages
        blocks: list[nn.Module] = [_conv(3, first.width, 3, stride=2)]
        blocks += [Block(_plain(first.width)) for _ in range(first.depth)]
        self.stages = nn.ModuleList([_listed(blocks)])
        for stage, before in zip(later, stages, strict=False):
            self.stages.append(_listed(_stage_blocks(before.width, stage)))

    def forward(self, picture: Tensor) -> list[Tensor]:
        """The outputs of all stages."""
        outputs = [picture]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]


class Neck(nn.Module):
    """The last three stages, each resized and projected to 64 x 64 x 256, added and refined."""

    def __init__(self, widths: list[int], variant: Variant) -> None:
        super().__init__()
        coarse_to_fine = widths[:-4:-1]
        self.input_ops = nn.ModuleList(
            [_listed([_conv(width, WIDTH, 1, act=False)]) for width in coarse_to_fine]
        )
        self.middle = _listed(
            [Block(_fused(WIDTH, WIDTH, variant.neck_expansion)) for _ in range(variant.neck_depth)]
        )
        last = _conv(WIDTH, WIDTH, 1, bias=True, norm=False, act=False)
        self.output_ops = nn.ModuleList([_listed([last])])

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """The stages' outputs → (n, 256, 64, 64)."""
        added = torch.stack(
            [_to_grid(op(x)) for op, x in zip(self.input_ops, reversed(outputs), strict=False)]
        ).sum(0)
        return self.output_ops[0](self.middle(added))


class Block(nn.Module):
    """``main(x)``, with a residual connection unless the block changes the shape."""

    def __init__(self, main: nn.Module, *, residual: bool = True) -> None:
        super().__init__()
        self.main = main
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) in and out, or half as high and wide."""
        return x + self.main(x) if self.residual else self.main(x)


class LinearAttention(nn.Module):
    """Multi-scale attention with ReLU in place of softmax, linear in the number of positions.

    Without softmax, sum_j relu(q_i)·relu(k_j) v_j = (sum_j v_j relu(k_j)^T) relu(q_i): the sum
    over positions is computed once. A row of ones appended to v gives the normaliser in the same
    product. In float16 these sums over thousands of positions overflow.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        mixed = 3 * width
        self.qkv = _conv(width, mixed, 1, norm=False, act=False)
        near = nn.Conv2d(mixed, mixed, kernel, padding=kernel // 2, groups=mixed, bias=False)
        heads = nn.Conv2d(mixed, mixed, 1, groups=mixed // HEAD_WIDTH, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(near, heads)])
        self.proj = _conv(2 * width, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) in and out."""
        here = self.qkv(x)
        scales = torch.cat([here, *(op(here) for op in self.aggreg)], dim=1)
        batch, _, height, width = scales.shape
        heads = scales.reshape(batch, -1, 3 * HEAD_WIDTH, height * width)
        queries, keys, values = heads.split(HEAD_WIDTH, dim=2)
        values = F.pad(values, (0, 0, 0, 1), value=1.0)
        summed = values @ F.relu(keys).transpose(-1, -2)
        seen = (summed @ F.relu(queries)).float()
        seen = seen[:, :, :-1] / (seen[:, :, -1:] + 1e-15)
        return self.proj(seen.to(x.dtype).reshape(batch, -1, height, width))


def _stage_blocks(width_before: int, stage: Stage) -> list[nn.Module]:
    """A block of stride 2 to the stage's width, then its blocks."""
    shrink = _fused if stage.kind == "fused" else _inverted
    wide = 4 * stage.expansion
    first = Block(shrink(width_before, stage.width, wide, stride=2), residual=False)
    return [first, *(_block(stage) for _ in range(stage.depth))]


def _block(stage: Stage) -> nn.Module:
    width, expansion = stage.width, stage.expansion
    if stage.kind == "fused":
        return Block(_fused(width, width, expansion))
    if stage.kind == "inverted":
        return Block(_inverted(width, width, expansion))
    return _named(
        context_module=Block(LinearAttention(width, stage.kernel)),
        local_module=Block(_inverted(width, width, expansion)),
    )


def _plain(width: int) -> nn.Sequential:
    """Two 3 x 3 convolutions."""
    return _named(conv1=_conv(width, width, 3), conv2=_conv(width, width, 3, act=False))


def _fused(width: int, out: int, expansion: int, *, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution to the hidden width, then 1 x 1 back."""
    hidden = width * expansion
    return _named(
        spatial_conv=_conv(width, hidden, 3, stride=stride),
        point_conv=_conv(hidden, out, 1, act=False),
    )


def _inverted(width: int, out: int, expansion: int, *, stride: int = 1) -> nn.Sequential:
    """1 x 1 to the hidden width, 3 x 3 per channel, 1 x 1 back, normalised at the end only."""
    hidden = width * expansion
    return _named(
        inverted_conv=_conv(width, hidden, 1, bias=True, norm=False),
        depth_conv=_conv(hidden, hidden, 3, stride=stride, groups=hidden, bias=True, norm=False),
        point_conv=_conv(hidden, out, 1, act=False),
    )


def _conv(
    width: int,
    out: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    norm: bool = True,
    act: bool = True,
) -> nn.Sequential:
    """A "same" convolution with ``stride``, followed by normalisation and activation."""
    parts: dict[str, nn.Module] = {
        "conv": nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
    }
    if norm:
        parts["norm"] = nn.BatchNorm2d(out)
    if act:
        parts["act"] = nn.GELU(approximate="tanh")
    return _named(**parts)


def _to_grid(x: Tensor) -> Tensor:
    """(n, c, h, w) → (n, c, 64, 64), computed in float32."""
    large = F.interpolate(x.float(), size=(GRID, GRID), mode="bicubic", align_corners=False)
    return large.to(x.dtype)


def _named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _listed(parts: Iterable[nn.Module]) -> nn.Sequential:
    return _named(op_list=nn.Sequential(*parts))


def _count(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    """How many different numbers the pattern matches at the beginnings of the names."""
    return len({found[1] for name in names if (found := pattern.match(name))})
