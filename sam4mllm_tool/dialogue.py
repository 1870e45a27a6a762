"""The words an MLLM and we exchange: turns, and how a family says yes and no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue, plain text."""

    role: Literal["system", "user", "assistant"]
    text: str


Dialogue = tuple[Turn, ...]
"""Messages in order, the last one from the user. The image belongs to the first user turn and
stands before its text, so that everything up to the image is a prefix that dialogues share."""


@dataclass(frozen=True)
class YesNoWords:
    """How a family says yes and no, and the text that stands before its first answer."""

    yes: tuple[str, ...]
    no: tuple[str, ...]
    prefix: str = ""
