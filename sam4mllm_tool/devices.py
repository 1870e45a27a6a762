"""Which device a model runs on, for MLLMs and segmenters alike."""

from __future__ import annotations

import torch

from sam4mllm_tool.errors import CheckpointError


def choose_device(device: str) -> torch.device:
    """``"auto"``: CUDA before MPS before CPU; else the torch device of that name.

    Raises:
        CheckpointError: a device this machine does not have.
    """
    try:
        chosen = torch.device(_best_device() if device == "auto" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"device {device!r} cannot be used: {error}", hint="Use device='auto' or 'cpu'."
        ) from error
    return chosen


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
