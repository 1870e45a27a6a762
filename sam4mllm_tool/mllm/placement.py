"""Where and how weights are held, and whether weights and caches fit there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from sam4mllm_tool.devices import choose_device
from sam4mllm_tool.errors import CheckpointError, DeviceOutOfMemory
from sam4mllm_tool.mllm import files

_HEADROOM = 1.15
"""Activations and workspaces on top of the weights."""
USUAL_CACHE = 4 << 30
"""Bytes of keys and values to keep where the device has room for them."""


@dataclass(frozen=True)
class Placement:
    """Where and how weights are held.

    Attributes:
        device: where inputs go, and the weights unless ``device_map`` spreads them.
        dtype: of weights and activations.
        quantization: ``"4bit"`` or ``"8bit"`` (bitsandbytes), ``None`` for plain weights.
        device_map: as in transformers, ``"auto"`` to spread over several devices.
        attn_implementation: as in transformers, ``None`` for its default.
    """

    device: torch.device
    dtype: torch.dtype
    quantization: str | None = None
    device_map: Any = None
    attn_implementation: str | None = None


def choose_placement(
    device: str,
    dtype: str,
    *,
    quantization: str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> Placement:
    """CUDA before MPS before CPU; a 16-bit dtype that the device supports, or float32.

    Raises:
        CheckpointError: a device, dtype or quantization this machine does not have.
    """
    if quantization not in (None, "4bit", "8bit"):
        raise CheckpointError(
            f"unknown quantization {quantization!r}", hint="Use '4bit', '8bit' or None."
        )
    chosen = choose_device(device)
    kind = usual_dtype(chosen) if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise CheckpointError(
            f"unknown dtype {dtype!r}", hint="Use 'auto', 'float32', 'bfloat16' or 'float16'."
        )
    return Placement(chosen, kind, quantization, device_map, attn_implementation)


def usual_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device supports it, else float16, and float32 on a CPU.

    Checkpoints are trained in bfloat16, whose range float16 does not have; but GPUs before Ampere
    only emulate it, and MPS supports it from macOS 14 on.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        native = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        return torch.float32
    return torch.bfloat16 if native else torch.float16


def weight_bytes(folder: Path, placement: Placement) -> int:
    """Bytes that the weights will take on the device, from the safetensors headers alone.

    Raises:
        CheckpointError: weights missing, truncated or not safetensors.
    """
    whole = placement.dtype.itemsize
    quantized = {"4bit": 0.56, "8bit": 1.06}.get(placement.quantization or "", whole)
    return files.weight_bytes(folder, quantized, whole)


def cache_room(folder: Path, placement: Placement, wanted: int | None, reserve: int = 0) -> int:
    """The bound on kept keys and values; dialogues in progress get the same bound once more.

    Args:
        folder: a checkpoint.
        placement: where its weights will be.
        wanted: the bound that the user gave; ``None`` for :data:`USUAL_CACHE`, or less where
            the device is small.
        reserve: bytes on the device that the caches must leave to others.

    Raises:
        CheckpointError: weights missing, truncated or not safetensors.
        DeviceOutOfMemory: weights and caches take more than the device has free.
    """
    free = _free_bytes(placement.device)
    if free is None or placement.device_map is not None:  # spread over devices, or offloaded
        return USUAL_CACHE if wanted is None else wanted
    weights = weight_bytes(folder, placement)
    left = free - int(weights * _HEADROOM)
    if wanted is None and left >= 0:
        return min(USUAL_CACHE, max(0, left - reserve) // 4)
    if wanted is not None and left >= 2 * wanted + reserve:
        return wanted
    parts = [f"the weights take {weights / 1e9:.1f} GB in {placement.dtype}"]
    parts += [f"the caches up to {2 * wanted / 1e9:.1f} GB"] if wanted else []
    raise too_small(f"{', '.join(parts)}, {placement.device} has {free / 1e9:.1f} GB free")


def too_small(message: str) -> DeviceOutOfMemory:
    """The error for weights or caches that do not fit, with what to do."""
    return DeviceOutOfMemory(
        message,
        hint="Use quantization='4bit', dtype='bfloat16', device_map='auto', less cache_bytes or a "
        "smaller model.",
    )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
