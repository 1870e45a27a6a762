"""The pictures of a batch: in a folder, in a list (JSON lines or Parquet), or in an object store.

Object stores are reached by fsspec: ``s3://``, ``gs://``, ``hf://`` and others, each with its own
package; ``file://`` and ``memory://`` need none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from sam4mllm_tool.errors import ImageError, InputError, StorageError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.images.sources import PICTURES, pictures_below
from sam4mllm_tool.types import RgbImage

T = TypeVar("T")

_LISTS = (".jsonl", ".parquet")
_ATTEMPTS = 4
_FIRST_WAIT_SECONDS = 0.5
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Batch:
    """Pictures by name.

    Attributes:
        root: what the names are relative to: a folder's path or URL.
        names: of the pictures, in order: paths below the root, or whole paths and URLs.
        expressions: by name, from a list that holds them.
    """

    root: str
    names: tuple[str, ...]
    expressions: Mapping[str, Sequence[str]] | None = None

    def open(self, name: str, policy: ImagePolicy | None = None) -> RgbImage:
        """The picture of that name; see :func:`open_picture`."""
        return open_picture(self.root, name, policy)


def open_picture(root: str, name: str, policy: ImagePolicy | None = None) -> RgbImage:
    """A picture of a batch.

    Args:
        root, name: see :class:`Batch`.
        policy: limits on the picture.

    Raises:
        ImageError: it is missing, or not a picture we can read.
        StorageError: the store does not answer, after a few attempts.
    """
    if not _is_url(root) and not _is_url(name):
        return load_image(Path(root) / name, policy).image
    address = name if _is_url(name) else f"{root.rstrip('/')}/{name}"
    policy = policy or ImagePolicy()

    def read() -> bytes:
        with fsspec.open(address, "rb") as file:
            data: bytes = file.read(policy.max_bytes + 1)
            return data

    try:
        data = _patiently(read, address)
    except _GONE as error:
        raise ImageError(f"There is no {address}.", hint="Check the name.") from error
    return load_image(data, policy).image


def read_batch(source: str) -> Batch:
    """The pictures of a folder (searched through), or of a list.

    Args:
        source: path or URL of a folder, or of a ``.jsonl`` or ``.parquet`` file whose rows hold
            ``picture`` (a path relative to the file, or a URL) and, if it is to say so,
            ``expressions`` (a text or a list of them).

    Raises:
        InputError: there is no such folder or list, it holds no pictures, or it is malformed.
        StorageError: the store does not answer, after a few attempts.
    """
    if source.endswith(_LISTS):
        return _read_list(source)
    if not _is_url(source):
        folder = Path(source)
        names = [path.relative_to(folder).as_posix() for path in pictures_below(folder)]
        return Batch(str(folder.resolve()), tuple(names))

    def find() -> list[str]:
        store, path = fsspec.url_to_fs(source)
        prefix = path.rstrip("/") + "/"
        return [found.removeprefix(prefix) for found in store.find(path)]

    found = sorted(n for n in _patiently(find, source) if Path(n).suffix.lower() in PICTURES)
    if not found:
        raise InputError(f"{source} holds no pictures", hint="Give a folder with pictures.")
    return Batch(source, tuple(found))


def _read_list(source: str) -> Batch:
    def read() -> bytes:
        with fsspec.open(source, "rb") as file:
            data: bytes = file.read()
            return data

    try:
        rows = _rows(source, _patiently(read, source))
    except _GONE as error:
        raise InputError(f"there is no {source}", hint="Check the path.") from error
    expressions: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        texts = row.get("expressions") or []
        texts = [texts] if isinstance(texts, str) else list(texts)
        name = row.get("picture")
        if not isinstance(name, str) or not name or not all(isinstance(t, str) for t in texts):
            raise InputError(
                f"{source}, row {number} names no picture, or its expressions are no texts",
                hint='Rows are {"picture": "a.jpg", "expressions": ["the dog"]}.',
            )
        expressions.setdefault(name, []).extend(texts)
    if not expressions:
        raise InputError(f"{source} is empty", hint="Write a row for each picture.")
    stated = expressions if any(expressions.values()) else None
    root = source.rpartition("/")[0] if _is_url(source) else str(Path(source).resolve().parent)
    return Batch(root, tuple(expressions), stated)


def _rows(source: str, data: bytes) -> list[dict[str, Any]]:
    if source.endswith(".parquet"):
        return _parquet_rows(source, data)
    try:
        rows = [json.loads(line) for line in data.splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(
            f"{source} is not JSON lines: {error}", hint="One object a line."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{source} is not JSON lines of objects", hint="One object a line.")
    return rows


def _parquet_rows(source: str, data: bytes) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            "Parquet needs PyArrow", hint='Run: pip install "sam4mllm-tool[eval]"'
        ) from error
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise InputError(f"{source} is not Parquet: {error}", hint="Write it again.") from error
    wanted = [name for name in ("picture", "expressions") if name in table.column_names]
    rows: list[dict[str, Any]] = table.select(wanted).to_pylist()
    return rows


def _patiently(work: Callable[[], T], address: str) -> T:
    """What ``work`` gives, after a few attempts where the store does not answer.

    Raises:
        StorageError: it never did.
        OSError: there is no such file: that is for the caller.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return work()
        except _GONE:
            raise
        except (ImportError, ValueError) as error:  # no package for it, or no such protocol
            raise InputError(
                f"{address} cannot be opened: {error}", hint="Check the URL."
            ) from error
        except Exception as error:  # each store has errors of its own
            failure = error
        time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
    raise StorageError(
        f"{address} cannot be read after {_ATTEMPTS} attempts: {failure}",
        hint="When the store answers again, run the same command: it continues.",
    ) from failure


def _is_url(text: str) -> bool:
    return "://" in text[:32]
