"""What the transformers proposers share: locking, checks, sorting and clipping of boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sam4mllm_tool.concurrency import FairLock
from sam4mllm_tool.errors import BackendError, DeviceOutOfMemory, ExpressionError
from sam4mllm_tool.geometry import clip_box, different_boxes
from sam4mllm_tool.protocols import Proposal
from sam4mllm_tool.types import Box, Mask, RgbImage


class Detected(NamedTuple):
    """Result of transformers' post-processing, in pixels of the image.

    Attributes:
        scores: shape (n,), 0 to 1.
        boxes: shape (n, 4), xyxy.
        masks: shape (n, height, width), or ``None``.
    """

    scores: Tensor
    boxes: Tensor
    masks: Tensor | None = None


class TransformersProposer(ABC):
    """A text-prompted detector of transformers, as a
    :class:`~sam4mllm_tool.protocols.Proposer`.

    One thread uses the model at a time; cancelled callers leave the queue.

    Args:
        model: on its device, in float32.
        processor: the family's processor.
        name: name of the checkpoint, for traces.
        threshold: minimum confidence of a candidate; ``None`` for the library's default.
    """

    threshold: ClassVar[float]
    """The library's default."""
    model_class: ClassVar[Any]
    processor_class: ClassVar[Any]

    def __init__(
        self, model: Any, processor: Any, *, name: str, threshold: float | None = None
    ) -> None:
        self.name = name
        self._model = model.eval().requires_grad_(False)
        self._processor = processor
        self._threshold = self.threshold if threshold is None else threshold
        self._turn = FairLock()

    @property
    @abstractmethod
    def _max_tokens(self) -> int:
        """Maximum number of text tokens."""

    @abstractmethod
    def _inputs(self, image: RgbImage, phrase: str) -> dict[str, Any]:
        """The model's inputs, from the processor."""

    @abstractmethod
    def _numbers(self, output: Any) -> list[Tensor]:
        """The model's raw scores, boxes and masks, to be checked for NaN."""

    @abstractmethod
    def _detected(self, output: Any, inputs: dict[str, Any], size: tuple[int, int]) -> Detected:
        """The library's post-processing for a picture of ``size`` (height, width)."""

    def propose(self, image: RgbImage, phrase: str, limit: int) -> list[Proposal]:
        """Up to ``limit`` different candidates, the most confident first; possibly none.

        Raises:
            ExpressionError: the phrase has more tokens than the model accepts.
            BackendError: the model's output is not finite, as with damaged weights.
            DeviceOutOfMemory: the device is too small.
        """
        with self._at_model():
            inputs = self._inputs(image, phrase)
            self._check_length(phrase, inputs["input_ids"].shape[-1])
            output = self._model(**{k: v.to(self._model.device) for k, v in inputs.items()})
            self._check_numbers(output)
            found = self._detected(output, inputs, (image.height, image.width))
        return _proposals(found, image, limit)

    def _check_length(self, phrase: str, tokens: int) -> None:
        if tokens > self._max_tokens:
            raise ExpressionError(
                f"the phrase has {tokens} tokens and {self.name} accepts {self._max_tokens}: "
                f"{phrase[:60]!r}",
                hint="Give a short noun phrase, such as 'red apple'.",
            )

    def _check_numbers(self, output: Any) -> None:
        """NaN is never above the threshold: without this check it would look like "no object"."""
        for numbers in self._numbers(output):
            # Padding tokens of the text have a score of minus infinity.
            if (torch.isnan(numbers) | torch.isposinf(numbers)).any():
                raise BackendError(
                    f"the proposer {self.name} returned numbers that are not finite",
                    hint="Download the weights again.",
                )

    @contextmanager
    def _at_model(self) -> Iterator[None]:
        with self._turn.taken(), torch.inference_mode():
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise DeviceOutOfMemory(
                    f"the proposer ran out of memory on {self._model.device}: {error}",
                    hint="Use a smaller checkpoint, or device='cpu'.",
                    retryable=True,
                ) from error


def _proposals(found: Detected, image: RgbImage, limit: int) -> list[Proposal]:
    """The most confident first, boxes clipped to the image, duplicates removed."""
    order = found.scores.argsort(descending=True, stable=True).tolist()
    boxes = {n: clip_box(Box(*found.boxes[n].tolist()), image.width, image.height) for n in order}
    order = [n for n in order if boxes[n].area > 0]
    kept = different_boxes([boxes[n] for n in order], limit)
    return [
        Proposal(
            boxes[n],
            float(found.scores[n]),
            None if found.masks is None else Mask(found.masks[n].bool().cpu().numpy()),
        )
        for n in (order[position] for position in kept)
    ]
