"""What every SAM backend shares: one embedding per image, batched prompts, a lock, limits."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from sam4mllm_tool.concurrency import FairLock, check_cancelled
from sam4mllm_tool.errors import (
    BackendError,
    CheckpointError,
    DeviceOutOfMemory,
    ImageError,
    PromptError,
)
from sam4mllm_tool.protocols import MaskCandidate, SegmentPrompt
from sam4mllm_tool.types import Mask, PointLabel, PromptPoint, RgbImage

DEFAULT_CACHE_BYTES = 256 * 1024**2
_PROMPTS_AT_ONCE = 16
_SHOWN_LABELS = {PointLabel.FOREGROUND: 1, PointLabel.BACKGROUND: 0}

Embedding = TypeVar("Embedding")


class EmbeddingSegmenter(ABC, Generic[Embedding]):
    """A promptable segmenter that embeds an image once and answers prompts from the embedding.

    Backends say how to encode an image, decode prompts and bring logits to the image's size.
    Image embeddings are cached on the model's device (least recently used evicted first). One
    thread uses the model at a time; cancelled callers leave the queue.

    Args:
        name: checkpoint, for traces.
        device: the model's device.
        cache_bytes: bound on the cached embeddings; evicted ones are computed again.
    """

    def __init__(self, name: str, device: torch.device, cache_bytes: int) -> None:
        self.name = name
        self.device = device
        self._embeddings: LRUCache[str, Embedding] = LRUCache(cache_bytes, self._embedding_bytes)
        self._turn = FairLock()

    @abstractmethod
    def _encode(self, image: RgbImage) -> Embedding:
        """The image embedding."""

    @abstractmethod
    def _embedding_bytes(self, embedding: Embedding) -> int:
        """Bytes of an embedding."""

    @abstractmethod
    def _decode(
        self, image: RgbImage, embedding: Embedding, prompts: Sequence[SegmentPrompt]
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (n, 3, h, w) and predicted IoUs (n, 3) of prompts of one kind."""

    @abstractmethod
    def _to_image_size(self, image: RgbImage, logits: Tensor) -> Tensor:
        """Logits (n, c, h, w) resized to (n, c, image height, image width)."""

    @property
    @abstractmethod
    def logits_shape(self) -> tuple[int, int]:
        """(h, w) of the low-resolution logits."""

    def embed(self, image: RgbImage) -> None:
        """Compute and keep the image embedding, so that the next ``predict`` need not.

        Raises:
            DeviceOutOfMemory: the device is too small.
        """
        with self._at_model():
            self._embedding(image)

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """Three candidate masks per prompt (in the model's order), for all prompts of one image.

        Prompts of one kind (same number of points, box or none, mask or none) are decoded
        together; padding them to one length would change the masks.

        Raises:
            PromptError: a prompt without box, labelled point and mask, a box or point that is
                not finite, or mask logits of another size.
            BackendError: the model's output is not finite, as with damaged weights.
            DeviceOutOfMemory: the device is too small.
        """
        for prompt in prompts:
            self._check_prompt(prompt)
        found: dict[int, tuple[MaskCandidate, ...]] = {}
        for numbers in _groups_of_one_kind(prompts):
            group = [prompts[number] for number in numbers]
            with self._at_model():
                logits, ious = self._decode(image, self._embedding(image), group)
                self._check_answer(logits, ious)
                for number, one, scores in zip(numbers, logits, ious, strict=True):
                    found[number] = self._candidates(image, one, scores)
        return [found[number] for number in range(len(prompts))]

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Low-resolution logits resized to the image: ``float32`` of shape (height, width).

        Raises:
            PromptError: logits of another size than this segmenter's.
        """
        self._check_logits(logits)
        with self._at_model():
            small = torch.tensor(logits, dtype=torch.float32, device=self.device)[None, None]
            return self._to_image_size(image, small)[0, 0].cpu().numpy()

    def _embedding(self, image: RgbImage) -> Embedding:
        known = self._embeddings.get(image.digest)
        if known is not None:
            return known
        embedding = self._encode(image)
        if self._embedding_bytes(embedding) <= self._embeddings.maxsize:
            self._embeddings[image.digest] = embedding
        check_cancelled()
        return embedding

    def _candidates(
        self, image: RgbImage, logits: Tensor, ious: Tensor
    ) -> tuple[MaskCandidate, ...]:
        masks = (self._to_image_size(image, logits[None])[0] > 0).cpu().numpy()
        low = logits.float().cpu().numpy()
        scores = ious.float().cpu().tolist()
        return tuple(
            MaskCandidate(Mask(mask.copy()), one.copy(), score)
            for mask, one, score in zip(masks, low, scores, strict=True)
        )

    def _check_prompt(self, prompt: SegmentPrompt) -> None:
        points = shown_points(prompt)
        if prompt.box is None and not points and prompt.mask_logits is None:
            raise PromptError(
                "the prompt has neither a box nor a labelled point nor a mask",
                hint="Give a box, a foreground or background point, or an earlier mask.",
            )
        numbers = [*(prompt.box or ()), *(value for p in points for value in (p.x, p.y))]
        if not np.isfinite(numbers).all():
            raise PromptError("a box or point is not finite", hint="Give coordinates in pixels.")
        if prompt.box is not None and (prompt.box.width < 0 or prompt.box.height < 0):
            raise PromptError(
                f"the box {tuple(prompt.box)} has swapped corners",
                hint="Give x_min, y_min, x_max, y_max.",
            )
        if prompt.mask_logits is not None:
            self._check_logits(prompt.mask_logits)

    def _check_answer(self, logits: Tensor, ious: Tensor) -> None:
        """NaN is not above 0, so without this check it would give an empty mask."""
        if not (torch.isfinite(logits).all() and torch.isfinite(ious).all()):
            raise BackendError(
                f"the segmenter {self.name} returned numbers that are not finite",
                hint="Download the weights again, or use dtype='float32' (no overflow).",
            )

    def _check_logits(self, logits: NDArray[np.float32]) -> None:
        if logits.shape != self.logits_shape or not np.isfinite(logits).all():
            raise PromptError(
                f"mask logits of shape {logits.shape} do not fit; "
                f"expected finite logits of shape {self.logits_shape}",
                hint="Give the logits of a mask drawn by this segmenter.",
            )

    @contextmanager
    def _at_model(self) -> Iterator[None]:
        with self._turn.taken(), torch.inference_mode():
            try:
                yield
            except torch.OutOfMemoryError as error:
                self._embeddings.clear()
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                raise DeviceOutOfMemory(
                    f"the segmenter ran out of memory on {self.device}: {error}",
                    hint="Use a smaller picture or checkpoint, or device='cpu'.",
                    retryable=True,
                ) from error


def shown_points(prompt: SegmentPrompt) -> list[PromptPoint]:
    """The points passed to SAM: those with a label."""
    return [point for point in prompt.points if point.label in _SHOWN_LABELS]


def point_arrays(
    prompts: Sequence[SegmentPrompt],
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Pixels (n, points, 2) and labels (n, points; 1 foreground, 0 background), if any."""
    shown = [shown_points(prompt) for prompt in prompts]
    if not shown[0]:
        return None
    coordinates = np.array([[(p.x, p.y) for p in points] for points in shown], dtype=np.float64)
    labels = np.array([[_SHOWN_LABELS[p.label] for p in points] for points in shown])
    return coordinates, labels


