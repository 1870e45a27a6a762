"""Batches on Ray Data: pictures stream through a pool of processes with the models.

The work is that of one process (:func:`sam4mllm_tool.annotate.annotate_picture`), and so are the
journal and the document, which the driver writes. If a worker dies, Ray starts it again and repeats
the block of pictures it was at; the driver takes each picture's entry once.
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
"""Pictures that are done again, at most, when a worker dies."""

SHARDS_PER_WORKER = 8

DEATHS = 3
"""How often an item may end its worker before it is given up."""


@dataclass(frozen=True)
class Workers:
    """A pool of processes with the models.

    Attributes:
        load: loads the models; run in each process.
        number: how many processes.
        cpus, gpus: what Ray sets aside for each.
    """

    load: Callable[[], Sam4MLLM]
    number: int
    cpus: float = 1.0
    gpus: float = 0.0

    def stream(
        self, kind: type[_Work], items: Sequence[Any], *arguments: Any
    ) -> Iterator[list[Any]]:
        """What ``kind(load, *arguments)`` gives for each item, block by block, in any order.

        Args:
            kind: a class whose objects are called with an item.
            items: JSON-ready and small: all are in memory. Results are JSON-ready too.

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
                yield [_opened(text) for text in block["result"].to_pylist()]
        except RayError as error:
            raise _own(error) from error

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
            raise _own(error) from error


@dataclass(frozen=True)
class RayAnnotation:
    """The engine of :func:`sam4mllm_tool.annotate.annotate` that uses other processes."""

    workers: Workers

    @property
    def names(self) -> tuple[str, str]:
        """The MLLM's name and the segmenter's."""
        return self.workers.names

    def annotate(
        self, jobs: Sequence[Job], count: TargetCount, policy: ImagePolicy | None
    ) -> Iterator[list[dict[str, Any]]]:
        """The entries, in the order in which they are done."""
        return self.workers.stream(_Annotator, [astuple(job) for job in jobs], count, policy)


@dataclass(frozen=True)
class RayEvaluation:
    """The engine of :func:`sam4mllm_tool.evaluation.benchmark.evaluate` that uses other processes.

    The run is dealt into shards, more than there are workers, so that none waits long for the last.
    A shard writes its own lines: ``folder`` and the data must be the same for all workers. One
    whose worker dies is begun again, and continues behind its last line.
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
        """Write the lines that are missing; see :func:`~sam4mllm_tool.evaluation.run.measure`."""
        total = SHARDS_PER_WORKER * self.workers.number
        what = cases, tuple(strategies), folder.resolve(), about, unreadable_limit, total
        for shards in self.workers.stream(_Judge, range(total), *what):  # type: ignore[arg-type]
            for case in itertools.chain.from_iterable(shards):
                on_case(case)


class _Work(Protocol):
    """What is done with an item."""

    def __call__(self, item: Any) -> Any:
        """The result, JSON-ready."""

    @staticmethod
    def given_up(item: Any) -> Any:
        """The result for an item that keeps ending its worker.

        Raises:
            ClusterError: there is none.
        """


class _Judge:
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
    def given_up(index: int) -> list[str]:
        raise ClusterError(
            f"a picture of shard {index} ended its worker {DEATHS} times",
            hint="The shard's file ends before it. What was done is kept.",
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
    def given_up(item: tuple[str, str, list[str]]) -> dict[str, Any]:
        name = item[1]
        why = f"the picture ended its worker {DEATHS} times: the memory may be too small for it"
        return {"picture": name, "size": None, "found": [], "failures": {name: why}}


class _Deaths:
    """Knows which items were begun and never ended: Ray Data itself repeats a block for ever."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, item: str) -> int:
        """How often a worker has died of it."""
        self._begun[item] += 1
        return self._begun[item] - 1

    def end(self, item: str) -> None:
        """It is done."""
        del self._begun[item]


class _Mapper:
    """Ray Data gives and takes rows of plain columns; an error of ours is a row too.

    Raised, it would come to the driver inside two of Ray's, without its type.
    """

    def __init__(self, deaths: Any, kind: type[_Work], *arguments: Any) -> None:
        self._deaths, self._kind = deaths, kind
        self._make = cache(partial(kind, *arguments))

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        item = json.loads(row["item"])
        try:
            if ray.get(self._deaths.begin.remote(row["item"])) < DEATHS:
                done = {"done": self._make()(item)}
            else:
                done = {"done": self._kind.given_up(item)}
        except Sam4MllmError as error:
            done = {"error": [type(error).__name__, error.args, vars(error)]}
        self._deaths.end.remote(row["item"])
        return {"result": json.dumps(done)}


def _opened(result: str) -> Any:
    """What a worker sent; an error is raised."""
    sent = json.loads(result)
    if "error" in sent:
        name, arguments, state = sent["error"]
        raise same_error(getattr(errors, name, BackendError), tuple(arguments), state)
    return sent["done"]


def _names(load: Callable[[], Sam4MLLM]) -> tuple[str, str]:
    model = load()
    return model.mllm.name, model.segmenter.name


def _own(error: BaseException) -> Sam4MllmError:
    """The error of ours behind one of Ray's, or one that says what Ray says."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, Sam4MllmError) and not isinstance(reason, RayError):
            return reason
        reason = getattr(reason, "cause", None) or reason.__cause__
    return ClusterError(
        f"Ray ended the run: {str(error).strip().splitlines()[-1] if str(error) else error!r}",
        hint="What was done is kept: run the same command again. If a worker is killed for its "
        "memory, give each more of it, or take fewer.",
        retryable=True,
    )
