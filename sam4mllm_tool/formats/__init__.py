"""Dialogue formats, one short file per model family, found by name or by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sam4mllm_tool.errors import CheckpointError, nearest
from sam4mllm_tool.formats.base import BoxesRead, DialogueFormat, PromptsRead
from sam4mllm_tool.formats.gemma3 import Gemma3Format
from sam4mllm_tool.formats.generic import GenericFormat
from sam4mllm_tool.formats.glm4v import Glm4vFormat
from sam4mllm_tool.formats.grids import ResizedPixelGrid
from sam4mllm_tool.formats.internvl import InternVlFormat
from sam4mllm_tool.formats.molmo import MolmoFormat
from sam4mllm_tool.formats.paligemma import PaliGemmaFormat
from sam4mllm_tool.formats.qwen2_5_vl import Qwen25VlFormat
from sam4mllm_tool.formats.qwen2_vl import Qwen2VlFormat
from sam4mllm_tool.formats.qwen3_vl import Qwen3VlFormat
from sam4mllm_tool.formats.qwen_vl import QwenVlFormat
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat

__all__ = [
    "FORMATS",
    "BoxesRead",
    "DialogueFormat",
    "PromptsRead",
    "describe_numbers",
    "format_for",
    "get_format",
]

FORMATS: dict[str, DialogueFormat] = {
    known.name: known
    for known in (
        Sam4MllmFormat(),
        QwenVlFormat(),
        Qwen2VlFormat(),
        Qwen25VlFormat(),
        Qwen3VlFormat(),
        InternVlFormat(),
        Glm4vFormat(),
        Gemma3Format(),
        PaliGemmaFormat(),
        MolmoFormat(),
        GenericFormat(),
    )
}

_BY_MODEL_TYPE = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_5_omni": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_omni_moe": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl",
    "internvl": "internvl",
    "internvl_chat": "internvl",
    "glm4v": "glm4v",
    "glm4v_moe": "glm4v",
    "glm46v": "glm4v",
    "gemma3": "gemma3",
    "gemma3n": "gemma3",
    "gemma4": "gemma3",
    "paligemma": "paligemma",
    "molmo": "molmo",
    "molmo2": "molmo",
}


_NUMBERS = {
    "qwen2_5_vl": "pixels of the picture as the model resized it",
    "paligemma": "parts in 1024 of the picture's height and width",
    "molmo": "percent of the picture's width and height",
}


def describe_numbers(name: str) -> str:
    """The unit of the coordinates in a format's dialogues, in words."""
    if name not in FORMATS:
        return "in the format's own unit"
    return _NUMBERS.get(name, "thousandths of the picture's width and height")


def get_format(name: str) -> DialogueFormat:
    """The format with that name.

    Raises:
        CheckpointError: there is no such format.
    """
    if name not in FORMATS:
        raise CheckpointError(
            f"unknown dialogue format {name!r}", hint=nearest(name, FORMATS, "Known formats")
        )
    return FORMATS[name]


def format_for(
    model_type: str, processor_config: Mapping[str, Any] | None = None
) -> DialogueFormat:
    """The format of a stock checkpoint, ``generic`` for a family that has none of its own.

    Args:
        model_type: as in the checkpoint's ``config.json``.
        processor_config: contents of its ``preprocessor_config.json``; it matters where
            coordinates are pixels of the resized picture (Qwen2.5-VL), whose size it decides.
    """
    found = FORMATS[_BY_MODEL_TYPE.get(model_type, "generic")]
    if processor_config and isinstance(found, Qwen25VlFormat):
        return replace(found, grid=ResizedPixelGrid.from_processor(processor_config))
    return found
