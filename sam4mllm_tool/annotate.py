"""Pictures (a folder, a list, an object store) and expressions → COCO JSON.

Each finished picture is one line of ``OUT.journal.jsonl``, written to disk at once; after a
kill, the same command continues with the pictures that have no line. The COCO file is built from
the journal, so nothing is lost or duplicated. Pictures that failed are listed, do not stop the run,
and are tried again by the next run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sam4mllm_tool.disk import exclusive, write_whole
from sam4mllm_tool.errors import DeviceOutOfMemory, DialogueError, InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.batches import Batch, open_picture, read_batch
from sam4mllm_tool.journal import open_journal, read_journal
from sam4mllm_tool.masks.coco import CocoPicture, coco_annotation, coco_document
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.types import TargetCount


@dataclass(frozen=True)
class Annotated:
    """The outcome of an annotation run.

    Attributes:
        document: the COCO JSON document.
        failures: picture (or "picture: expression") → what went wrong.
        done_before: pictures that an earlier run had finished.
    """

    document: dict[str, Any]
    failures: dict[str, str]
    done_before: int


@dataclass(frozen=True)
class Job:
    """One picture to annotate.

    Attributes:
        root, name: see :class:`~sam4mllm_tool.images.batches.Batch`.
        texts: the expressions, each once.
    """

    root: str
    name: str
    texts: tuple[str, ...]


class Engine(Protocol):
    """Who does the work: this process, or others."""

    @property
    def names(self) -> tuple[str, str]:
        """The MLLM's name and the segmenter's."""

    def annotate(
        self, jobs: Sequence[Job], count: TargetCount, policy: ImagePolicy | None
    ) -> Iterator[Sequence[dict[str, Any]]]:
        """The journal's entries of the pictures (:func:`annotate_picture`), in any order.

        Those that are done together come together.
        """


@dataclass(frozen=True)
class InThisProcess:
    """One picture after the other."""

    model: Sam4MLLM

    @property
    def names(self) -> tuple[str, str]:
        """The MLLM's name and the segmenter's."""
        return self.model.mllm.name, self.model.segmenter.name

    def annotate(
        self, jobs: Sequence[Job], count: TargetCount, policy: ImagePolicy | None
    ) -> Iterator[Sequence[dict[str, Any]]]:
        """The entries, one by one, in the order of the jobs."""
        return ([annotate_picture(self.model, job, count, policy)] for job in jobs)


def annotate(
    model: Sam4MLLM | Engine,
    source: str | Path,
    expressions: Mapping[str, Sequence[str]] | Sequence[str] | None,
    out: Path,
    *,
    count: TargetCount = TargetCount.ZERO_OR_MORE,
    policy: ImagePolicy | None = None,
    on_picture: Callable[[str], None] = lambda _: None,
) -> Annotated:
    """Annotate pictures and write the COCO document to ``out``.

    Args:
        model: annotates in this process; or an engine that uses others.
        source: of the pictures, see :func:`~sam4mllm_tool.images.batches.read_batch`.
        expressions: for every picture, or by picture (its name); ``None``: those of the list.
        count: number of objects per expression that is stated in the question.
        policy: limits on the pictures; one beyond them is a failure of its own.
        on_picture: called with each picture's name once it is done.

    Raises:
        InputError: no pictures, an expression for a picture that is not there, a journal of
            another run, or another process at work on it.
        BackendError: a model failed in a way that concerns every picture, or the disk is
            full (:class:`StorageError`): what was done before is kept.
    """
    engine = InThisProcess(model) if isinstance(model, Sam4MLLM) else model
    with exclusive(out.with_name(out.name + ".lock"), str(out)):
        return _annotate(engine, str(source), expressions, out, count, policy, on_picture)


def _annotate(
    engine: Engine,
    source: str,
    expressions: Mapping[str, Sequence[str]] | Sequence[str] | None,
    out: Path,
    count: TargetCount,
    policy: ImagePolicy | None,
    on_picture: Callable[[str], None],
) -> Annotated:
    batch = read_batch(source)
    wanted = planned(batch, expressions)
    journal = out.with_name(out.name + ".journal.jsonl")
    mllm, segmenter = engine.names
    stated = batch.expressions if expressions is None else expressions
    about = {"expressions": _plain(stated or []), "count": count.value, "mllm": mllm,
             "segmenter": segmenter}  # fmt: skip
    done = {name: entry for name, entry in _open(journal, about).items()
            if not entry["failures"]}  # fmt: skip
    done_before = len(done)
    jobs = [Job(batch.root, n, tuple(texts)) for n, texts in wanted.items() if n not in done]
    for name in wanted.keys() & done.keys():
        on_picture(name)
    with open_journal(journal) as lines:
        for entries in engine.annotate(jobs, count, policy) if jobs else ():
            lines.add(*entries)
            for entry in entries:
                done[entry["picture"]] = entry
                on_picture(entry["picture"])
    document = _coco(done, wanted)
    write_whole(out, json.dumps(document))
    failures = {k: v for name in wanted for k, v in done[name]["failures"].items()}
    return Annotated(document, failures, done_before)


def plan(
    source: str | Path, expressions: Mapping[str, Sequence[str]] | Sequence[str] | None
) -> dict[str, list[str]]:
    """Picture → its expressions, each once, pictures in the order of their names."""
    return planned(read_batch(str(source)), expressions)


def planned(
    batch: Batch, expressions: Mapping[str, Sequence[str]] | Sequence[str] | None
) -> dict[str, list[str]]:
    """:func:`plan` for pictures that have been listed.

    Raises:
        InputError: expressions for a picture that is not there, or none at all.
    """
    expressions = batch.expressions if expressions is None else expressions
    if expressions is None:
        raise InputError("no expressions are given", hint="Give --expressions, or put them into "
                         "the list.")  # fmt: skip
    if not isinstance(expressions, Mapping):
        return {name: list(dict.fromkeys(expressions)) for name in batch.names}
    strange = sorted(set(expressions) - set(batch.names))
    if strange:
        raise InputError(
            f"there are expressions for {strange[0]!r}, which is not below {batch.root}",
            hint="Name pictures by their path below the folder.",
        )
    return {n: list(dict.fromkeys(expressions[n])) for n in batch.names if expressions.get(n)}


def read_expressions(file: Path) -> dict[str, list[str]] | list[str]:
    """A text file (one expression per line, for every picture) or JSON: a list of expressions, or
    an object {picture: [expressions]}.

    Raises:
        InputError: missing, or neither.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read: {error}", hint="Give a .txt or .json file in UTF-8."
        ) from error
    if isinstance(content, dict):
        found = {name: _texts(some, file) for name, some in content.items()}
        return {name: some for name, some in found.items() if some}
    texts = _texts(content, file)
    if not texts:
        raise InputError(f"{file} holds no expression", hint="Write one expression per line.")
    return texts


