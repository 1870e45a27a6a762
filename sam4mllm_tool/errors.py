"""Every error the package raises on purpose.

::

    Sam4MllmError            message, hint, retryable
    ├── InputError           the caller can fix the call: shown to the agent with the hint
    │   ├── ImageError           not a picture we can read, or over a stated limit
    │   ├── ExpressionError      empty or overlong text
    │   ├── PromptError          box or points that make no sense (NaN, empty, too many)
    │   │   └── PointOutsideImage
    │   ├── DatasetError         a data set's file is missing or not in its layout
    │   ├── UnknownHandle        image_id or object_id never given out, or expired since
    │   └── AccessDenied         path or URL the policy does not allow
    ├── DialogueError        the model's reply could not be read; carries ``raw_reply``
    │   └── ThoughtCutOff        a thinking model has not come to its answer
    └── BackendError         the system's fault: never disguised as tool output
        ├── CheckpointError      missing, corrupt or wrong kind of checkpoint
        ├── DeviceOutOfMemory    the device is too small for the checkpoint or the picture
        ├── ProbabilitiesMissing an endpoint that does not return the logprobs we need
        ├── EndpointError        an endpoint that cannot be reached or answers with an error
        ├── ClusterError         no Ray cluster, too small a one, or its workers keep dying
        ├── StorageError         a full disk, or a folder that cannot be written
        ├── Busy                 too many requests at once; carries ``retry_after``
        └── CallTimeout          a call took longer than its deadline
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


class Sam4MllmError(Exception):
    """Base of all errors raised by sam4mllm-tool.

    Attributes:
        hint: what the caller can do about it, one sentence.
        retryable: whether the same call may succeed later.
    """

    retryable_by_default = False

    def __init__(self, message: str, *, hint: str = "", retryable: bool | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.retryable = self.retryable_by_default if retryable is None else retryable

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors go from process to process, whatever their constructors ask for."""
        return same_error, (type(self), self.args, self.__dict__)

    @property
    def message(self) -> str:
        """The message without the hint."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} Hint: {self.hint}" if self.hint else self.message


class InputError(Sam4MllmError):
    """The call itself is wrong; the caller can fix it."""


class ImageError(InputError):
    """The image cannot be read, or is over a stated limit."""


class ExpressionError(InputError):
    """The expression is empty or too long."""


class PromptError(InputError):
    """A box or point makes no sense: not finite, empty, too many."""


class PointOutsideImage(PromptError):
    """A point lies outside the image."""


class DatasetError(InputError):
    """A data set's file is missing (the hint says what to download) or not in its layout."""


class UnknownHandle(InputError):
    """An image_id or object_id that was never given out or has expired."""


class AccessDenied(InputError):
    """A path or URL that the access policy does not allow."""


class DialogueError(Sam4MllmError):
    """The MLLM's reply could not be read.

    Attributes:
        raw_reply: the reply, as the model gave it.
    """

    retryable_by_default = True

    def __init__(
        self, message: str, *, raw_reply: str, hint: str = "", retryable: bool | None = None
    ) -> None:
        super().__init__(message, hint=hint, retryable=retryable)
        self.raw_reply = raw_reply


class ThoughtCutOff(DialogueError):
    """A thinking model was still thinking when its budget was spent: there is no answer yet."""

    def __init__(self, *, raw_reply: str, budget: int) -> None:
        super().__init__(
            f"the model was still thinking after {budget} tokens, or stopped without an answer",
            raw_reply=raw_reply,
            hint="Give it more (thought_budget=…), or serve a checkpoint that does not think.",
            retryable=False,
        )


class BackendError(Sam4MllmError):
    """A model, device or endpoint failed; not the caller's fault."""


class CheckpointError(BackendError):
    """A checkpoint is missing, corrupt or of the wrong kind."""


class DeviceOutOfMemory(BackendError):
    """The device has too little memory for the checkpoint or the picture."""


class ProbabilitiesMissing(BackendError):
    """An endpoint does not return the token probabilities that the dialogue needs."""


class EndpointError(BackendError):
    """An endpoint cannot be reached or answers with an error."""

    retryable_by_default = True


class ClusterError(BackendError):
    """A Ray cluster cannot be reached, is too small, or its workers keep dying."""


class StorageError(BackendError):
    """A file cannot be written: the disk is full, or access is denied."""

    retryable_by_default = True


class Busy(BackendError):
    """Too many requests at once, or no room left in the memory that callers share.

    Attributes:
        retry_after: seconds after which the same call may succeed.
    """

    retryable_by_default = True

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, hint=f"Retry after {retry_after:.0f} s.")
        self.retry_after = retry_after


class CallTimeout(BackendError):
    """A call took longer than its deadline and was stopped."""

    retryable_by_default = True


def same_error(
    kind: type[Sam4MllmError], args: tuple[Any, ...], state: dict[str, Any]
) -> Sam4MllmError:
    """An error as it was in another process, past its constructor."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """A hint for a name that is not known: the nearest one that is, and all of them.

    Args:
        name: as it was written.
        known: what could have been meant.
        what: what they are, plural and capitalised ("Tools").
    """
    options = list(known)
    similar = difflib.get_close_matches(name, options, n=1)
    guess = f"Did you mean {similar[0]!r}? " if similar else ""
    return f"{guess}{what}: {', '.join(options) or 'none'}."


def check_options(options: Iterable[str], taker: Callable[..., Any]) -> None:
    """Refuse a misspelt option by name, before anything is loaded.

    Args:
        options: names that were given.
        taker: what they will be passed to as keywords.

    Raises:
        InputError: one that ``taker`` does not have.
    """
    known = inspect.signature(taker).parameters
    for option in options:
        if option not in known:
            raise InputError(
                f"there is no option {option!r} here", hint=nearest(option, known, "Options")
            )
