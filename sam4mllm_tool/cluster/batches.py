"""Batches on Ray Data: pictures stream through a pool of processes with the models.

The workers call the same function as a run in one process
(:func:`sam4mllm_tool.annotate.annotate_picture`), and the driver writes the same journal and
document. If a worker dies, Ray restarts it and repeats its current block of pictures; the driver
keeps one entry per picture.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from sam4mllm_tool import errors
from sam4mllm_tool.annotate import Job, annotate_picture
from sam4mllm_tool.errors import BackendError, ClusterError, Sam4MllmError, same_error
from sam4mllm_tool.evaluation.cases import Cases
from sam4mllm_tool.evaluation.run import Shard, measure
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.types import TargetCount

PICTURES_PER_BLOCK = 16
"""Pictures per block: at most this many are repeated when a worker dies."""

SHARDS_PER_WORKER = 8

MAX_DEATHS = 3
"""Worker deaths on one item after which the item counts as failed."""


@dataclass(frozen=True)
class Workers:
    """A pool of worker processes with the models.

    Attributes:
        load: loads the models; called in each process.
        number: number of processes.
        cpus, gpus: what Ray reserves per process.
    """

    load: Callable[[], Sam4MLLM]
    number: int
    cpus: float = 1.0
    gpus: float = 0.0

    def stream(
        self, kind: type[_Work], items: Sequence[Any], *arguments: Any
    ) -> Iterator[list[Any]]:
        """Yield the results of ``kind(load, *arguments)`` for all items, by blocks, in any order.

        Args:
            kind: class whose instances are called with one item each.
            items: small JSON values, since all are held in memory. Results are JSON values too.

        Raises:
            Sam4MllmError: what a worker raised.
            ClusterError: workers keep dying, or Ray fails.
        """
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.log_internal_stack_trace_to_stdout = False
        blocks = max(SHARDS_PER_WORKER * self.number, -(-len(items) // PICTURES_PER_BLOCK))
        data = ray.data.from_items(
            [{"item": json.dumps(item)} for item in items],
            override_num_blocks=min(blocks, len(items)),
        ).map(
            _Mapper,  # type: ignore[arg-type]  # a class, for a pool of actors
            fn_constructor_args=(
                ray.remote(num_cpus=0)(_Deaths).remote(),
                kind,
                self.load,
                *arguments,
            ),
            compute=ActorPoolStrategy(size=self.number),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        try:
            block: Any  # an Arrow table, though it is not declared as one
            for block in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield [_decoded(text) for text in block["result"].to_pylist()]
        except RayError as error:
            raise _typed_error(error) from error

    @cached_property
    def names(self) -> tuple[str, str]:
        """The MLLM's name and the segmenter's, from a process that loads them.

        Raises:
            Sam4MllmError: they cannot be loaded.
            ClusterError: Ray fails.
        """
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=1)(_names)
        try:
            return ray.get(task.remote(self.load))
        except RayError as error:
            raise _typed_error(error) from error


@dataclass(frozen=True)
class RayAnnotation:
    """Engine for :func:`sam4mllm_tool.annotate.annotate` with the models in Ray workers."""

    workers: Workers

    @property
    def names(self) -> tuple[str, str]:
        """The MLLM's name and the segmenter's."""
        return self.workers.names

    def annotate(
        self, jobs: Sequence[Job], count: TargetCount, policy: ImagePolicy | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the entries in the order in which the pictures are finished."""
        return self.workers.stream(_Annotator, [astuple(job) for job in jobs], count, policy)


@dataclass(frozen=True)
class RayEvaluation:
    """Engine for :func:`sam4mllm_tool.evaluation.benchmark.evaluate` with Ray workers.

    The run is divided into more shards than workers, so that all workers finish at about the same
    time. Each shard writes its own lines, so all workers must see the same ``folder`` and data. If
    a worker dies, its shard is started again and continues after its last line.
    """

    workers: Workers
    settings: Settings

    @property
    def names(self) -> tuple[str, str]:
        """The MLLM's name and the segmenter's."""
        return self.workers.names

    def measure(
        self,
        cases: Cases,
        strategies: Sequence[str],
        folder: Path,
        about: dict[str, Any],
        unreadable_limit: int,
        on_case: Callable[[str], None],
    ) -> None:
        """Write the missing lines; see :func:`~sam4mllm_tool.evaluation.run.measure`."""
        total = SHARDS_PER_WORKER * self.workers.number
        arguments = cases, tuple(strategies), folder.resolve(), about, unreadable_limit, total
        for shards in self.workers.stream(_Evaluator, range(total), *arguments):  # type: ignore[arg-type]
            for case in itertools.chain.from_iterable(shards):
                on_case(case)