def _texts(content: Any, file: Path) -> list[str]:
    listed = [content] if isinstance(content, str) else content
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise InputError(
            f"{file} holds something other than expressions",
            hint='JSON is ["the dog", …] or {"picture.jpg": ["the dog", …], …}.',
        )
    return [text.strip() for text in listed if text.strip()]


def annotate_picture(
    model: Sam4MLLM, job: Job, count: TargetCount, policy: ImagePolicy | None = None
) -> dict[str, Any]:
    """The journal's entry of a picture: its size, what was found, what failed. JSON-ready.

    Raises:
        BackendError: a model, or the pictures' store, failed in a way that concerns every picture.
    """
    name = job.name
    entry: dict[str, Any] = {"picture": name, "size": None, "found": [], "failures": {}}
    try:
        image = open_picture(job.root, name, policy)
    except InputError as error:
        return entry | {"failures": {name: str(error)}}
    entry["size"] = list(image.size)
    for text in job.texts:
        try:
            objects = model.segment(image, text, count=count, source=name).objects
        except (InputError, DialogueError, DeviceOutOfMemory) as error:
            entry["failures"][f"{name}: {text}"] = str(error)
            continue
        entry["found"] += [
            (text, coco_annotation(one.mask, score=one.drawn.predicted_iou)) for one in objects
        ]
    return entry


def _plain(expressions: Mapping[str, Sequence[str]] | Sequence[str]) -> Any:
    """JSON-ready: the same run may find more pictures in its folder later."""
    if isinstance(expressions, Mapping):
        return {name: list(texts) for name, texts in expressions.items()}
    return list(expressions)


def _open(journal: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of an earlier run, the last one of each picture.

    The first line describes the run; it is written to a new journal.
    """
    about = json.loads(json.dumps(about))
    first, *entries = read_journal(journal) or [about]
    if first != about:
        raise InputError(
            f"{journal} belongs to a run with other expressions or models",
            hint="Choose another output file, or delete the journal.",
        )
    if not entries:
        journal.unlink(missing_ok=True)
        with open_journal(journal) as lines:
            lines.add(about)
    return {entry["picture"]: entry for entry in entries}


def _coco(
    done: Mapping[str, dict[str, Any]], wanted: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The COCO document: one category per expression, one annotation per object."""
    names = dict.fromkeys(text for texts in wanted.values() for text in texts)
    sizes = {name: done[name]["size"] for name in wanted if done[name]["size"]}
    pictures = [
        CocoPicture(name, width, height, done[name]["found"])
        for name, (width, height) in sizes.items()
    ]
    return coco_document(pictures, {text: number for number, text in enumerate(names, 1)})
