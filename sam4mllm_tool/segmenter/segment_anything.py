"""The segment_anything library's SAM: official ViT-B/L/H checkpoints and the small SAM.

Image and prompts are prepared, and masks brought to the image, by the library's own functions,
so that masks are those of its ``SamPredictor``, bit for bit; unlike it, nothing of one image is
left behind for the next.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from sam4mllm_tool.errors import CheckpointError, DeviceOutOfMemory
from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.segmenter.base import (
    DEFAULT_CACHE_BYTES,
    EmbeddingSegmenter,
    box_array,
    choose_device,
    mask_array,
    padded_size,
    point_arrays,
)
from sam4mllm_tool.segmenter.small import load_small_sam
from sam4mllm_tool.types import RgbImage

_KIND_BY_WIDTH = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_HINT = "Give an official SAM checkpoint (sam_vit_b/l/h .pth or .safetensors) or a small SAM."


class SegmentAnythingSegmenter(EmbeddingSegmenter[Tensor]):
    """A ``Sam`` of the segment_anything library as a :class:`~sam4mllm_tool.protocols.Segmenter`.

    Args:
        sam: the model, float32, on its device.
        name: checkpoint, for traces.
        cache_bytes: bound on the image embeddings kept.
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
        self._resize = ResizeLongestSide(sam.image_encoder.img_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> SegmentAnythingSegmenter:
        """Load a checkpoint file (``.pth``, ``.safetensors``) or a small SAM's directory.

        Raises:
            CheckpointError: missing, corrupt, holding code, or of the wrong kind.
            DeviceOutOfMemory: the device is too small for it.
        """
        path = Path(path).expanduser()
        target = choose_device(device)
        sam = load_small_sam(path) if path.is_dir() else _official_sam(_read_weights(path))
        try:
            return cls(sam.to(target), name=path.name, cache_bytes=cache_bytes)
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(
                f"{target} has too little memory for {path.name}: {error}",
                hint="Use a smaller checkpoint, or device='cpu'.",
            ) from error

    @property
    def logits_shape(self) -> tuple[int, int]:
        """(h, w) of the low-resolution logits, four to a patch and axis."""
        height, width = self._sam.prompt_encoder.mask_input_size
        return height, width

    def _encode(self, image: RgbImage) -> Tensor:
        padded_size(image, self._resize.target_length)
        pixels = torch.as_tensor(self._resize.apply_image(image.array), device=self.device)
        pixels = pixels.permute(2, 0, 1).contiguous()[None]
        return self._sam.image_encoder(self._sam.preprocess(pixels))

    def _embedding_bytes(self, embedding: Tensor) -> int:
        return embedding.nbytes

    def _decode(
        self, image: RgbImage, embedding: Tensor, prompts: Sequence[SegmentPrompt]
    ) -> tuple[Tensor, Tensor]:
        size = (image.height, image.width)
        points, boxes, masks = point_arrays(prompts), box_array(prompts), mask_array(prompts)
        labelled = None
        if points is not None:
            coordinates = self._resize.apply_coords(points[0], size)
            labelled = (self._tensor(coordinates), self._tensor(points[1]).int())
        sparse, dense = self._sam.prompt_encoder(
            points=labelled,
            boxes=None if boxes is None else self._tensor(self._resize.apply_boxes(boxes, size)),
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
        return self._sam.postprocess_masks(
            logits,
            padded_size(image, self._resize.target_length),
            (image.height, image.width),
        )

    def _tensor(self, array: object) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint file; code in it is never run."""
    if not path.is_file():
        raise CheckpointError(f"no SAM checkpoint at {str(path)!r}", hint=_HINT)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} is corrupt or holds more than tensors, and code is never run from "
            "a checkpoint",
            hint="Convert it to safetensors with the tool that wrote it.",
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {str(error)[:300]}",
            hint="The file is damaged or was not fully downloaded; fetch it again.",
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]  # as training scripts wrap it
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path.name} holds no state dict", hint=_HINT)
    return content


def _official_sam(weights: Mapping[str, Tensor]) -> Sam:
    """ViT-B, L or H, told apart by the width of the position embedding."""
    position = weights.get("image_encoder.pos_embed")
    kind = _KIND_BY_WIDTH.get(position.shape[-1]) if isinstance(position, Tensor) else None
    if kind is None:
        raise CheckpointError("the weights are not those of SAM ViT-B, L or H", hint=_HINT)
    with torch.device("meta"):  # no time lost on random weights
        sam = sam_model_registry[kind]()
    for name, values in (
        ("pixel_mean", (123.675, 116.28, 103.53)),
        ("pixel_std", (58.395, 57.12, 57.375)),
    ):
        sam.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
    try:
        sam.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"the weights do not fit SAM {kind}: {str(error)[:300]}", hint=_HINT
        ) from error
    return sam
