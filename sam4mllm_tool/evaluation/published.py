"""Numbers that others published, shown beside a run of the same split under the same protocol."""

from __future__ import annotations

from dataclasses import dataclass

_PAPER = "SAM4MLLM-8B (Chen et al., ECCV 2024, arXiv 2409.10542)"


@dataclass(frozen=True)
class Published:
    """One number of a paper, as a share of 1."""

    system: str
    metric: str
    value: float


@dataclass(frozen=True)
class Row:
    """What is published for one split.

    Attributes:
        protocol: under which the field measures it (the paper's own evaluator is not public).
        cases: expressions of the whole split under that protocol; a part of it is not comparable.
    """

    protocol: str
    cases: int
    numbers: tuple[Published, ...]


def _refer(cases: int, ciou: float) -> Row:
    return Row("refer", cases, (Published(_PAPER, "cIoU", ciou),))


def _both(protocol: str, cases: int, giou: float, ciou: float, **more: float) -> Row:
    numbers = {"gIoU": giou, "cIoU": ciou, **more}
    return Row(protocol, cases, tuple(Published(_PAPER, *one) for one in numbers.items()))


# Sizes: the REFER API's own statistics (refcoco, refcoco+, refcocog), GRES and LISA.
PUBLISHED: dict[tuple[str, str], Row] = {
    ("refcoco", "val"): _refer(10_834, 0.798),
    ("refcoco", "testA"): _refer(5_657, 0.827),
    ("refcoco", "testB"): _refer(5_095, 0.747),
    ("refcoco+", "val"): _refer(10_758, 0.746),
    ("refcoco+", "testA"): _refer(5_726, 0.800),
    ("refcoco+", "testB"): _refer(4_889, 0.672),
    ("refcocog", "val"): _refer(4_896, 0.755),
    ("refcocog", "test"): _refer(9_602, 0.764),
    ("grefcoco", "val"): _both("rela", 16_870, 0.7186, 0.6783, n_acc=0.6608),
    ("reasonseg", "val"): _both("lisa", 200, 0.584, 0.604),
}


def published_for(benchmark: str, split: str, protocol: str, cases: int) -> tuple[Published, ...]:
    """What is published for a whole split under a protocol; nothing for anything less."""
    row = PUBLISHED.get((benchmark, split))
    if row is None or row.protocol != protocol or row.cases != cases:
        return ()
    return row.numbers


def where_published(benchmark: str, split: str) -> str:
    """The run for which published figures are shown; empty if there are none."""
    row = PUBLISHED.get((benchmark, split))
    if row is None:
        return ""
    return (
        f"Numbers are published for all {row.cases:,} expressions of {benchmark} {split} under "
        f"protocol {row.protocol}."
    )
