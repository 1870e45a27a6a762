"""Model replicas and tool servers on Ray Serve while they are killed, added and removed.

``python -m benchmarks.replicas --clients 50 --calls 20 --kill-every 5 --json`` starts a cluster on
this machine (``--address`` joins one) with the embedded models (``--stand-ins``: honest stand-ins
that take ``--think`` seconds per reply, one after the other). Every client has its own
picture, whose answer is known beforehand, and gives each call an id. Meanwhile processes of
``--victims`` (Mllm, Segmenter, Tools) end by ``kill -9``; with ``--change-every`` the number of
replicas goes down to one and up again. A call counts as

- *failed* if it ends in an error;
- *crossed* if its answer is not the client's own;
- *doubled* if it left objects that it did not answer with, or is answered otherwise when it is
  made again under its id;
- *lost* if an object that it answered with is not there at the end.

Where Tools are among the victims, a client whose connection breaks repeats the call under the same
id; otherwise no client repeats anything. Then each client makes all its calls once more under their
ids.

``--compare`` measures calls per second with one replica and with two, without kills. A replica is
an MLLM and a segmenter on one core, so that two have twice the hardware; the tool server and the
clients take what they need of both. ``--rounds`` pairs are measured, one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import secrets
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import psutil
from mcp import MCPError
from mcp.types import RequestParamsMeta
from sam4mllm_integrations.mcp_tools import CALL_ID

from benchmarks.load import Tally
from benchmarks.load_server import PATIENCE, as_user, free_port
from benchmarks.ray_app import (
    MODELS,
    Question,
    Served,
    block_questions,
    cpu_between,
    cpu_seconds,
    own_stdout,
    processes,
    scene_questions,
    served,
)
from sam4mllm_tool.cluster.connect import cluster

OUTCOMES = ("ok", "failed", "crossed", "doubled", "lost")

# -- clients -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """A client that gives each call an id, which no other run of the benchmark has given.

    Attributes:
        repeat: calls whose connection breaks are made again.
    """

    url: str
    number: int
    repeat: bool
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    async def call(self, name: str, arguments: dict[str, Any], call: str) -> Any:
        """A tool's answer."""
        until = time.monotonic() + PATIENCE
        meta = cast(RequestParamsMeta, {CALL_ID: f"{self.run} {call}"})
        while True:
            try:
                async with as_user(self.url, self.number) as client:
                    return await client.call_tool(
                        name, arguments, read_timeout_seconds=PATIENCE, meta=meta
                    )
            except Exception as error:
                broken = not isinstance(error, MCPError) or "Busy" in str(error.error.data)
                if not (self.repeat and broken) or time.monotonic() > until:
                    raise
                await anyio.sleep(random.uniform(0.2, 1.0))

    async def objects(self, image: str, call: str) -> set[str]:
        """Handles of all objects of a picture."""
        answer = await self.call("view_objects", {"image": image}, call)
        return set(answer.structured_content["shown"].values())


async def one_client(
    caller: Caller, question: Question, calls: int, tally: Tally, over: anyio.Event
) -> None:
    """One client's calls by turns: segment, segment again, compare both."""
    try:
        image, mine = question.image, list[str]()
        before = await caller.objects(image, "before")
        answered: list[tuple[str, dict[str, Any], list[str]]] = []
        for turn in itertools.count():
            if turn >= calls:
                if over.is_set():
                    break
                await anyio.sleep(0.5)
            compares = turn % 3 == 2 and len(mine) >= 2
            name = "compare_objects" if compares else "segment_object"
            arguments: dict[str, Any] = {"object_ids": mine[-2:]}
            if not compares:
                arguments = {"image": image, "expression": question.expression}
            data = await _judged(caller, name, arguments, f"call {turn}", question, tally)
            if data and not compares:
                image = data["image_id"]
                answered.append((f"call {turn}", arguments, _handles(data)))
                mine += _handles(data)
        for call, arguments, handles in answered if caller.repeat else ():
            answer = await caller.call("segment_object", arguments, call)
            if _handles(answer.structured_content) != handles:
                tally.note("doubled", f"client {caller.number}: {call} {answer}")
        made = await caller.objects(image, "after") - before
    except Exception as error:
        tally.note("failed", f"client {caller.number}: {error!r}")
        return
    there, answers = Counter(made), Counter(mine)
    for outcome, wrong in (("doubled", there - answers), ("lost", answers - there)):
        for handle in wrong:
            tally.note(outcome, f"client {caller.number}: {handle}")


async def _judged(
    caller: Caller,
    name: str,
    arguments: dict[str, Any],
    call: str,
    question: Question,
    tally: Tally,
) -> Any:
    """The result of a call, which is noted; ``None`` if it failed or is somebody else's."""
    begun = time.perf_counter()
    try:
        answer = await caller.call(name, arguments, call)
    except Exception as error:
        tally.note("failed", repr(error))
        return None
    tally.seconds.setdefault(name, []).append(time.perf_counter() - begun)
    data = answer.structured_content
    if answer.is_error:
        tally.note("failed", str(answer.content))
        return None
    if name == "compare_objects":
        right = _handles(data) == arguments["object_ids"]
    else:
        right = tuple(one["area"] for one in data["objects"]) == question.areas
    tally.note("ok" if right else "crossed", f"client {caller.number}: {data}")
    return data if right else None


