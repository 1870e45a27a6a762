"""Workspaces on disk: what is behind the handles outlives the process, even ``kill -9``.

A record (an image or an object) is a row of a SQLite database; pixels and logits are files named
after their content, written before the row that refers to them. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam4mllm_tool.disk import exclusive, storing
from sam4mllm_tool.errors import StorageError
from sam4mllm_tool.pipeline.results import LocatedObject, Location, ScoredBox
from sam4mllm_tool.protocols import MaskCandidate, Turn
from sam4mllm_tool.tools.records import ImageRecord, ObjectRecord
from sam4mllm_tool.types import Box, Mask, PointLabel, PromptPoint, RgbImage, TargetCount

_SCHEMA = """
CREATE TABLE IF NOT EXISTS workspaces (
    key TEXT PRIMARY KEY, img INTEGER NOT NULL, obj INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS records (
    workspace TEXT, handle TEXT, kind TEXT, number INTEGER, image TEXT, used REAL, data TEXT,
    PRIMARY KEY (workspace, handle)
);
CREATE INDEX IF NOT EXISTS records_image ON records (workspace, kind, image);
CREATE TABLE IF NOT EXISTS blobs (
    workspace TEXT, handle TEXT, name TEXT, bytes INTEGER, PRIMARY KEY (workspace, handle, name)
);
CREATE INDEX IF NOT EXISTS blobs_name ON blobs (name);
"""
_PRUNE_EVERY = 200
_SECRET_BYTES = 32


class StateStore:
    """A folder that holds workspaces. One process at a time uses it.

    Args:
        folder: is made if it does not exist.
        max_bytes: bound on pixels and logits; what was written longest ago is dropped first.
        max_age_seconds: how long a record is kept after it was last written.

    Raises:
        InputError: another process uses the folder.
        StorageError: the folder cannot be written, or its database is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int = 10 * 1024**3,
        max_age_seconds: float = 7 * 86_400,
    ) -> None:
        self.folder = Path(folder)
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._lock = threading.RLock()
        self._held = ExitStack()
        self._writes = 0
        self._held.enter_context(exclusive(self.folder / "lock", f"the state in {self.folder}"))
        with self._typed():
            self._database = sqlite3.connect(
                self._database_file, check_same_thread=False, isolation_level=None
            )
            self._held.callback(self._database.close)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(_SCHEMA)
            self._inode = self._database_file.stat().st_ino
        self.prune()
        self._sweep()

    @property
    def _database_file(self) -> Path:
        return self.folder / "state.sqlite"

    def close(self) -> None:
        """Let another process use the folder."""
        self._held.close()

    def workspace(self, key: str) -> WorkspaceState:
        """The part that belongs to one workspace."""
        return WorkspaceState(self, key)

    def secret(self, name: str) -> bytes:
        """32 random bytes that stay the same as long as the folder does."""
        path = self.folder / name
        with self._typed():
            known = path.read_bytes() if path.exists() else b""
            if len(known) == _SECRET_BYTES:
                return known
            path.unlink(missing_ok=True)  # cut short by a full disk
            fresh = secrets.token_bytes(_SECRET_BYTES)
            path.touch(0o600)
            path.write_bytes(fresh)
            return fresh

    def prune(self) -> None:
        """Drop records that are too old or too many, and files that no record needs."""
        now = time.time()
        with self._lock:
            with self._transaction() as run:
                # Times from before the clock was set back would keep a record for too long.
                run("UPDATE records SET used = ?1 WHERE used > ?1", now)
                run("DELETE FROM records WHERE used < ?", now - self._max_age_seconds)
                self._drop_oldest(run)
                unneeded = (
                    "FROM blobs WHERE NOT EXISTS (SELECT 1 FROM records r WHERE "
                    "r.workspace = blobs.workspace AND r.handle = blobs.handle)"
                )
                names = [name for (name,) in run(f"SELECT DISTINCT name {unneeded}")]
                run(f"DELETE {unneeded}")
            self._remove_unneeded(names)

    def _drop_oldest(self, run: Any) -> None:
        (total,) = run("SELECT COALESCE(SUM(bytes), 0) FROM blobs").fetchone()
        oldest = run(  # rows are numbered as they are written, whatever the clock does
            "SELECT r.workspace, r.handle, COALESCE(SUM(b.bytes), 0) FROM records r "
            "LEFT JOIN blobs b USING (workspace, handle) GROUP BY 1, 2 ORDER BY r.rowid"
        ).fetchall()
        for workspace, handle, size in oldest:
            if total <= self._max_bytes:
                break
            run("DELETE FROM records WHERE workspace = ? AND handle = ?", workspace, handle)
            total -= size

    def _remove_unneeded(self, names: list[str]) -> None:
        """Remove those of the files that no record needs any more; after the commit."""
        for name in names:
            with self._typed():
                if not self._database.execute(
                    "SELECT 1 FROM blobs WHERE name = ?", (name,)
                ).fetchone():
                    self._blob_path(name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove files that a killed process wrote without their row."""
        needed = {name for (name,) in self.rows("SELECT DISTINCT name FROM blobs")}
        with self._typed():
            for path in self.folder.glob("blobs/*/*"):
                if path.name not in needed:
                    path.unlink(missing_ok=True)

    def read_blob(self, name: str) -> bytes:
        """The bytes of that name.

        Raises:
            StorageError: the file is missing or damaged.
        """
        with self._typed():
            data = self._blob_path(name).read_bytes()
        if _blob_name(data) != name:
            raise StorageError(f"{self._blob_path(name)} is damaged", retryable=False)
        return data

    def write(self, row: _Row, numbers: dict[str, int], blobs: list[bytes]) -> None:
        """Keep a record with the bytes it needs, all or nothing.

        Raises:
            StorageError: the disk is full, or the folder was removed.
        """
        with self._lock:  # keeps prune() from files without a row yet
            self._check_folder()
            with self._transaction() as run:
                for blob in blobs:
                    self._write_blob(blob)
                run(
                    "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
                    *(row.workspace, row.handle, row.kind, row.number, row.image),
                    *(time.time(), row.data),
                )
                of_record = "FROM blobs WHERE workspace = ? AND handle = ?"
                former = list(run(f"SELECT name {of_record}", row.workspace, row.handle))
                run(f"DELETE {of_record}", row.workspace, row.handle)
                for blob in blobs:
                    values = row.workspace, row.handle, _blob_name(blob), len(blob)
                    run("INSERT INTO blobs VALUES (?, ?, ?, ?)", *values)
                run(
                    "INSERT INTO workspaces VALUES (?1, ?2, ?3) ON CONFLICT (key) DO UPDATE SET "
                    "img = MAX(img, ?2), obj = MAX(obj, ?3)",
                    *(row.workspace, numbers["img"], numbers["obj"]),
                )
            self._remove_unneeded([name for (name,) in former])
            self._writes += 1
            if self._writes % _PRUNE_EVERY == 0:
                self.prune()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Answers to a query."""
        with self._transaction() as run:
            return list(run(query, *values).fetchall())

    def _write_blob(self, data: bytes) -> None:
        path = self._blob_path(_blob_name(data))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".part")
            try:
                scratch.write_bytes(data)
                scratch.replace(path)
            finally:
                scratch.unlink(missing_ok=True)

    def _check_folder(self) -> None:
        """A database that was deleted can still be written to, but nobody will find it again."""
        try:
            there = self._database_file.stat().st_ino == self._inode
        except OSError:
            there = False
        if not there:
            raise StorageError(
                f"the state in {self.folder} was removed while it was in use",
                hint="Restart the server: its handles from before are lost.",
                retryable=False,
            )

    def _blob_path(self, name: str) -> Path:
        return self.folder / "blobs" / name[:2] / name

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self._lock, self._typed():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield lambda query, *values: self._database.execute(query, values)
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite has rolled back if its disk is full
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            with storing(self.folder):
                yield
        except sqlite3.Error as error:
            raise StorageError(
                f"the state in {self.folder} cannot be used: {error}",
                hint="Make room, or move the folder away if its database is damaged.",
            ) from error


