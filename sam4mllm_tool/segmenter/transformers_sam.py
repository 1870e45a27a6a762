"""The SAM families of transformers: SAM, SAM-HQ, SAM 2 and 2.1, SAM 3's tracker, EdgeTAM.

They differ in how a picture is fitted to the model's square input (scaled and padded, or
stretched) and in what an image embedding consists of; ``FAMILIES`` lists the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForMaskGeneration

from sam4mllm_tool.catalogue import nearest_checkpoint
from sam4mllm_tool.devices import choose_device
from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.pretrained import load_whole, loading
from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.segmenter.base import (
    DEFAULT_CACHE_BYTES,
    EmbeddingSegmenter,
    box_array,
    choose_dtype,
    mask_array,
    padded_size,
    point_arrays,
    resized,
    unpadded,
)
from sam4mllm_tool.types import RgbImage


@dataclass(frozen=True)
class Family:
    """The differences between families.

    Attributes:
        padded: the longer side is scaled to the model's input and the shorter one padded;
            otherwise both sides are stretched to it.
        arguments: what ``get_image_embeddings`` returned → arguments of the model's ``forward``.
    """

    padded: bool
    arguments: Callable[[Any], dict[str, Any]] = lambda embedding: {"image_embeddings": embedding}


_PADDED = Family(padded=True)
_HQ = Family(
    padded=True,
    arguments=lambda parts: {"image_embeddings": parts[0], "intermediate_embeddings": parts[1]},
)
_STRETCHED = Family(padded=False)

FAMILIES = {
    "sam": _PADDED,
    "sam_hq": _HQ,
    "sam2": _STRETCHED,
    "sam3_tracker": _STRETCHED,
    "edgetam": _STRETCHED,
}
"""By the image model's ``base_model_prefix``. Checkpoints of the video models (``sam2_video``,
``sam3_video``, ``edgetam_video``) are read as their family's image model."""

_HINT = f"Give a transformers checkpoint of {', '.join(FAMILIES)} or one of their video models."


class TransformersSegmenter(EmbeddingSegmenter[Any]):
    """A transformers SAM as a :class:`~sam4mllm_tool.protocols.Segmenter`.

    Args:
        model: a model of one of the ``FAMILIES``, on its device; its vision encoder in any floating
            dtype, the rest in float32.
        image_processor: the family's image processor.
        name: checkpoint, for traces.
        cache_bytes: bound on the image embeddings kept.
    """

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        *,
        name: str = "transformers",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        super().__init__(name, model.device, cache_bytes)
        self._model = model.eval().requires_grad_(False)
        self._dtype = next(model.vision_encoder.parameters()).dtype
        self._process = image_processor
        self._family = FAMILIES[model.base_model_prefix]
        self._side: int = model.prompt_encoder.input_image_size

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> TransformersSegmenter:
        """Load a directory or hub id; weights from safetensors only.

        Args:
            name: directory or hub id.
            device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device.
            dtype: of the image encoder, see :func:`~sam4mllm_tool.segmenter.load_segmenter`.
            cache_bytes: bound on the image embeddings kept.

        Raises:
            CheckpointError: missing, corrupt or of the wrong kind.
            DeviceOutOfMemory: the device is too small for it.
        """
        target, kind = choose_device(device), choose_dtype(dtype)
        with loading("segmenter", str(name), _hint(str(name))):
            model = _load_model(str(name), target)
            model.vision_encoder.to(kind)
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        return cls(model, processor, name=Path(name).name, cache_bytes=cache_bytes)

    @property
    def logits_shape(self) -> tuple[int, int]:
        """(h, w) of the low-resolution logits, four to a patch and axis."""
        height, width = self._model.prompt_encoder.image_embedding_size
        return 4 * height, 4 * width

    def _encode(self, image: RgbImage) -> Any:
        self._scaled_size(image)
        pixels = self._process(images=image.pil, return_tensors="pt")["pixel_values"]
        # Modules between encoder and decoder run in the encoder's dtype.
        mixed = torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)
        with mixed:
            embedding = self._model.get_image_embeddings(pixels.to(self.device, self._dtype))
        return _in_float32(embedding)

    def _embedding_bytes(self, embedding: Any) -> int:
        return sum(tensor.nbytes for tensor in _tensors(embedding))

    def _decode(
        self, image: RgbImage, embedding: Any, prompts: Sequence[SegmentPrompt]
    ) -> tuple[Tensor, Tensor]:
        """Each prompt is one item of the batch; the embedding is shared without a copy."""
        points, boxes, masks = point_arrays(prompts), box_array(prompts), mask_array(prompts)
        height, width = self._scaled_size(image)
        scale = np.array([width / image.width, height / image.height])
        arguments = self._family.arguments(_expanded(embedding, len(prompts)))
        if points is not None:
            arguments["input_points"] = self._tensor(points[0] * scale)[:, None]
            arguments["input_labels"] = torch.as_tensor(points[1], device=self.device)[:, None]
        if boxes is not None:
            arguments["input_boxes"] = self._tensor(boxes * np.tile(scale, 2))[:, None]
        if masks is not None:
            arguments["input_masks"] = self._tensor(masks)
        output = self._model(**arguments, multimask_output=True)
        return output.pred_masks[:, 0], output.iou_scores[:, 0]

    def _to_image_size(self, image: RgbImage, logits: Tensor) -> Tensor:
        if self._family.padded:
            return unpadded(logits, image, self._side)
        return resized(logits, (image.height, image.width))

    def _scaled_size(self, image: RgbImage) -> tuple[int, int]:
        """(height, width) of the picture in the model's frame, without padding."""
        return padded_size(image, self._side) if self._family.padded else (self._side, self._side)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    else:
        for branch in tree:
            yield from _tensors(branch)


def _expanded(tree: Any, count: int) -> Any:
    """The same embedding of one image for ``count`` prompts."""
    if isinstance(tree, Tensor):
        return tree.expand(count, *tree.shape[1:])
    return [_expanded(branch, count) for branch in tree]


def _in_float32(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.float()
    return [_in_float32(branch) for branch in tree]


def _load_model(name: str, device: torch.device) -> Any:
    model = load_whole(AutoModelForMaskGeneration, name, device)
    if model.base_model_prefix not in FAMILIES:
        raise CheckpointError(f"{name!r} is not of a known SAM family", hint=_HINT)
    return model


def _hint(name: str) -> str:
    """What could be given instead; a misspelt hub id gets the nearest known one."""
    return f"{'' if Path(name).is_dir() else nearest_checkpoint(name)}{_HINT}"
