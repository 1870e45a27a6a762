"""Checkpoints of transformers, loaded whole, from safetensors and without remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from sam4mllm_tool.errors import CheckpointError, DeviceOutOfMemory


def load_whole(auto_class: Any, name: str, device: torch.device) -> Any:
    """A model in float32, each weight loaded directly onto the device.

    Args:
        auto_class: a class of transformers with ``from_pretrained``.
        name: directory or hub id.
        device: where the model goes.

    Raises:
        CheckpointError: weights of the model are missing or have another shape.
    """
    model, report = auto_class.from_pretrained(
        name,
        dtype=torch.float32,
        device_map=device,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    lacking = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    if lacking:
        raise CheckpointError(
            f"{name!r} lacks weights of its model: {', '.join(lacking[:3])} …",
            hint="The checkpoint is incomplete or of another architecture; download it again.",
        )
    return model


@contextmanager
def loading(what: str, name: str, hint: str) -> Iterator[None]:
    """Convert loading errors to ours, and keep transformers from printing to the terminal.

    Args:
        what: what is loaded, for messages.
        name: directory or hub id.
        hint: what could be loaded instead.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of the wrong kind.
        DeviceOutOfMemory: the device is too small for it.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemory(
            f"the device has too little memory for {name!r}: {error}",
            hint="Use a smaller checkpoint, dtype='bfloat16', or device='cpu'.",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"the {what} {name!r} cannot be loaded: {str(error)[:300]}", hint=hint
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
