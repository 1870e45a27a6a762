"""What models do wrong, as typed errors: exceptions of any kind, and answers that are none.

A model may be anybody's, in this process or behind a network. NaN lies below every threshold and 7
above: read as answers, they would become labels and masks that nothing tells from good ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from sam4mllm_tool.concurrency import CallCancelled
from sam4mllm_tool.errors import BackendError, DeviceOutOfMemory, EndpointError, Sam4MllmError
from sam4mllm_tool.protocols import MaskCandidate, Proposal, Reply
from sam4mllm_tool.types import Mask, RgbImage, YesNo

_ROUNDING = 0.01
"""How far sums of probabilities in half precision may lie above 1."""
_LONGEST_MESSAGE = 200


class _NoAnswer(Exception):
    """What a model returned cannot be an answer."""


@contextmanager
def typed_faults(model: str) -> Iterator[None]:
    """Whatever goes wrong with a model within the ``with`` block, as a typed error.

    Args:
        model: its name, for the message.

    Raises:
        DeviceOutOfMemory: in place of an error that says so; retryable.
        EndpointError: in place of a time-out or a lost connection; retryable.
        BackendError: in place of any other error that is not one of ours; not retryable.
    """
    try:
        yield
    except (Sam4MllmError, CallCancelled):
        raise
    except Exception as error:
        raise _typed(model, error) from error


def checked_replies(replies: Sequence[Reply]) -> Sequence[Reply]:
    """The replies, if there is one and all are replies. For use within :func:`typed_faults`."""
    _require(bool(replies), "there is no reply")
    for reply in replies:
        _require(isinstance(reply.text, str), "a reply is no text")
        logarithm = reply.log_probability
        likely = logarithm is None or (math.isfinite(logarithm) and logarithm <= _ROUNDING)
        _require(likely, f"a reply's log-probability is {logarithm}")
    return replies


def checked_answers(
    answers: Sequence[Sequence[YesNo]], questions: int
) -> Sequence[Sequence[YesNo]]:
    """The answers to so many questions, if they are probabilities. As :func:`checked_replies`."""
    _require(len(answers) == questions, f"{questions} questions have {len(answers)} answers")
    for yes, no in (answer for some in answers for answer in some):
        _require(
            yes >= 0 and no >= 0 and yes + no <= 1 + _ROUNDING,
            f"the probabilities of yes and no are {yes} and {no}",
        )
    return answers


def checked_masks(
    masks: Sequence[Sequence[MaskCandidate]], image: RgbImage, prompts: int
) -> Sequence[Sequence[MaskCandidate]]:
    """Masks for so many prompts, if each has one and all are. As :func:`checked_replies`."""
    _require(len(masks) == prompts, f"{prompts} prompts have {len(masks)} lists of masks")
    for some in masks:
        _require(bool(some), "there is no mask for a prompt")
        for one in some:
            _check_size(one.mask, image)
            _require(
                math.isfinite(one.predicted_iou), f"a mask's predicted IoU is {one.predicted_iou}"
            )
            finite = one.logits is None or bool(np.isfinite(one.logits).all())
            _require(finite, "a mask's logits are not finite")
    return masks


def checked_proposals(proposals: Sequence[Proposal], image: RgbImage) -> Sequence[Proposal]:
    """The proposals, if each is one. As :func:`checked_replies`."""
    for one in proposals:
        _require(all(map(math.isfinite, one.box)), f"a proposed box is {tuple(one.box)}")
        sure = one.confidence is None or 0 <= one.confidence <= 1 + _ROUNDING
        _require(sure, f"a proposal's confidence is {one.confidence}")
        if one.mask is not None:
            _check_size(one.mask, image)
    return proposals


def _check_size(mask: Mask, image: RgbImage) -> None:
    size = (mask.width, mask.height)
    _require(size == image.size, f"a mask is {size} for a picture of {image.size}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _NoAnswer(otherwise)


def _typed(model: str, error: Exception) -> BackendError:
    said = " ".join(str(error).split())[:_LONGEST_MESSAGE]
    if isinstance(error, _NoAnswer):
        return BackendError(
            f"{model} gave no valid answer: {said}",
            hint="Its weights may be damaged: 'sam4mllm-tool check' tests a checkpoint.",
        )
    message = f"{model} failed: {type(error).__name__}: {said}".rstrip(": ")
    if _is_out_of_memory(error):
        return DeviceOutOfMemory(
            message, hint="Try again, or use a smaller picture or checkpoint.", retryable=True
        )
    if _is_of_the_network(error):
        return EndpointError(
            message, hint="Try again; if it lasts, see that the model's server can be reached."
        )
    return BackendError(message, hint="'sam4mllm-tool check' tests the models one by one.")


def _is_out_of_memory(error: Exception) -> bool:
    """torch names its own error so, and on a CPU raises a ``RuntimeError`` that says it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _is_of_the_network(error: BaseException | None) -> bool:
    """Client libraries wrap the operating system's errors in their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, TimeoutError | ConnectionError):
            return True
        seen.add(id(error))
        error = error.__cause__
    return False
