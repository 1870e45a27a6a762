"""Model replicas and tool servers on Ray Serve while they are killed, added and removed.

``python -m benchmarks.replicas --clients 50 --calls 20 --kill-every 5 --json`` starts a cluster on
this machine (``--address`` joins one) with the embedded models (``--stand-ins``: honest stand-ins
that take ``--think`` seconds per reply). Every client has a picture of its own, whose answer is
known beforehand, and gives each call an id. Meanwhile processes of ``--victims`` (Mllm, Segmenter,
Tools) end by ``kill -9``. A call counts as *failed* if it ends in an error, *crossed* if its
answer is not the client's own, *doubled* if it left more objects than it answered with.

Where Tools are among the victims, a client whose connection breaks repeats the call under the same
id; otherwise no client repeats anything.

``--compare`` measures calls per second with one replica and with two, without kills.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import anyio
import psutil
import ray
from mcp import MCPError
from mcp.types import RequestParamsMeta
from sam4mllm_integrations.mcp_ray import NAME, ServeSettings, deploy, front
from sam4mllm_integrations.mcp_tools import CALL_ID

from benchmarks.load import Tally
from benchmarks.load_server import area, as_user, free_port, picture, stand_ins, token
from sam4mllm_tool.cluster.connect import cluster
from sam4mllm_tool.cluster.deployments import model_deployment

PATIENCE = 300.0
"""Seconds for which a client repeats a call whose connection broke."""


@dataclass(frozen=True)
class Question:
    """What a client asks about its picture, and what the answer must be.

    Attributes:
        image: the picture as a data URI.
        areas: pixels of the masks that a single process draws.
    """

    image: str
    expression: str
    areas: tuple[int, ...]


def block_questions(clients: int) -> list[Question]:
    """Every client's block; the stand-ins know them all."""
    return [
        Question(picture(number), f"block {number}", (area(number),)) for number in range(clients)
    ]


