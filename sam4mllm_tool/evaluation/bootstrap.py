"""Metrics with confidence intervals: images are resampled, as expressions on one image depend on
each other (percentile cluster bootstrap; Efron & Tibshirani, 1993).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam4mllm_tool.evaluation.metrics import METRICS, Floats, Metric
from sam4mllm_tool.evaluation.outcome import Outcome


@dataclass(frozen=True)
class Estimate:
    """A metric with its bootstrap confidence interval; ``None`` where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """Second minus first of two systems on the same expressions.

    Attributes:
        p_value: two-sided bootstrap p-value of "no difference".
    """

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Bootstrap:
    """Resampling of images with replacement.

    Attributes:
        draws: number of resamples.
        level: of the percentile interval.
        seed: the same outcomes and seed give the same interval.
    """

    draws: int = 2000
    level: float = 0.95
    seed: int = 0

    @property
    def _quantiles(self) -> tuple[float, float]:
        tail = (1 - self.level) / 2
        return tail, 1 - tail

    def estimate(self, outcomes: Sequence[Outcome], metric: Metric) -> Estimate:
        """The metric with its confidence interval; a single picture gives none."""
        value = metric(outcomes)
        if not np.isfinite(value):
            return Estimate(None)
        if len({outcome.image for outcome in outcomes}) < 2:
            return Estimate(value)
        samples = self._samples(outcomes, metric)
        low, high = np.nanquantile(samples, self._quantiles)
        return Estimate(value, float(low), float(high))

    def compare(
        self, first: Sequence[Outcome], second: Sequence[Outcome], metric: Metric
    ) -> Difference:
        """Paired bootstrap: both systems are judged on the same resampled images.

        Raises:
            ValueError: the two did not answer the same expressions.
        """
        by_case = {outcome.case: outcome for outcome in second}
        if len(by_case) != len(second) or {o.case for o in first} != set(by_case):
            raise ValueError("a paired comparison needs the same expressions on both sides")
        aligned = [by_case[outcome.case] for outcome in first]
        gaps = self._samples(aligned, metric) - self._samples(first, metric)
        low, high = np.nanquantile(gaps, self._quantiles)
        tail = min((gaps <= 0).mean(), (gaps >= 0).mean())
        return Difference(
            metric(aligned) - metric(first), float(low), float(high), float(min(1.0, 2 * tail))
        )

    def _samples(self, outcomes: Sequence[Outcome], metric: Metric) -> Floats:
        """The metric of each resample. Images are numbered in order of appearance, so that two
        calls on aligned outcomes draw the same images.
        """
        numbers = {image: i for i, image in enumerate(dict.fromkeys(o.image for o in outcomes))}
        table = np.array([metric.columns(outcome) for outcome in outcomes], dtype=np.float64)
        sums = np.zeros((len(numbers), table.shape[1]))
        np.add.at(sums, [numbers[outcome.image] for outcome in outcomes], table)
        random = np.random.default_rng(self.seed)
        weights = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), self.draws)
        return metric.value(weights @ sums)


def summarise(
    outcomes: Sequence[Outcome], bootstrap: Bootstrap | None = None
) -> dict[str, Estimate]:
    """Every metric over these outcomes, with confidence intervals."""
    resampler = bootstrap or Bootstrap()
    return {name: resampler.estimate(outcomes, metric) for name, metric in METRICS.items()}