class _Work(Protocol):
    """Processes one item; an instance lives in each worker."""

    def __call__(self, item: Any) -> Any:
        """The result as a JSON value."""

    @staticmethod
    def failure(item: Any) -> Any:
        """The result for an item on which ``MAX_DEATHS`` workers died.

        Raises:
            ClusterError: the run cannot continue without the item.
        """


class _Evaluator:
    def __init__(
        self,
        load: Callable[[], Sam4MLLM],
        cases: Cases,
        strategies: Sequence[str],
        folder: Path,
        about: dict[str, Any],
        unreadable_limit: int,
        total: int,
    ) -> None:
        self._model, self._total = load(), total
        self._measure = partial(
            measure, strategies=strategies, folder=folder, about=about,
            unreadable_limit=unreadable_limit,
        )  # fmt: skip
        self._cases = cases

    def __call__(self, index: int) -> list[str]:
        done: list[str] = []
        self._measure(
            self._model, self._cases(), shard=Shard(index, self._total), on_case=done.append
        )
        return done

    @staticmethod
    def failure(index: int) -> list[str]:
        raise ClusterError(
            f"{MAX_DEATHS} workers died on the same picture of shard {index}",
            hint="Finished results are kept; the shard's file ends before this picture.",
        )


class _Annotator:
    def __init__(
        self, load: Callable[[], Sam4MLLM], count: TargetCount, policy: ImagePolicy | None
    ) -> None:
        self._model, self._rest = load(), (count, policy)

    def __call__(self, item: tuple[str, str, list[str]]) -> dict[str, Any]:
        root, name, texts = item
        return annotate_picture(self._model, Job(root, name, tuple(texts)), *self._rest)

    @staticmethod
    def failure(item: tuple[str, str, list[str]]) -> dict[str, Any]:
        name = item[1]
        why = f"{MAX_DEATHS} workers died on this picture: it may need more memory"
        return {"picture": name, "size": None, "found": [], "failures": {name: why}}


class _Deaths:
    """Counts unfinished starts per item, because Ray Data repeats a block without limit."""

    def __init__(self) -> None:
        self._started: Counter[str] = Counter()

    def begin(self, item: str) -> int:
        """Record a start. Returns how many workers have died on this item."""
        self._started[item] += 1
        return self._started[item] - 1

    def end(self, item: str) -> None:
        """Record that the item is finished."""
        del self._started[item]


class _Mapper:
    """Adapts the work to Ray Data's rows. This package's own errors are returned as rows, too.

    If raised, they would reach the driver wrapped in two of Ray's errors, without their type.
    """

    def __init__(self, deaths: Any, kind: type[_Work], *arguments: Any) -> None:
        self._deaths, self._kind = deaths, kind
        self._make = cache(partial(kind, *arguments))

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        item = json.loads(row["item"])
        try:
            if ray.get(self._deaths.begin.remote(row["item"])) < MAX_DEATHS:
                done = {"done": self._make()(item)}
            else:
                done = {"done": self._kind.failure(item)}
        except Sam4MllmError as error:
            done = {"error": [type(error).__name__, error.args, vars(error)]}
        self._deaths.end.remote(row["item"])
        return {"result": json.dumps(done)}


def _decoded(result: str) -> Any:
    """The result that a worker sent. If it sent an error, the error is raised."""
    sent = json.loads(result)
    if "error" in sent:
        name, arguments, state = sent["error"]
        raise same_error(getattr(errors, name, BackendError), tuple(arguments), state)
    return sent["done"]


def _names(load: Callable[[], Sam4MLLM]) -> tuple[str, str]:
    model = load()
    return model.mllm.name, model.segmenter.name


def _typed_error(error: BaseException) -> Sam4MllmError:
    """This package's error that caused a Ray error, or a ``ClusterError`` with Ray's message."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, Sam4MllmError) and not isinstance(reason, RayError):
            return reason
        reason = getattr(reason, "cause", None) or reason.__cause__
    return ClusterError(
        f"Ray ended the run: {str(error).strip().splitlines()[-1] if str(error) else error!r}",
        hint="Finished results are kept: run the same command again. If workers run out of "
        "memory, give each of them more memory, or use fewer workers.",
        retryable=True,
    )