@dataclass(frozen=True)
class _Row:
    workspace: str
    handle: str
    kind: str
    number: int
    image: str
    data: str


class WorkspaceState:
    """The records of one workspace; see :class:`StateStore`."""

    def __init__(self, store: StateStore, key: str) -> None:
        self._store = store
        self._key = key

    def numbers(self) -> dict[str, int]:
        """The highest number that was given out, by kind of handle."""
        found = self._store.rows("SELECT img, obj FROM workspaces WHERE key = ?", self._key)
        img, obj = found[0] if found else (0, 0)
        return {"img": img, "obj": obj}

    def image_of(self, digest: str) -> str | None:
        """The handle of the image with those pixels."""
        found = self._store.rows(
            "SELECT handle FROM records WHERE workspace = ? AND kind = 'img' AND image = ?",
            *(self._key, digest),
        )
        return found[0][0] if found else None

    def objects_of(self, image_id: str | None) -> list[str]:
        """Handles of the objects (of an image), oldest first."""
        found = self._store.rows(
            "SELECT handle FROM records WHERE workspace = ?1 AND kind = 'obj' "
            "AND (?2 IS NULL OR image = ?2) ORDER BY number",
            *(self._key, image_id),
        )
        return [handle for (handle,) in found]

    def write_image(self, record: ImageRecord, numbers: dict[str, int]) -> None:
        """Keep an image."""
        buffer = BytesIO()
        record.image.pil.save(buffer, "PNG", compress_level=1)
        png = buffer.getvalue()
        data = {"source": record.source, "notes": record.notes, "pixels": _blob_name(png)}
        number = int(record.image_id.partition("_")[2])
        row = _Row(self._key, record.image_id, "img", number, record.image.digest, json.dumps(data))
        self._store.write(row, numbers, [png])

    def write_object(self, record: ObjectRecord, numbers: dict[str, int]) -> None:
        """Keep an object, or its new value."""
        data, blobs = _object_data(record), []
        if record.drawn is not None and record.drawn.logits is not None:
            buffer = BytesIO()
            np.save(buffer, record.drawn.logits, allow_pickle=False)
            blobs = [buffer.getvalue()]
            data["drawn"] = {
                "predicted_iou": record.drawn.predicted_iou,
                "logits": _blob_name(blobs[0]),
            }
        text = json.dumps(data)
        row = _Row(self._key, record.object_id, "obj", record.number, record.image_id, text)
        self._store.write(row, numbers, blobs)

    def image(self, handle: str) -> ImageRecord | None:
        """The image of that handle, if it is kept."""
        data = self._data(handle, "img")
        if data is None:
            return None
        pixels = Image.open(BytesIO(self._store.read_blob(data["pixels"])), formats=["PNG"])
        return ImageRecord(
            handle, RgbImage.from_pil(pixels.convert("RGB")), data["source"], tuple(data["notes"])
        )

    def object(self, handle: str) -> ObjectRecord | None:
        """The object of that handle, if it is kept."""
        data = self._data(handle, "obj")
        if data is None:
            return None
        record = _object(data)
        if data.get("drawn"):
            blob = BytesIO(self._store.read_blob(data["drawn"]["logits"]))
            logits = np.load(blob, allow_pickle=False)
            assert record.mask is not None
            drawn = MaskCandidate(record.mask, logits, data["drawn"]["predicted_iou"])
            record = replace(record, drawn=drawn)
        return record

    def _data(self, handle: str, kind: str) -> dict[str, Any] | None:
        found = self._store.rows(
            "SELECT data FROM records WHERE workspace = ? AND handle = ? AND kind = ?",
            *(self._key, handle, kind),
        )
        return json.loads(found[0][0]) if found else None