def box_array(prompts: Sequence[SegmentPrompt]) -> NDArray[np.float64] | None:
    """Boxes (n, 4) in pixels, if any."""
    boxes = [prompt.box for prompt in prompts if prompt.box is not None]
    return np.array(boxes, dtype=np.float64) if boxes else None


def mask_array(prompts: Sequence[SegmentPrompt]) -> NDArray[np.float32] | None:
    """Former masks' logits (n, 1, h, w), if any."""
    masks = [prompt.mask_logits for prompt in prompts if prompt.mask_logits is not None]
    return np.stack(masks).astype(np.float32)[:, None] if masks else None


def padded_size(image: RgbImage, side: int) -> tuple[int, int]:
    """(height, width) of an image whose longer side is scaled to ``side``, before padding.

    Raises:
        ImageError: the shorter side would be scaled to zero.
    """
    scale = side / max(image.size)
    height, width = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
    if min(height, width) < 1:
        raise ImageError(
            f"a picture of {image.width}×{image.height} is too thin for this segmenter",
            hint=f"The longer side may be at most {2 * side - 1} times the shorter one.",
        )
    return height, width


def unpadded(logits: Tensor, image: RgbImage, side: int) -> Tensor:
    """Logits (n, c, h, w) of the padded square frame → (n, c, image height, image width).

    As in SAM: resized to the frame's ``side``, cropped to the picture's part of it, resized to
    the picture's size.
    """
    height, width = padded_size(image, side)
    return resized(resized(logits, (side, side))[..., :height, :width], (image.height, image.width))


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (n, c, h, w) resized to (height, width), bilinear."""
    return interpolate(logits, size, mode="bilinear", align_corners=False)


def _groups_of_one_kind(prompts: Sequence[SegmentPrompt]) -> Iterator[list[int]]:
    """Positions of prompts that may be decoded in one call, bounded in number."""
    groups: dict[tuple[bool, int, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        kind = (prompt.box is not None, len(shown_points(prompt)), prompt.mask_logits is not None)
        groups.setdefault(kind, []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), _PROMPTS_AT_ONCE):
            yield numbers[start : start + _PROMPTS_AT_ONCE]


def choose_dtype(dtype: str) -> torch.dtype:
    """The image encoder's dtype: ``"auto"`` and ``"float32"``, or ``"bfloat16"``.

    float16 is rejected. Activations of SAM's encoders exceed its largest number, 65504: ViT-H's
    (facebookresearch/segment-anything, issues 540 and 696) and those of EfficientViT, whose
    attention sums over all positions and whose last normalisation squares
    (mit-han-lab/efficientvit, issues 110 and 142). Masks would be wrong without an error.

    Raises:
        CheckpointError: any other dtype.
    """
    known = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype in ("float16", "half"):
        raise CheckpointError(
            "SAM image encoders overflow in float16, which makes masks silently wrong",
            hint="Use dtype='bfloat16' or 'float32'.",
        )
    if dtype not in known:
        raise CheckpointError(f"unknown dtype {dtype!r}", hint="Use 'float32' or 'bfloat16'.")
    return known[dtype]
