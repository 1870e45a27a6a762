"""A run over many cases: it survives kills, bad pictures and full disks; shards merge exactly.

The folder of a run holds ``run.json`` (what is measured), ``outcomes-I-of-N.jsonl`` (one line per
case and strategy, each written at once) and ``skipped-I-of-N.jsonl`` (pictures that could not be
read). Lines that are there are not computed again, and a report is always made from all lines of
the folder. A picture whose lines are incomplete is asked again from its first case: a model's
answers may depend, in the last digits, on the earlier questions about the picture. So an
uninterrupted run, a resumed one and one of N shards give the same report (except for the seconds).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from sam4mllm_tool.disk import exclusive, write_whole
from sam4mllm_tool.errors import DatasetError, ImageError, InputError
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.judge import Judged, judge
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.journal import open_journal, read_journal
from sam4mllm_tool.pipeline.model import Sam4MLLM

UNREADABLE_LIMIT = 20
"""Pictures that may be unreadable before a run fails."""


@dataclass(frozen=True)
class Shard:
    """Every ``total``-th picture, beginning with number ``index``."""

    index: int = 0
    total: int = 1

    @classmethod
    def from_environment(cls) -> Shard:
        """This process's share under ``accelerate launch`` or ``torchrun``."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"`` is the third of eight.

        Raises:
            InputError: not of that form.
        """
        index, slash, total = text.partition("/")
        if not (slash and index.isdigit() and total.isdigit() and int(index) < int(total)):
            raise InputError(f"{text!r} is not a shard", hint="Write it as 0/8 … 7/8.")
        return cls(int(index), int(total))

    def __str__(self) -> str:
        return f"{self.index}-of-{self.total}"


@dataclass(frozen=True)
class Line:
    """A judged case as it is written to a file."""

    strategy: str
    judged: Judged

    @property
    def case(self) -> str:
        """The case's id."""
        return self.judged.outcome.case

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        judged = vars(self.judged) | {"outcome": self.judged.outcome.to_json()}
        return {"strategy": self.strategy, **judged}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Line:
        """The inverse of :meth:`to_json`."""
        data = dict(data)
        strategy = data.pop("strategy")
        data["outcome"] = Outcome.from_json(data["outcome"])
        data["masks"] = tuple(data["masks"])
        return cls(strategy, Judged(**data))


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be read.

    Attributes:
        image: id of the picture.
        cases: ids of its cases.
        error: why; names the file.
    """

    image: str
    cases: tuple[str, ...]
    error: str


def measure(
    model: Sam4MLLM,
    cases: Iterable[Case],
    strategies: Sequence[str],
    folder: Path,
    about: dict[str, Any],
    *,
    shard: Shard | None = None,
    unreadable_limit: int = UNREADABLE_LIMIT,
    on_case: Callable[[str], None] = lambda _: None,
) -> None:
    """Judge every case of the shard by every strategy, and write the lines that are missing.

    The strategies of a case follow each other, so that they share the picture's prefix. Pictures
    that cannot be read are noted and passed over; the next run tries them again.

    Args:
        about: what is measured, JSON-ready; a folder belongs to one such.
        unreadable_limit: more unreadable pictures than this end the run.
        on_case: called with the id of each case that is done.

    Raises:
        InputError: the folder holds another run, or another process is at work on this shard.
        DatasetError: too many pictures cannot be read.
        StorageError: there is no room; what was judged before is kept.
    """
    share = shard or Shard()
    models = {s: replace(model, settings=replace(model.settings, strategy=s))
              for s in strategies}  # fmt: skip
    with _claimed(folder, about, share):
        done = {(line.case, line.strategy) for line in read_lines(folder)}
        skipped: list[Skipped] = []
        with (
            open_journal(folder / f"outcomes-{share}.jsonl") as lines,
            open_journal(folder / f"skipped-{share}.jsonl", fresh=True) as unread,
        ):
            for group in _pictures(cases, share):
                wanted = models
                if all((case.case, name) in done for case in group for name in models):
                    wanted = {}
                try:
                    image = group[0].open_image() if wanted else None
                except (ImageError, DatasetError) as error:
                    names = tuple(case.case for case in group)
                    skipped.append(Skipped(group[0].image, names, error.message))
                    unread.add(vars(skipped[-1]))
                    _check_limit(skipped, unreadable_limit)
                    continue
                for case in group:
                    try:
                        for name, one in wanted.items():
                            assert image is not None
                            lines.add(Line(name, judge(one, case, image)).to_json())
                    except DatasetError as error:  # its mask's file
                        skipped.append(Skipped(case.image, (case.case,), error.message))
                        unread.add(vars(skipped[-1]))
                        _check_limit(skipped, unreadable_limit)
                    on_case(case.case)


def read_lines(folder: Path) -> list[Line]:
    """All lines of all shards, the last of each case and strategy, ordered by picture and case.

    A last line that is not whole (being written, or cut off by a kill) is left out.
    """
    found: dict[tuple[str, str, str], Line] = {}
    for file in sorted(folder.glob("outcomes-*.jsonl")):
        for data in read_journal(file):
            line = Line.from_json(data)
            found[line.judged.outcome.image, line.case, line.strategy] = line
    return [found[key] for key in sorted(found)]


def read_skipped(folder: Path) -> list[Skipped]:
    """The unreadable pictures of all shards, each once, but for those judged since."""
    judged = {line.case for line in read_lines(folder)}
    found = {
        data["image"]: Skipped(data["image"], tuple(data["cases"]), data["error"])
        for file in sorted(folder.glob("skipped-*.jsonl"))
        for data in read_journal(file)
    }
    return [found[image] for image in sorted(found) if not judged.intersection(found[image].cases)]


def _pictures(cases: Iterable[Case], shard: Shard) -> Iterator[list[Case]]:
    """The shard's pictures, each as the cases on it that follow each other."""
    for number, (_, group) in enumerate(groupby(cases, key=lambda case: case.image)):
        if number % shard.total == shard.index:
            yield list(group)


def _check_limit(skipped: Sequence[Skipped], limit: int) -> None:
    if len(skipped) > limit:
        raise DatasetError(
            f"{len(skipped)} pictures cannot be read, the last: {skipped[-1].error}",
            hint="Download the pictures again, or allow more with --unreadable-limit; what was "
            "judged is kept.",
        )


@contextmanager
def _claimed(folder: Path, about: dict[str, Any], shard: Shard) -> Iterator[None]:
    """Write what the folder's run measures, or check that it is this run; lock the shard."""
    file = folder / "run.json"
    wanted = json.dumps(about, indent=1, sort_keys=True) + "\n"
    with exclusive(folder / f".lock-{shard}", f"shard {shard} in {folder}"):
        with exclusive(folder / ".lock", str(folder), wait=True):
            if not file.exists():
                write_whole(file, wanted)
            elif file.read_text(encoding="utf-8") != wanted:
                raise InputError(
                    f"{folder} holds another run",
                    hint="Choose another folder, or delete this one.",
                )
        yield