def scene_questions(clients: int) -> list[Question]:
    """A scene for every client, with what the embedded models answer in this process."""
    from sam4mllm_tool.evaluation.scenes import scene_cases
    from sam4mllm_tool.pipeline.model import load

    model, found = load(), []
    seen: set[str] = set()
    for case in scene_cases(7, 40 * clients)():
        if case.image in seen:
            continue
        image = case.open_image()
        objects = model.segment(image, case.expression).objects
        if not objects:
            continue
        seen.add(case.image)
        buffer = BytesIO()
        image.pil.save(buffer, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        found.append(Question(uri, case.expression, tuple(one.mask.area for one in objects)))
        if len(found) == clients:
            break
    return found


# -- what is served ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """An application that can be deployed again with other numbers of replicas.

    Attributes:
        settings: of the tool servers.
        mllm, segmenter: load one of the models.
    """

    settings: ServeSettings
    mllm: Callable[[], Any]
    segmenter: Callable[[], Any]

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.settings.port}/mcp"

    def deploy(self, replicas: int) -> None:
        """Deploy it, or change the number of replicas of what is deployed."""
        cpus = self.settings.cpus
        options: dict[str, Any] = {"replicas": replicas, "cpus": cpus, "gpus": 0, "calls": 8}
        deploy(
            front(
                self.settings,
                model_deployment("Mllm", self.mllm, **options),
                model_deployment("Segmenter", self.segmenter, **options),
            ),
            self.settings,
        )


def served(folder: Path, port: int, clients: int, think: float | None) -> Served:
    """The application for so many clients, with stand-ins if they are to ``think``."""
    from sam4mllm_tool.mllm import load_mllm
    from sam4mllm_tool.segmenter import load_segmenter

    tokens = folder / "tokens"
    tokens.write_text("".join(f"client-{n} {token(n)}\n" for n in range(clients)))
    settings = ServeSettings(
        port=port, cpus=0.1, deadline=2 * PATIENCE, tokens=tokens, state=folder / "state"
    )
    if think is None:
        return Served(settings, load_mllm, load_segmenter)
    return Served(
        settings,
        partial(_part, "mllm", clients, think),
        partial(_part, "segmenter", clients, think),
    )


def _part(name: str, clients: int, think: float) -> Any:
    return getattr(stand_ins(clients, think), name)


def processes(deployment: str) -> list[psutil.Process]:
    """The replicas of a deployment on this machine, of the cluster that is joined."""
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            title = "".join(process.cmdline()[:1])
            if title.startswith(f"ray::ServeReplica:{NAME}:{deployment}"):
                parent = process.parent()
                if parent and address in parent.cmdline():
                    found.append(process)
    return found


def _cpu_seconds(deployment: str) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes(deployment))


# -- clients and kills ---------------------------------------------------------------------------


async def one_client(
    url: str, number: int, question: Question, calls: int, tally: Tally, repeat: bool
) -> None:
    """One client's calls by turns: segment, segment again, compare both."""
    image, mine = question.image, list[str]()
    for turn in range(calls):
        if turn % 3 == 2 and len(mine) >= 2:
            name: str = "compare_objects"
            arguments: dict[str, Any] = {"object_ids": mine[-2:]}
        else:
            name = "segment_object"
            arguments = {"image": image, "expression": question.expression}
        begun = time.perf_counter()
        try:
            answer = await _called(url, number, name, arguments, f"call-{turn}", repeat)
        except Exception as error:
            tally.note("failed", repr(error))
            continue
        tally.seconds.setdefault(name, []).append(time.perf_counter() - begun)
        data = answer.structured_content
        if answer.is_error:
            tally.note("failed", str(answer.content))
        elif name == "compare_objects":
            right = [one["object_id"] for one in data["objects"]] == mine[-2:]
            tally.note("ok" if right else "crossed", str(data))
        else:
            right = tuple(one["area"] for one in data["objects"]) == question.areas
            tally.note("ok" if right else "crossed", f"client {number}: {data}")
            image = data["image_id"]
            mine += [one["object_id"] for one in data["objects"]]
    answer = await _called(url, number, "view_objects", {"image": image}, "last", True)
    there = sorted(answer.structured_content["shown"].values())
    for outcome, handles in (("doubled", set(there) - set(mine)), ("lost", set(mine) - set(there))):
        for handle in handles:
            tally.note(outcome, f"client {number}: {handle}")


async def _called(
    url: str, number: int, name: str, arguments: dict[str, Any], call_id: str, repeat: bool
) -> Any:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            async with as_user(url, number) as client:
                return await client.call_tool(
                    name,
                    arguments,
                    read_timeout_seconds=PATIENCE,
                    meta=cast(RequestParamsMeta, {CALL_ID: call_id}),
                )
        except Exception as error:
            broken = not isinstance(error, MCPError) or "Busy" in str(error.error.data)
            if not (repeat and broken) or time.monotonic() > until:
                raise
            await anyio.sleep(random.uniform(0.2, 1.0))


async def kills(victims: Sequence[str], every: float, killed: list[str]) -> None:
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
                killed.append(name)


@asynccontextmanager
async def meanwhile(function: Callable[..., Any] | None, *args: Any) -> AsyncIterator[None]:
    """Do something else beside the block, until it ends."""
    async with anyio.create_task_group() as tasks:
        if function:
            tasks.start_soon(function, *args)
        yield
        tasks.cancel_scope.cancel()


async def run(
    url: str,
    questions: Sequence[Question],
    calls: int,
    *,
    victims: Sequence[str] = (),
    every: float = 5.0,
    beside: Callable[[], Any] | None = None,
    repeat: bool = False,
) -> dict[str, Any]:
    """All clients at once; what came of their calls.

    Args:
        victims: deployments whose processes are killed.
        every: seconds between kills.
        beside: an asynchronous function run meanwhile.
        repeat: clients repeat calls whose connection broke, as they do if Tools are victims.
    """
    tally, killed = Tally(), list[str]()
    cpu = _cpu_seconds("Tools")
    begun = time.perf_counter()
    async with (
        meanwhile(kills if victims else None, victims, every, killed),
        meanwhile(beside),
        anyio.create_task_group() as clients,
    ):
        for number, question in enumerate(questions):
            again = repeat or "Tools" in victims
            clients.start_soon(one_client, url, number, question, calls, tally, again)
    seconds, total = time.perf_counter() - begun, len(questions) * calls
    wanted = ("ok", "failed", "crossed", "doubled", "lost")
    return {
        "clients": len(questions),
        "calls": total,
        **{name: tally.outcomes[name] for name in wanted},
        "killed": {name: killed.count(name) for name in victims},
        "tool_server_cpu_ms_per_call": (
            None if "Tools" in victims else round(1000 * (_cpu_seconds("Tools") - cpu) / total, 1)
        ),
        "seconds": round(seconds, 1),
        "calls_per_second": round(total / seconds, 2),
        "p50_segment": round(tally.percentile(["segment_object"], 0.5), 3),
        "p95_segment": round(tally.percentile(["segment_object"], 0.95), 3),
        "examples": tally.examples,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--victims", nargs="*", default=["Mllm", "Segmenter"])
    parser.add_argument("--kill-every", type=float, default=5.0)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--stand-ins", action="store_true")
    parser.add_argument("--think", type=float, default=0.05)
    parser.add_argument("--address")
    parser.add_argument("--port", type=int, help="where Serve listens, on a cluster that has it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    questions = (block_questions if args.stand_ins else scene_questions)(args.clients)
    think = args.think if args.stand_ins else None
    report: dict[str, Any] = {"models": "stand-ins" if args.stand_ins else "embedded"}
    with tempfile.TemporaryDirectory() as folder, cluster(args.address):
        one = served(Path(folder), args.port or free_port(), args.clients, think)
        if args.compare:
            for number in (1, 2):
                one.deploy(number)
                report[f"replicas_{number}"] = anyio.run(run, one.url, questions, args.calls)
            rates = [report[f"replicas_{number}"]["calls_per_second"] for number in (1, 2)]
            report["ratio"] = round(rates[1] / rates[0], 2)
        else:
            one.deploy(args.replicas)
            begin = partial(run, victims=args.victims, every=args.kill_every)
            report |= anyio.run(begin, one.url, questions, args.calls)
    print(json.dumps(report, indent=1) if args.json else report)


if __name__ == "__main__":
    main()
