"""Numbers that others published, printed beside ours and never as ours."""

from __future__ import annotations

from dataclasses import dataclass

_PAPER = "SAM4MLLM-8B (Chen et al., ECCV 2024, arXiv 2409.10542)"


@dataclass(frozen=True)
class Published:
    """One number of a paper, as a share of 1."""

    system: str
    metric: str
    value: float


def _ciou(**by_split: float) -> dict[str, tuple[Published, ...]]:
    return {split: (Published(_PAPER, "cIoU", value),) for split, value in by_split.items()}


PUBLISHED: dict[str, dict[str, tuple[Published, ...]]] = {
    "refcoco": _ciou(val=0.798, testA=0.827, testB=0.747),
    "refcoco+": _ciou(val=0.746, testA=0.800, testB=0.672),
    "refcocog": _ciou(val=0.755, test=0.764),
    "grefcoco": {
        "val": (
            Published(_PAPER, "gIoU", 0.7186),
            Published(_PAPER, "cIoU", 0.6783),
            Published(_PAPER, "n_acc", 0.6608),
        )
    },
    "reasonseg": {"val": (Published(_PAPER, "gIoU", 0.584), Published(_PAPER, "cIoU", 0.604))},
}


def published_for(benchmark: str, split: str) -> tuple[Published, ...]:
    """What is known for a benchmark's split; nothing for most."""
    return PUBLISHED.get(benchmark, {}).get(split, ())
