"""Workspaces on disk: what is behind the handles outlives the process, even ``kill -9``.

A record (an image or an object) is a row of a SQLite database; pixels and logits are files named
after their content, written before the row that refers to them. Nothing is pickled.

Several processes of one machine may share a folder. (Of several machines they may not: SQLite's
write-ahead log needs memory that all of them see.) Handles are numbered by the database, and a
record that another process has changed is noticed by its version.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
CREATE TABLE IF NOT EXISTS answers (
    workspace TEXT, call TEXT, used REAL, answer TEXT, PRIMARY KEY (workspace, call)
);
"""
_ANSWER = "SELECT answer FROM answers WHERE workspace = ? AND call = ?"
_SECONDS_FOR_OTHERS = 60.0
_PRUNE_EVERY = 200
_SECRET_BYTES = 32


class StateStore:
    """A folder that holds workspaces; processes of one machine may share it.

    Args:
        folder: is made if it does not exist.
        max_bytes: bound on pixels and logits; what was written longest ago is dropped first.
        max_age_seconds: how long a record, or a call's answer, is kept after it was last written.

    Raises:
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
        self._writes = 0
        with self._typed():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self._database_file,
                check_same_thread=False,
                isolation_level=None,
                timeout=_SECONDS_FOR_OTHERS,
            )
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
        """Close the database."""
        self._database.close()

    def workspace(self, key: str) -> WorkspaceState:
        """The part that belongs to one workspace."""
        return WorkspaceState(self, key)

    def secret(self, name: str) -> bytes:
        """32 random bytes that stay the same as long as the folder does."""
        path = self.folder / name
        lock = path.with_name(f"{name}.lock")
        with self._typed(), exclusive(lock, str(path), wait=True):
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
                for table in ("records", "answers"):
                    run(f"DELETE FROM {table} WHERE used < ?", now - self._max_age_seconds)
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
        """Remove those of the files that no record needs any more; after the commit.

        In a transaction of its own, so that no other process begins to need one meanwhile.
        """
        if not names:
            return
        with self._transaction() as run:
            for name in names:
                if not run("SELECT 1 FROM blobs WHERE name = ?", name).fetchone():
                    self._blob_path(name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove files that a killed process wrote without their row."""
        with self._transaction() as run:
            needed = {name for (name,) in run("SELECT DISTINCT name FROM blobs")}
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

    def write(self, rows: Sequence[Row], answer: Answer | None = None) -> str | None:
        """Keep records with the bytes they need, and the answer of the call that made them.

        All is kept or nothing: nothing too if that call has an answer already, from a process that
        was asked the same before.

        Returns:
            The answer the call had already; ``None`` if the records are kept.

        Raises:
            StorageError: the disk is full, or the folder was removed.
        """
        with self._lock:
            self._check_folder()
            former: list[str] = []
            with self._transaction() as run:  # keeps prune() from files without a row yet
                if answer:
                    known = run(_ANSWER, answer.workspace, answer.call).fetchone()
                    if known:
                        return str(known[0])
                    run(
                        "INSERT INTO answers VALUES (?, ?, ?, ?)",
                        *(answer.workspace, answer.call, time.time(), answer.text),
                    )
                for row in rows:
                    former += self._write_row(run, row)
            self._remove_unneeded(former)
            self._writes += len(rows)
            if self._writes >= _PRUNE_EVERY:
                self._writes = 0
                self.prune()
        return None

    def next_number(self, workspace: str, kind: str, after: int) -> int:
        """A number for a handle of ``kind`` that no process has given out, above ``after``."""
        with self._transaction() as run:
            run("INSERT OR IGNORE INTO workspaces VALUES (?, 0, 0)", workspace)
            (number,) = run(
                f"UPDATE workspaces SET {kind} = MAX({kind}, ?) + 1 WHERE key = ? RETURNING {kind}",
                *(after, workspace),
            ).fetchone()
            return int(number)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Answers to a query."""
        with self._transaction() as run:
            return list(run(query, *values).fetchall())

    def _write_row(self, run: Any, row: Row) -> list[str]:
        """Write it, and give the names of the files that it no longer needs."""
        for blob in row.blobs:
            self._write_blob(blob)
        run(
            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(row.workspace, row.handle, row.kind, row.number, row.image),
            *(row.version, row.data),
        )
        of_record = "FROM blobs WHERE workspace = ? AND handle = ?"
        former = [name for (name,) in run(f"SELECT name {of_record}", row.workspace, row.handle)]
        run(f"DELETE {of_record}", row.workspace, row.handle)
        for blob in row.blobs:
            values = row.workspace, row.handle, _blob_name(blob), len(blob)
            run("INSERT INTO blobs VALUES (?, ?, ?, ?)", *values)
        return former

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
class Row:
    """A record as it is kept, with the bytes it needs.

    Attributes:
        version: when it was made (Unix time); tells its values apart.
    """

    workspace: str
    handle: str
    kind: str
    number: int
    image: str
    data: str
    blobs: tuple[bytes, ...] = ()
    version: float = field(default_factory=lambda: time.time())


@dataclass(frozen=True)
class Answer:
    """What a call was answered, as text."""

    workspace: str
    call: str
    text: str


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

    def next_number(self, kind: str, after: int) -> int:
        """A number for a handle, see :meth:`StateStore.next_number`."""
        return self._store.next_number(self._key, kind, after)

    def version(self, handle: str) -> float | None:
        """Tells whether a record has changed; ``None`` if it is not kept."""
        found = self._store.rows(
            "SELECT used FROM records WHERE workspace = ? AND handle = ?", self._key, handle
        )
        return found[0][0] if found else None

    def answer(self, call: str) -> str | None:
        """What a call was answered before."""
        found = self._store.rows(_ANSWER, self._key, call)
        return found[0][0] if found else None

    def write(self, rows: Sequence[Row], call: str = "", answer: str = "") -> str | None:
        """Keep records, and a call's answer with them; see :meth:`StateStore.write`."""
        return self._store.write(rows, Answer(self._key, call, answer) if call else None)

    def image_row(self, record: ImageRecord) -> Row:
        """An image as it is kept."""
        buffer = BytesIO()
        record.image.pil.save(buffer, "PNG", compress_level=1)
        png = buffer.getvalue()
        data = {"source": record.source, "notes": record.notes, "pixels": _blob_name(png)}
        number = int(record.image_id.partition("_")[2])
        text, digest = json.dumps(data), record.image.digest
        return Row(self._key, record.image_id, "img", number, digest, text, (png,))

    def object_row(self, record: ObjectRecord) -> Row:
        """An object, or its new value, as it is kept."""
        data = _object_data(record)
        blobs: tuple[bytes, ...] = ()
        if record.drawn is not None and record.drawn.logits is not None:
            buffer = BytesIO()
            np.save(buffer, record.drawn.logits, allow_pickle=False)
            blobs = (buffer.getvalue(),)
            data["drawn"] = {
                "predicted_iou": record.drawn.predicted_iou,
                "logits": _blob_name(blobs[0]),
            }
        text = json.dumps(data)
        return Row(self._key, record.object_id, "obj", record.number, record.image_id, text, blobs)

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
