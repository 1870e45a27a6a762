"""Dialogue formats, one short file a model family, found by name or by ``model_type``."""

from __future__ import annotations

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.formats.base import BoxesRead, DialogueFormat, PromptsRead
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat

__all__ = ["FORMATS", "BoxesRead", "DialogueFormat", "PromptsRead", "get_format"]

FORMATS: dict[str, DialogueFormat] = {"sam4mllm": Sam4MllmFormat()}


def get_format(name: str) -> DialogueFormat:
    """The format of that name.

    Raises:
        CheckpointError: no such format.
    """
    if name not in FORMATS:
        raise CheckpointError(
            f"unknown dialogue format {name!r}", hint=f"Known formats: {', '.join(FORMATS)}."
        )
    return FORMATS[name]
