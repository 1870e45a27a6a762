"""Checkpoint files of ``segment_anything`` models: reading tensors and assigning them to a model.

Tensors go from the file to their device one by one and become the model's own (the model is built
without allocating memory, on torch's "meta" device), so host memory never holds a second copy.
Code in a file is never run.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from segment_anything.modeling import Sam
from torch import Tensor

from sam4mllm_tool.catalogue import nearest_checkpoint
from sam4mllm_tool.errors import CheckpointError, DeviceOutOfMemory

Weights = dict[str, Tensor]

WRAPPERS = ("model", "state_dict")
"""Keys under which training scripts store a state dict."""
_PIXEL_MEAN = (123.675, 116.28, 103.53)
_PIXEL_STD = (58.395, 57.12, 57.375)
_NOT_THE_FILE = (b"<", b"version https://git-lfs")
_HINT_DAMAGED = "The file is damaged or was not fully downloaded; download it again."
_HINT_FIT = "Give the file that belongs to this model; download a truncated file again."


def read_weights(path: Path, device: torch.device) -> Weights:
    """The tensors of a ``.pt``, ``.pth`` or ``.safetensors`` file, on ``device``.

    Raises:
        CheckpointError: missing, truncated, or containing code or anything but tensors.
        DeviceOutOfMemory: the device is too small for it.
    """
    if not path.is_file():
        raise CheckpointError(
            f"no SAM checkpoint at {str(path)!r}",
            hint=f"{nearest_checkpoint(str(path))}Check the path.",
        )
    try:
        _check_beginning(path)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(device))
        content = torch.load(path, map_location=device, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise too_small(device, path.name, error) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} is corrupt or contains more than tensors, and code is never run from "
            "a checkpoint",
            hint="Convert it to safetensors with the tool that wrote it.",
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {str(error)[:300]}", hint=_HINT_DAMAGED
        ) from error
    return _state_dict(content, path.name)


def filled(build: Callable[[], Sam], weights: Weights, name: str) -> Sam:
    """The model that ``build`` makes, in float32 and with these weights as its own.

    Args:
        build: makes the model; it is called on the "meta" device.
        weights: all of the model's weights and nothing else, on their device.
        name: of the file, for messages.

    Raises:
        CheckpointError: weights are missing, have another shape, or do not belong to the model.
    """
    with torch.device("meta"):
        sam = build()
    _check_fit(weights, sam.state_dict(), name, whole=True)
    sam.load_state_dict({key: _float(value) for key, value in weights.items()}, assign=True)
    device = next(iter(weights.values())).device
    for buffer, values in (("pixel_mean", _PIXEL_MEAN), ("pixel_std", _PIXEL_STD)):
        value = torch.tensor(values, device=device).view(-1, 1, 1)
        sam.register_buffer(buffer, value, persistent=False)
    return sam.eval()


def overlay(sam: Sam, weights: Weights, name: str) -> None:
    """Replace weights of a part of the model (for example the mask decoder) in place.

    Keys may begin with ``model.``, as written by a training wrapper.

    Raises:
        CheckpointError: a weight that the model does not have, or one of another shape.
    """
    part = {key.removeprefix("model."): value for key, value in weights.items()}
    _check_fit(part, sam.state_dict(), name, whole=False)
    sam.load_state_dict({key: _float(value) for key, value in part.items()}, strict=False)


def too_small(device: torch.device, name: str, error: Exception) -> DeviceOutOfMemory:
    """The error for a device with too little memory for a checkpoint."""
    return DeviceOutOfMemory(
        f"{device} has too little memory for {name}: {error}",
        hint="Use a smaller checkpoint, or device='cpu'.",
    )


def shown(names: Iterable[str]) -> str:
    """The first three names, and how many there are in all."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" … ({len(names)} in all)" if len(names) > 3 else "")


def _check_beginning(path: Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(64).lstrip().lower()
    if beginning.startswith(_NOT_THE_FILE):
        raise CheckpointError(
            f"{path.name} is a web page or a Git LFS pointer, not the checkpoint",
            hint="Download the file itself, not a page that asks for a confirmation.",
        )


def _state_dict(content: Any, name: str) -> Weights:
    """The state dict, unwrapped if a training script stored it under a key."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{name} contains no state dict", hint=_HINT_FIT)
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{name} contains values that are not tensors: {shown(others)}", hint=_HINT_FIT
        )
    return dict(content)


def _check_fit(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str, *, whole: bool
) -> None:
    foreign = given.keys() - wanted.keys()
    lacking = wanted.keys() - given.keys() if whole else set()
    resized = {
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in given.keys() & wanted.keys()
        if given[key].shape != wanted[key].shape
    }
    for what, keys in (
        ("lacks weights of its model", lacking),
        ("has weights that its model does not have", foreign),
        ("has weights of another size", resized),
    ):
        if keys:
            raise CheckpointError(f"{name} {what}: {shown(keys)}", hint=_HINT_FIT)


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
