"""Checkpoints to resume from; an incomplete one, as a full disk leaves it, is never used."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sam4mllm_tool.errors import StorageError

_log = logging.getLogger(__name__)
FULL = ("No space left", "inline_container.cc", "iostream error")
"""Words in the errors of PyTorch's and safetensors' writers on a full disk, as observed."""
NEEDED = ("trainer_state.json", "adapter_model.safetensors")


def last_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint; ``None`` if there is none.

    Incomplete ones, which a kill or a full disk leaves, are named in a warning and moved aside, so
    that they do not count among the checkpoints that are kept.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name[11:])):
        damage = torn(path)
        if damage is None:
            return path
        _log.warning("%s is incomplete (%s); continuing from the one before", path, damage)
        if os.environ.get("RANK", "0") == "0":
            path.rename(path.with_name(f"torn-{path.name}"))
    return None


def torn(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, ``None`` if nothing is.

    transformers writes ``trainer_state.json`` last; PyTorch's files are archives with a checksum
    for each part, and safetensors knows its length.
    """
    for name in NEEDED:
        if not (checkpoint / name).exists():
            return f"{name} is missing"
    for path in sorted(checkpoint.rglob("*")):
        try:
            match path.suffix:
                case ".json":
                    json.loads(path.read_bytes())
                case ".safetensors":
                    with safe_open(path, framework="pt"):
                        pass
                case ".pt" | ".pth" | ".bin":
                    with zipfile.ZipFile(path) as archive:
                        if archive.testzip() is not None:
                            return f"{path.name} is damaged"
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name}: {error}"
    return None


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Failures to write a checkpoint or an adapter, as a typed error.

    Raises:
        StorageError: the disk is full or cannot be written (PyTorch and safetensors raise errors
            of their own for that).
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        message = str(error)
        if not isinstance(error, OSError) and not any(words in message for words in FULL):
            raise
        raise StorageError(
            f"{folder} cannot be written: {message.splitlines()[0]}",
            hint="Make room, then continue with --resume: an incomplete checkpoint is skipped.",
        ) from error