def _blob_name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _object_data(record: ObjectRecord) -> dict[str, Any]:
    """An object without its logits, JSON-ready."""
    bare = replace(record, drawn=None, mask=None, location=None)
    data = asdict(bare)
    data["mask"] = record.mask.to_rle() if record.mask else None
    data["location"] = asdict(replace(record.location, image=None)) if record.location else None
    return data


def _object(data: dict[str, Any]) -> ObjectRecord:
    values = {key: value for key, value in data.items() if key != "drawn"}
    return ObjectRecord(
        **{
            **values,
            "box": Box(*data["box"]),
            "location": _location(data["location"]) if data["location"] else None,
            "points": _points(data["points"]),
            "mask": Mask.from_rle(data["mask"]) if data["mask"] else None,
        }
    )


def _location(data: dict[str, Any]) -> Location:
    return Location(
        **{
            **data,
            "count": TargetCount(data["count"]),
            "dialogue": tuple(Turn(**turn) for turn in data["dialogue"]),
            "objects": tuple(map(_located, data["objects"])),
            "notes": tuple(data["notes"]),
        }
    )


def _located(data: dict[str, Any]) -> LocatedObject:
    alternates = [ScoredBox(**{**other, "box": Box(*other["box"])}) for other in data["alternates"]]
    return LocatedObject(
        **{
            **data,
            "box": Box(*data["box"]),
            "alternates": tuple(alternates),
            "points": _points(data["points"]),
        }
    )


def _points(data: list[dict[str, Any]]) -> tuple[PromptPoint, ...]:
    return tuple(PromptPoint(**{**one, "label": PointLabel(one["label"])}) for one in data)
