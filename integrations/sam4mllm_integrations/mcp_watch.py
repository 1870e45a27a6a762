"""What a server shows of itself: Prometheus metrics, a log line per call, OpenTelemetry spans."""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry import trace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

logger = logging.getLogger("sam4mllm_tool.calls")
_tracer = trace.get_tracer("sam4mllm_tool")
_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


def log_calls() -> None:
    """Write the JSON line of each call to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@dataclass
class CallWatch:
    """One call as it is watched.

    Attributes:
        request_id: names the call in the log and in errors.
        outcome: ``"ok"``, ``"tool_error"``, or the name of the error that ended it.
        stages: names and beginnings (Unix time in ns), the last one's end added when it is over.
        clock_offset: from the monotonic clock to Unix time, so that setting the clock changes no
            duration.
    """

    request_id: str = field(default_factory=lambda: secrets.token_hex(8))
    outcome: str = "ok"
    stages: list[tuple[str, int]] = field(default_factory=list)
    clock_offset: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())

    def stage(self, name: str) -> None:
        """A stage begins, and the one before it ends."""
        self.stages.append((name, time.monotonic_ns() + self.clock_offset))


class Watch:
    """Metrics of one server.

    Args:
        gauges: name and description → what to ask for the present value.
    """

    def __init__(self, gauges: dict[tuple[str, str], Callable[[], float]]) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter(
            "sam4mllm_calls", "Calls by how they ended.", ["tool", "outcome"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "sam4mllm_call_seconds", "Seconds per call, waiting included.", ["tool"],
            buckets=_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._stage_seconds = Histogram(
            "sam4mllm_stage_seconds", "Seconds per stage of the calls.", ["stage"],
            buckets=_BUCKETS, registry=self._registry,
        )  # fmt: skip
        for (name, description), ask in gauges.items():
            Gauge(name, description, registry=self._registry).set_function(ask)

    @contextmanager
    def call(self, tool: str, client: str) -> Iterator[CallWatch]:
        """Watch a call within the ``with`` block."""
        call = CallWatch()
        begun = time.perf_counter()
        try:
            yield call
        except BaseException as error:
            call.outcome = type(error.__cause__ or error).__name__
            raise
        finally:
            seconds = time.perf_counter() - begun
            call.stage("")
            self._calls.labels(tool, call.outcome).inc()
            self._seconds.labels(tool).observe(seconds)
            stages = self._note_stages(tool, call)
            logger.info(
                json.dumps(
                    {
                        "time": round(time.time(), 3),
                        "request_id": call.request_id,
                        "tool": tool,
                        # Session ids open workspaces: the log shows the beginning only.
                        "client": client[:16],
                        "outcome": call.outcome,
                        "seconds": round(seconds, 4),
                        "stages": stages,
                    }
                )
            )

    def exposition(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _note_stages(self, tool: str, call: CallWatch) -> dict[str, float]:
        spent: dict[str, float] = {}
        names = {"sam4mllm.tool": tool, "sam4mllm.request_id": call.request_id}
        for (name, begin), (_, end) in itertools.pairwise(call.stages):
            # Children of the SDK's span of the call, which is the current one here.
            _tracer.start_span(name, attributes=names, start_time=begin).end(end_time=end)
            spent[name] = round(spent.get(name, 0.0) + (end - begin) / 1e9, 4)
        for name, seconds in spent.items():
            self._stage_seconds.labels(name).observe(seconds)
        return spent
