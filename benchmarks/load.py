"""Many clients at once against the real MCP server over HTTP, with the official client.

Run ``python -m benchmarks.load --clients 200 --calls 20 --json``. Every client has its own
picture, whose answer is known; what it gets back is compared with the truth and with what a single
client got. The models are honest stand-ins that take ``--think`` seconds per question
(``--embedded`` takes the shipped ones, whose answers are compared with the single client's only).

``--kills 20`` and ``--sigterms 10`` end servers amid the clients' work, see
:mod:`benchmarks.load_ends`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import psutil
from mcp import MCPError

from benchmarks.load_server import (
    PATIENCE,
    Memory,
    area,
    connected,
    free_port,
    gauges,
    is_busy,
    picture,
    question,
    serve,
    server,
    serving,
)

QUEUED = 30
"""Segment calls that wait or run while calls without a model are timed."""
_LEAST_WAITING = 0.8
"""Share of them that must wait before the timing begins; the others run or are being sent."""
_THINK_WHILE_QUEUED = 0.2
"""Seconds per reply while they are timed: the models are what is waited for, not the processor."""
_COMPARED = 20


# -- the clients ---------------------------------------------------------------------------------


@dataclass
class Tally:
    """The outcomes of all calls.

    Attributes:
        outcomes: ``ok``, ``busy``, ``lost`` (no answer or an unexpected error), ``crossed``
            (another client's object), ``wrong`` (not the truth, or not as a single client got it).
        seconds: time of each call by tool.
        examples: some of what was not ok.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def note(self, outcome: str, what: str = "") -> None:
        self.outcomes[outcome] += 1
        if what and outcome not in {"ok", "busy"} and len(self.examples) < 10:
            self.examples.append(f"{outcome}: {what[:300]}")

    def percentile(self, tools: Sequence[str], share: float) -> float:
        """Seconds within which that share of those tools' calls were answered."""
        times = sorted(one for tool in tools for one in self.seconds.get(tool, []))
        return times[min(len(times) - 1, math.ceil(share * len(times)) - 1)] if times else math.nan


MODEL_FREE = ("view_objects", "compare_objects")


async def one_client(
    url: str, number: int, calls: int, era: str, tally: Tally, exact: bool
) -> list[Any]:
    """One client's calls: segment, look, compare, by turns; returns its structured results."""
    results: list[Any] = []
    mine: list[str] = []
    image: str = picture(number)
    arguments: dict[str, Any]
    async with connected(url, era) as client:
        for turn in range(calls):
            kind = turn % 3 if len(mine) >= 2 else 0
            if kind == 0:
                expression = f"block {number}" if exact else "the dog"
                name = "segment_object"
                arguments = {"image": image, "count": "1", "expression": expression}
            elif kind == 1:
                name, arguments = "view_objects", {"image": image}
            else:
                name, arguments = "compare_objects", {"object_ids": mine[-2:]}
            begun = time.perf_counter()
            try:
                answer = await client.call_tool(name, arguments)
            except MCPError as error:
                tally.note("busy" if is_busy(error) else "lost", str(error))
                continue
            except Exception as error:
                tally.note("lost", repr(error))
                continue
            tally.seconds.setdefault(name, []).append(time.perf_counter() - begun)
            if answer.is_error:
                tally.note("wrong", str(answer.content))
                continue
            data = answer.structured_content
            results.append(data)
            tally.note(*judged(name, data, number, mine, exact))
            if name == "segment_object":
                image = data["image_id"]
                mine += [one["object_id"] for one in data["objects"]]
    return results


def judged(
    name: str, data: Any, number: int, mine: list[str], exact: bool
) -> tuple[str, str]:  # fmt: skip
    """Whether a result is this client's and true."""
    if name == "view_objects":
        crossed = set(data["shown"].values()) != set(mine)
        return ("crossed" if crossed else "ok"), str(data["shown"])
    if name == "compare_objects":
        crossed = [one["object_id"] for one in data["objects"]] != mine[-2:]
        wrong = exact and data["pairs"][0]["iou"] < 0.999
        return ("crossed" if crossed else "wrong" if wrong else "ok"), str(data["pairs"])
    (found,) = data["objects"]
    if exact and found["area"] != area(number):
        return "crossed", f"client {number}: {found}"
    return "ok", ""


async def all_clients(
    url: str, clients: int, calls: int, era: str, exact: bool
) -> tuple[Tally, list[list[Any]]]:
    """Every client at once."""
    tally = Tally()
    results: list[list[Any]] = [[] for _ in range(clients)]

    async def one(number: int) -> None:
        done = 0
        try:
            results[number] = await one_client(url, number, calls, era, tally, exact)
            done = 1
        except Exception as error:
            tally.note("lost", f"client {number}: {error!r}")
        if not done:
            tally.outcomes["clients lost"] += 1

    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(one, number)
    return tally, results


async def keep_busy(url: str, clients: int) -> None:
    """Segment calls without end, one after the other from each client."""

    async def one(number: int) -> None:
        async with connected(url) as client:
            while True:
                await client.call_tool("segment_object", question(number))

    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(one, number)


async def model_free_seconds(url: str, queued: int, looks: int = 60) -> dict[str, float]:
    """A call without a model while ``queued`` segment calls wait or run.

    Returns:
        The 95th percentile of its seconds, and the fewest and most calls that were seen waiting.
    """
    tally = Tally()
    waiting: list[float] = []
    others = None
    if queued:  # in a process of their own, so that only the server is shared
        command = [sys.executable, "-m", "benchmarks.load", "--busy", url, "--clients", str(queued)]
        others = subprocess.Popen(command)
    try:
        async with connected(url) as client:
            arguments = {"image": picture(0), "expression": "block 0"}
            first = await client.call_tool("segment_object", arguments)
            assert first.structured_content is not None
            image = first.structured_content["image_id"]
            with anyio.fail_after(PATIENCE):
                while (await gauges(url))["waiting_calls"] < _LEAST_WAITING * queued:
                    await anyio.sleep(0.2)
            for look in range(looks):
                if look % 10 == 0:
                    waiting.append((await gauges(url))["waiting_calls"])
                begun = time.perf_counter()
                await client.call_tool("view_objects", {"image": image})
                tally.seconds.setdefault("view_objects", []).append(time.perf_counter() - begun)
                await anyio.sleep(0.02)
    finally:
        if others:
            others.kill()
            others.wait()
    p95 = round(tally.percentile(["view_objects"], 0.95), 4)
    return {"p95": p95, "fewest_waiting": min(waiting), "most_waiting": max(waiting)}


async def measure(
    url: str, process: psutil.Process, clients: int, calls: int, era: str, exact: bool
) -> dict[str, Any]:
    """All clients at once, then each result of some against a single client's."""
    await all_clients(url, 1, 3, era, exact)  # loads the models
    memory = Memory(url, process)
    begun = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(memory.watch)
        tally, results = await all_clients(url, clients, calls, era, exact)
        tasks.cancel_scope.cancel()
    seconds = time.perf_counter() - begun
    while_asked = memory.report()
    await anyio.sleep(1)
    await memory.sample()
    compared = 0
    for number in range(0, clients, max(1, clients // _COMPARED)):
        single = await one_client(url, number, calls, era, Tally(), exact)
        if len(results[number]) == len(single) == calls:
            compared += 1
            if results[number] != single:
                tally.note("wrong", f"client {number} alone was answered otherwise")
    counted = sum(tally.outcomes[name] for name in ("ok", "busy", "lost", "crossed", "wrong"))
    return {
        "clients": clients,
        "calls": clients * calls,
        "not_made": max(0, clients * calls - counted),
        "protocol": era,
        "outcomes": dict(tally.outcomes),
        "compared_with_a_single_client": compared,
        "seconds": round(seconds, 1),
        "p50_segment": round(tally.percentile(["segment_object"], 0.5), 3),
        "p95_segment": round(tally.percentile(["segment_object"], 0.95), 3),
        "p95_model_free": round(tally.percentile(MODEL_FREE, 0.95), 3),
        **while_asked,
        "resident_and_kept_mb_afterwards": memory.latest,
        "examples": tally.examples,
    }


async def beside_the_queue(url: str) -> dict[str, Any]:
    """Whether calls without a model wait for those that need one."""
    idle = await model_free_seconds(url, 0)
    busy = await model_free_seconds(url, QUEUED)
    most = round(3 * idle["p95"] + 0.05, 4)
    return {"view_idle": idle, f"view_with_{QUEUED}_segment_calls": busy, "p95_may_be": most}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--era", choices=["legacy", "auto"], default="legacy")
    parser.add_argument("--think", type=float, default=0.005)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--sigterms", type=int, default=0)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--busy", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve, max(args.clients, QUEUED), args.think, args.state)
    elif args.busy:
        anyio.run(keep_busy, args.busy, args.clients)
    elif args.kills or args.sigterms:
        print(json.dumps(ended(args), indent=1))
    else:
        show(loaded(args), args.json)


def ended(args: argparse.Namespace) -> dict[str, Any]:
    """What is lost when servers are ended."""
    from benchmarks import load_ends

    if args.sigterms:
        return anyio.run(load_ends.drain, args.sigterms, args.clients, args.think)
    with tempfile.TemporaryDirectory() as folder:
        state = args.state or Path(folder)
        return anyio.run(load_ends.survive, args.kills, args.clients, args.think, state)


def loaded(args: argparse.Namespace) -> dict[str, Any]:
    """What a server does under load."""
    port = free_port()
    command = serving(port, args.clients, args.think)
    if args.embedded:
        command = [sys.executable, "-m", "sam4mllm_tool", "mcp", "--transport", "http", "--port"]
        command.append(str(port))
    exact = not args.embedded
    with server(command, port) as (url, process):
        report = anyio.run(measure, url, process, args.clients, args.calls, args.era, exact)
    if exact:
        port = free_port()
        with server(serving(port, QUEUED, _THINK_WHILE_QUEUED), port) as (url, _):
            report |= anyio.run(beside_the_queue, url)
    return report


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report."""
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for name, value in report.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
