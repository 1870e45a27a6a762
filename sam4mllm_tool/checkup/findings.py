"""One line of a check-up, and how a failing check becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sam4mllm_tool.errors import Sam4MllmError

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was checked, a few words.
        verdict: ``fail`` if results will be wrong, ``warn`` if they may be.
        detail: what was seen, with figures.
        advice: what to do about it, empty if nothing.
    """

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def graded(
    check: str, value: float, *, good: float, bad: float, detail: str, advice: str
) -> Finding:
    """A finding of a value that should be at least ``good`` and must be at least ``bad``."""
    verdict: Verdict = "pass" if value >= good else "warn" if value >= bad else "fail"
    return Finding(check, verdict, detail, "" if verdict == "pass" else advice)


def guarded(check: str, run: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of ``run``; an error of the package's own becomes one that fails."""
    try:
        yield from run()
    except Sam4MllmError as error:
        yield Finding(check, "fail", error.message, error.hint)
