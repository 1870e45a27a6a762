"""The segment_anything library's SAM: official ViT-B/L/H, EfficientViT-SAM and the small SAM.

The library's own functions prepare image and prompts and resize the masks, so masks equal those of
its ``SamPredictor`` bit for bit. Unlike ``SamPredictor``, no state of one image remains for the
next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from sam4mllm_tool.devices import choose_device
from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.segmenter.base import (
    DEFAULT_CACHE_BYTES,
    EmbeddingSegmenter,
    box_array,
    choose_dtype,
    mask_array,
    padded_size,
    point_arrays,
    unpadded,
)
from sam4mllm_tool.segmenter.efficientvit import build_efficientvit_sam, variant_of
from sam4mllm_tool.segmenter.small import load_small_sam
from sam4mllm_tool.segmenter.weights import (
    Weights,
    filled,
    overlay,
    read_weights,
    shown,
    too_small,
)
from sam4mllm_tool.types import RgbImage

_KIND_BY_WIDTH = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_HINT = (
    "Give an official SAM checkpoint (sam_vit_b/l/h), an EfficientViT-SAM (l0, l1, l2, xl0, xl1), "
    "or the directory of a small SAM or of a transformers SAM."
)


class SegmentAnythingSegmenter(EmbeddingSegmenter[Tensor]):
    """A ``Sam`` of the segment_anything library as a :class:`~sam4mllm_tool.protocols.Segmenter`.

    The image encoder's input may be smaller than the frame of prompts and masks
    (EfficientViT-SAM's L models: 512 and 1024 px).

    Args:
        sam: the model on its device; prompt encoder and mask decoder in float32, the image
            encoder in any floating dtype.
        name: checkpoint, for traces.
        cache_bytes: bound on the cached image embeddings.
    """

    def __init__(
        self,
        sam: Sam,
        *,
        name: str = "segment_anything",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        super().__init__(name, sam.device, cache_bytes)
        self._sam = sam.eval().requires_grad_(False)
        self._dtype = next(sam.image_encoder.parameters()).dtype
        self._picture = ResizeLongestSide(sam.image_encoder.img_size)
        self._frame = ResizeLongestSide(sam.prompt_encoder.input_image_size[0])

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        decoder: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> SegmentAnythingSegmenter:
        """Load a checkpoint file (``.pt``, ``.pth``, ``.safetensors``) or a small SAM's directory.

        The architecture is recognised from the weights, whatever the file's name.

        Args:
            path: file or directory.
            decoder: file of fine-tuned weights that replace the model's, for example SAM4MLLM's
                mask decoder for EfficientViT-SAM XL1; its keys may begin with ``model.``.
            device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device.
            dtype: of the image encoder, see :func:`~sam4mllm_tool.segmenter.load_segmenter`.
            cache_bytes: bound on the cached image embeddings.

        Raises:
            CheckpointError: missing, corrupt, containing code, or of the wrong kind.
            DeviceOutOfMemory: the device is too small for it.
        """
        path, target, kind = Path(path).expanduser(), choose_device(device), choose_dtype(dtype)
        try:
            sam = _load(path, target)
            if decoder is not None:
                file = Path(decoder).expanduser()
                overlay(sam, read_weights(file, target), file.name)
            sam.image_encoder.to(kind)
        except torch.OutOfMemoryError as error:
            raise too_small(target, path.name, error) from error
        return cls(sam, name=path.name, cache_bytes=cache_bytes)

    @property
    def logits_shape(self) -> tuple[int, int]:
        """(h, w) of the low-resolution logits, four to a patch and axis."""
        height, width = self._sam.prompt_encoder.mask_input_size
        return height, width

    def _encode(self, image: RgbImage) -> Tensor:
        padded_size(image, self._picture.target_length)
        pixels = torch.as_tensor(self._picture.apply_image(image.array), device=self.device)
        pixels = pixels.permute(2, 0, 1).contiguous()[None]
        return self._sam.image_encoder(self._sam.preprocess(pixels).to(self._dtype)).float()

    def _embedding_bytes(self, embedding: Tensor) -> int:
        return embedding.nbytes

    def _decode(
        self, image: RgbImage, embedding: Tensor, prompts: Sequence[SegmentPrompt]
    ) -> tuple[Tensor, Tensor]:
        size = (image.height, image.width)
        points, boxes, masks = point_arrays(prompts), box_array(prompts), mask_array(prompts)
        labelled = None
        if points is not None:
            coordinates = self._frame.apply_coords(points[0], size)
            labelled = (self._tensor(coordinates), self._tensor(points[1]).int())
        sparse, dense = self._sam.prompt_encoder(
            points=labelled,
            boxes=None if boxes is None else self._tensor(self._frame.apply_boxes(boxes, size)),
            masks=None if masks is None else self._tensor(masks),
        )
        return self._sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=self._sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )

    def _to_image_size(self, image: RgbImage, logits: Tensor) -> Tensor:
        return unpadded(logits, image, self._frame.target_length)

    def _tensor(self, array: object) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def _load(path: Path, device: torch.device) -> Sam:
    """A small SAM's directory, or a file of a known architecture."""
    if path.is_dir():
        return load_small_sam(path, device)
    weights = read_weights(path, device)
    return filled(_architecture(weights, path.name), weights, path.name)


def _architecture(weights: Weights, name: str) -> Callable[[], Sam]:
    """The function that builds the model, chosen by the names and shapes of the weights."""
    variant = variant_of(weights)
    if variant is not None:
        return partial(build_efficientvit_sam, variant)
    position = weights.get("image_encoder.pos_embed")
    kind = None if position is None else _KIND_BY_WIDTH.get(position.shape[-1])
    if kind is None:
        raise CheckpointError(
            f"{name} has an unknown SAM architecture; its weights are {shown(weights)}", hint=_HINT
        )
    return sam_model_registry[kind]
