"""A checkpoint's files: found on disk or fetched from the hub, and whole."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils.tqdm import tqdm
from safetensors import SafetensorError, safe_open

from sam4mllm_tool.catalogue import is_hub_id, nearest_checkpoint
from sam4mllm_tool.concurrency import check_cancelled, stage
from sam4mllm_tool.errors import CheckpointError

HUB_PATIENCE = 60.0
"""Seconds without a byte from the hub after which a download is given up."""
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_log = logging.getLogger(__name__)


def find_checkpoint(name: str) -> Path:
    """A directory as given, or a hub id's files (safetensors only) from the hub or its cache.

    Raises:
        CheckpointError: neither a directory nor a hub id that can be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(name):
        raise CheckpointError(
            f"no checkpoint directory at {name!r}",
            hint=f"{nearest_checkpoint(name)}Give the directory that holds config.json and "
            "*.safetensors, or a hub id.",
        )
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    """Download in a separate thread, which is abandoned if the hub sends nothing any more."""
    _log.info("fetching %s from the hub", name)
    stage("download")
    progress, found = _Progress(), _Found()

    def fetch() -> None:
        try:
            folder = huggingface_hub.snapshot_download(
                name,
                allow_patterns=_HUB_FILES,
                etag_timeout=HUB_PATIENCE,
                tqdm_class=progress.bar_class,
            )
            found.folder = Path(folder)
        except Exception as error:  # the libraries raise many kinds; all are reported alike
            found.error = error
        finally:
            found.done.set()

    threading.Thread(target=fetch, name=f"download {name}", daemon=True).start()
    while not found.done.wait(min(0.1, HUB_PATIENCE)):
        check_cancelled()
        if progress.silence > HUB_PATIENCE:
            found.error = TimeoutError(f"no answer within {HUB_PATIENCE:.0f} seconds")
            break
    if found.folder is None:
        raise CheckpointError(
            f"checkpoint {name!r} is neither a local directory nor on the Hub: {found.error}",
            hint=f"{nearest_checkpoint(name)}Check the spelling and the network, or download it "
            "first and give the path.",
        ) from found.error
    return found.folder


class _Found:
    """The result of a download thread."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.folder: Path | None = None
        self.error: Exception | None = None


class _Progress:
    """How long ago a download last made progress; tqdm draws its bars as usual."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        moved = self._moved

        class Bar(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                moved()
                return super().update(n)

        self.bar_class = Bar

    def _moved(self) -> None:
        self._last = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last byte."""
        return time.monotonic() - self._last


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file.

    Raises:
        CheckpointError: the file is cut short or damaged.
    """
    if not file.is_file():
        return {}
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, error) from error
    return contents if isinstance(contents, dict) else {}


def check_texts(folder: Path) -> None:
    """Make sure that every JSON file of a checkpoint can be read whole.

    Libraries that read half a file raise errors that do not name it.

    Raises:
        CheckpointError: one cannot be read; it is named.
    """
    for file in sorted(folder.glob("*.json")):
        read_json(file)


def weight_bytes(folder: Path, per_value: float, small: int) -> int:
    """Bytes that the weights will take, from the safetensors headers alone.

    Args:
        folder: a checkpoint.
        per_value: bytes per number of a matrix (less than one where it is quantized).
        small: bytes per number of a vector; only matrices are quantized.

    Raises:
        CheckpointError: weights missing, truncated or not safetensors.
    """
    total = 0.0
    for shape, dtype in whole_weights(_weight_files(folder)):
        size: float = _BYTES.get(dtype, 1)
        if dtype.startswith(("F", "BF")):
            size = small if len(shape) < 2 else per_value
        total += math.prod(shape) * size
    return int(total)


def whole_weights(files: list[Path]) -> list[tuple[list[int], str]]:
    """(shape, dtype) of every tensor.

    Raises:
        CheckpointError: a file is missing, cut short or not safetensors.
    """
    found = []
    for file in files:
        if not file.is_file():
            begun = ", ".join(other.name for other in _parts_of(file))
            raise CheckpointError(
                f"{file} is missing" + (f"; there is {begun}" if begun else ""),
                hint="Only safetensors weights are read; download the whole checkpoint.",
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    part = tensors.get_slice(name)
                    found.append((part.get_shape(), part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise _damaged(index, ValueError("it has no weight_map of file names"))
        return [folder / Path(name).name for name in sorted(set(names.values()))]
    return [folder / "model.safetensors"]


def _parts_of(file: Path) -> Iterator[Path]:
    """Files that an unfinished download of ``file`` leaves behind."""
    for pattern in (f"{file.name}.*", f"*{file.stem}*.incomplete", "*.crdownload"):
        yield from file.parent.glob(pattern)


def _damaged(file: Path, error: Exception) -> CheckpointError:
    if file.stat().st_size < 1024 and b"git-lfs" in file.read_bytes():
        return CheckpointError(
            f"{file} is a Git LFS pointer, not the file itself",
            hint="Run 'git lfs pull' in the folder.",
        )
    return CheckpointError(
        f"{file} is damaged: {error}", hint=f"Download {file.name} of the checkpoint again."
    )
