"""A run over many cases: resumable after a kill, in shards that merge exactly.

The folder of a run holds ``run.json`` (what is measured) and ``outcomes-I-of-N.jsonl`` files, one
line a case and strategy, each line written at once. Whatever lines are there are not computed
again, and a report is always made from all lines of the folder, in the order of the cases. So a
run in one go, a resumed one and one of N shards give the same report (but for the seconds).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.judge import Judged, judge
from sam4mllm_tool.evaluation.metrics import Outcome
from sam4mllm_tool.journal import open_journal, read_journal
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.types import RgbImage, Strategy


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


@dataclass(frozen=True)
class Line:
    """A judged case as it stands in a file; ``number`` is its place among the cases."""

    number: int
    strategy: str
    judged: Judged

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        judged = vars(self.judged) | {"outcome": self.judged.outcome.to_json()}
        return {"number": self.number, "strategy": self.strategy, **judged}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Line:
        """The inverse of :meth:`to_json`."""
        data = dict(data)
        number, strategy = data.pop("number"), data.pop("strategy")
        data["outcome"] = Outcome.from_json(data["outcome"])
        data["masks"] = tuple(data["masks"])
        return cls(number, strategy, Judged(**data))


def measure(
    model: Sam4MLLM,
    cases: Iterable[Case],
    strategies: Sequence[Strategy],
    folder: Path,
    about: dict[str, Any],
    *,
    shard: Shard | None = None,
    on_case: Callable[[Case], None] = lambda _: None,
) -> None:
    """Judge every case of the shard by every strategy, and write the lines that are missing.

    The strategies of a case follow each other, so that they share the picture's prefix.

    Args:
        about: what is measured, JSON-ready; a folder belongs to one such.

    Raises:
        InputError: the folder holds another run.
    """
    share = shard or Shard()
    _claim(folder, about)
    done = {(line.number, line.strategy) for line in read_lines(folder)}
    models = {s.value: replace(model, settings=replace(model.settings, strategy=s))
              for s in strategies}  # fmt: skip
    file = folder / f"outcomes-{share.index}-of-{share.total}.jsonl"
    opened: tuple[str, RgbImage] | None = None
    with open_journal(file) as lines:
        for number, case in _share_of(cases, share):
            missing = [name for name in models if (number, name) not in done]
            if missing and (opened is None or opened[0] != case.image):
                opened = case.image, case.open_image()
            for name in missing:
                assert opened is not None
                line = Line(number, name, judge(models[name], case, opened[1]))
                lines.add(line.to_json())
            on_case(case)


def read_lines(folder: Path) -> list[Line]:
    """All lines of all shards, each case and strategy once, in the order of the cases.

    A last line that is not whole (being written, or cut off by a kill) is left out.
    """
    found: dict[tuple[int, str], Line] = {}
    for file in sorted(folder.glob("outcomes-*.jsonl")):
        for data in read_journal(file):
            line = Line.from_json(data)
            found.setdefault((line.number, line.strategy), line)
    return [found[key] for key in sorted(found)]


def _share_of(cases: Iterable[Case], shard: Shard) -> Iterator[tuple[int, Case]]:
    """The shard's cases with their numbers; a picture's cases stay together."""
    picture, last = -1, None
    for number, case in enumerate(cases):
        if case.image != last:
            picture, last = picture + 1, case.image
        if picture % shard.total == shard.index:
            yield number, case


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Note what the folder's run is about, or make sure that it is this one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.json"
    wanted = json.dumps(about, indent=1, sort_keys=True) + "\n"
    if not file.exists():
        file.write_text(wanted, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != wanted:
        raise InputError(
            f"{folder} holds another run", hint="Choose another folder, or delete this one."
        )