def _handles(data: Any) -> list[str]:
    return [one["object_id"] for one in data["objects"]]


# -- what happens meanwhile ----------------------------------------------------------------------


async def kills(victims: Sequence[str], every: float, killed: Counter[str]) -> None:
    """End a random process of the victims every so many seconds, until cancelled.

    On a slow machine a new process takes longer to start than the time between two kills, and
    nothing would ever be served. So of several processes of a deployment the last is spared, and a
    deployment with only one has to have been there at four checks.
    """
    chance = random.Random(0)
    most, checks = Counter[str](), Counter[str]()
    while True:
        await anyio.sleep(every)
        found = []
        for name in victims:
            alive = await anyio.to_thread.run_sync(processes, name)
            most[name] = max(most[name], len(alive))
            checks[name] = checks[name] + 1 if alive else 0
            if len(alive) > 1 or (most[name] == 1 and checks[name] >= 4):
                found += [(name, one) for one in alive]
        if found:
            name, process = chance.choice(found)
            with suppress(psutil.Error):
                process.kill()
                killed[name] += 1


async def changes(deploy: Callable[[int], None], numbers: Sequence[int], every: float) -> None:
    """Deploy other numbers of replicas by turns, every so many seconds, until cancelled."""
    while True:
        for number in numbers:
            await anyio.sleep(every)
            await anyio.to_thread.run_sync(deploy, number)


async def run(
    url: str,
    questions: Sequence[Question],
    calls: int,
    *,
    meanwhile: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    events: Callable[[Tally], Awaitable[None]] | None = None,
    repeat: bool = False,
) -> dict[str, Any]:
    """All clients at once; what came of their calls.

    Args:
        calls: of each client; they make more, at leisure, until the ``events`` are over.
        meanwhile: endless functions that run beside the clients.
        events: what happens beside the clients, seeing what became of the calls so far.
        repeat: clients repeat calls whose connection broke.
    """
    tally, over = Tally(), anyio.Event()
    cpu, begun = cpu_seconds(), time.perf_counter()

    async def happen() -> None:
        if events:
            await events(tally)
        over.set()

    async with anyio.create_task_group() as others:
        for function in (happen, *meanwhile):
            others.start_soon(function)
        async with anyio.create_task_group() as clients:
            for number, question in enumerate(questions):
                caller = Caller(url, number, repeat)
                clients.start_soon(one_client, caller, question, calls, tally, over)
        seconds = time.perf_counter() - begun
        others.cancel_scope.cancel()
    total = sum(tally.outcomes[name] for name in ("ok", "failed", "crossed"))
    used = cpu_between(cpu, cpu_seconds())
    return {
        "clients": len(questions),
        "calls": total,
        **{name: tally.outcomes[name] for name in OUTCOMES},
        "cpu_ms_per_call": {
            name: round(1000 * each / total, 1) for name, each in used.items() if each
        },
        "seconds": round(seconds, 1),
        "calls_per_second": round(total / seconds, 2),
        "p50_segment": round(tally.percentile(["segment_object"], 0.5), 3),
        "p95_segment": round(tally.percentile(["segment_object"], 0.95), 3),
        "examples": tally.examples,
    }


def compared(app: Served, questions: Sequence[Question], calls: int, rounds: int) -> dict[str, Any]:
    """Calls per second of one replica and of two, in pairs."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    report: dict[str, Any] = {}
    for _ in range(rounds):
        for number, found in rates.items():
            app.deploy(number)
            anyio.run(run, app.url, questions, 1)  # each picture finds its replica
            app.give_each_a_core()
            report[f"replicas_{number}"] = anyio.run(run, app.url, questions, calls)
            found.append(report[f"replicas_{number}"]["calls_per_second"])
            app.remove()  # else the pictures would stay where they are
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    return report | {"calls_per_second": rates, "ratio": round(statistics.median(ratios), 2)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--victims", nargs="*", default=MODELS)
    parser.add_argument("--kill-every", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--change-every", type=float, metavar="SECONDS")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stand-ins", action="store_true")
    parser.add_argument("--think", type=float, default=0.05)
    parser.add_argument("--address")
    parser.add_argument("--port", type=int, help="where Serve listens, on a cluster that has it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the replicas too: one has one core
    questions = (block_questions if args.stand_ins else scene_questions)(args.clients)
    think = args.think if args.stand_ins else None
    report: dict[str, Any] = {"models": "stand-ins" if args.stand_ins else "embedded"}
    with own_stdout() as out, tempfile.TemporaryDirectory() as folder, cluster(args.address):
        port, most = args.port or free_port(), 2 if args.compare else args.replicas
        app = served(Path(folder), port, args.clients, think, most)
        if args.compare:
            report |= compared(app, questions, args.calls, args.rounds)
        else:
            app.deploy(args.replicas)
            killed, numbers = Counter[str](), (1, args.replicas)
            meanwhile: list[Callable[[], Coroutine[Any, Any, None]]]
            meanwhile = [partial(kills, args.victims, args.kill_every, killed)]
            if args.change_every:
                meanwhile.append(partial(changes, app.deploy, numbers, args.change_every))
            begin = partial(run, meanwhile=meanwhile, repeat="Tools" in args.victims)
            report |= anyio.run(begin, app.url, questions, args.calls)
            report["killed"] = dict(killed)
        print(json.dumps(report, indent=1) if args.json else report, file=out)


if __name__ == "__main__":
    main()
