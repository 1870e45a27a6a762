"""Many clients at once against the real MCP server over HTTP, with the official client.

Run ``python -m benchmarks.load --clients 200 --calls 20 --json``. Every client has a picture of its
own whose answer is known; what it gets back is compared with the truth and with what a single
client got. The models are honest stand-ins that take ``--think`` seconds per question
(``--embedded`` takes the shipped ones, whose answers are compared with the single client's only).

``--kills 20`` ends a server that keeps its state with ``kill -9`` that often, at random moments of
the clients' work, and asks after every restart for every object it had acknowledged.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import math
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import psutil
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline.model import Sam4MLLM

WIDTH, HEIGHT = 128, 96
RED = (214, 40, 40)


def block(number: int) -> tuple[int, int, int, int]:
    """The block of client ``number``: no two clients' blocks have the same area and place."""
    left, top = 4 + number % 16 * 2, 4 + number // 16 % 16 * 2
    return left, top, left + 24 + number % 16 * 2, top + 20 + number // 16


def picture(number: int) -> str:
    """The picture of client ``number`` as a data URI."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    left, top, right, bottom = block(number)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=RED)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def area(number: int) -> int:
    """Pixels of the block."""
    left, top, right, bottom = block(number)
    return (right - left) * (bottom - top)


# -- the server ----------------------------------------------------------------------------------


def serve(port: int, clients: int, think: float, state: Path | None) -> None:
    """A server with stand-in models that know every client's block; with state, each is a user."""
    from sam4mllm_integrations.mcp_server import Credentials, HttpSettings
    from sam4mllm_integrations.mcp_server import serve as serve_mcp

    users = {f"client-{number}": token(number) for number in range(clients)} if state else {}
    http = HttpSettings(port=port, credentials=Credentials(users=users))
    serve_mcp(lambda: stand_ins(clients, think), transport="http", http=http, state=state)


def stand_ins(clients: int, think: float) -> Sam4MLLM:
    """Stand-in models that know every client's block and take ``think`` seconds per reply."""
    import numpy as np

    from sam4mllm_tool.pipeline.model import Sam4MLLM
    from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
    from sam4mllm_tool.types import Mask

    class Thinking(TruthfulMllm):
        def generate(self, *args: Any, **options: Any) -> Any:
            time.sleep(think)
            self.said.clear()
            return super().generate(*args, **options)

    truth = {}
    for number in range(clients):
        left, top, right, bottom = block(number)
        pixels = np.zeros((HEIGHT, WIDTH), bool)
        pixels[top:bottom, left:right] = True
        truth[f"block {number}"] = [Mask(pixels)]
    return Sam4MLLM(Thinking(truth), ColourSegmenter())


def token(number: int) -> str:
    """The token of client ``number``."""
    return f"token-of-client-{number}"


@contextlib.contextmanager
def server(command: Sequence[str], port: int) -> Iterator[tuple[str, psutil.Process]]:
    """The server's process, once it answers."""
    process = subprocess.Popen(command)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx2.HTTPError):
                httpx2.get(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    async with Client(url, mode=era, read_timeout_seconds=300) as client:
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
                busy = isinstance(error.error.data, dict) and error.error.data["error"] == "Busy"
                tally.note("busy" if busy else "lost", str(error))
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
        arguments = {"image": picture(number), "expression": f"block {number}"}
        async with Client(url, read_timeout_seconds=300) as client:
            while True:
                await client.call_tool("segment_object", arguments)

    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(one, number)


async def model_free_seconds(url: str, queued: int, looks: int = 60) -> float:
    """95th percentile of a call without a model while ``queued`` segment calls are in progress."""
    tally = Tally()
    others = None
    if queued:  # in a process of their own, so that only the server is shared
        command = [sys.executable, "-m", "benchmarks.load", "--busy", url, "--clients", str(queued)]
        others = subprocess.Popen(command)
        await anyio.sleep(5)
    try:
        async with Client(url) as client:
            arguments = {"image": picture(0), "expression": "block 0"}
            first = await client.call_tool("segment_object", arguments)
            assert first.structured_content is not None
            image = first.structured_content["image_id"]
            for _ in range(looks):
                begun = time.perf_counter()
                await client.call_tool("view_objects", {"image": image})
                tally.seconds.setdefault("view_objects", []).append(time.perf_counter() - begun)
                await anyio.sleep(0.02)
    finally:
        if others:
            others.kill()
    return tally.percentile(["view_objects"], 0.95)


# -- kill -9 -------------------------------------------------------------------------------------


async def survive(kills: int, clients: int, think: float, state: Path) -> dict[str, Any]:
    """Kill a server at random moments; every acknowledged object has to be there afterwards."""
    acknowledged: list[dict[str, int]] = [{} for _ in range(clients)]
    checked = lost = 0
    chance = random.Random(0)

    async def look(url: str, number: int) -> None:
        nonlocal checked, lost
        async with as_user(url, number) as client:
            for object_id, expected in acknowledged[number].items():
                checked += 1
                with contextlib.suppress(MCPError):
                    uri = f"sam4mllm://masks/{object_id}.json"
                    (content,) = (await client.read_resource(uri)).contents
                    document = json.loads(content.text)  # type: ignore[union-attr]
                    if document["annotations"][0]["area"] == expected:
                        continue
                lost += 1

    async def work(url: str, number: int) -> None:
        arguments = {"image": picture(number), "expression": f"block {number}"}
        with contextlib.suppress(Exception):
            async with as_user(url, number) as client:
                while True:
                    answer = await client.call_tool("segment_object", arguments)
                    assert answer.structured_content is not None
                    (one,) = answer.structured_content["objects"]
                    acknowledged[number][one["object_id"]] = one["area"]

    for _ in range(kills + 1):
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.load", "--serve", str(port), "--state"]
        command += [str(state), "--clients", str(clients), "--think", str(think)]
        with server(command, port) as (url, process):
            async with anyio.create_task_group() as tasks:
                for number in range(clients):
                    tasks.start_soon(look, url, number)
            async with anyio.create_task_group() as tasks:
                for number in range(clients):
                    tasks.start_soon(work, url, number)
                before = sum(map(len, acknowledged))
                while sum(map(len, acknowledged)) < before + clients:
                    await anyio.sleep(0.01)
                await anyio.sleep(chance.uniform(0.0, 1.0))
                process.kill()
    handles = sum(map(len, acknowledged))
    return {"kills": kills, "acknowledged": handles, "checks": checked, "lost": lost}


@contextlib.asynccontextmanager
async def as_user(url: str, number: int) -> AsyncIterator[Client]:
    """A client that shows its user's token."""
    headers = {"Authorization": f"Bearer {token(number)}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


async def measure(
    url: str, process: psutil.Process, clients: int, calls: int, era: str, exact: bool
) -> dict[str, Any]:
    """All clients at once, then each result against a single client's."""
    megabyte = 1024**2
    await all_clients(url, 1, 3, era, exact)  # loads the models
    before = process.memory_info().rss / megabyte
    begun = time.perf_counter()
    tally, results = await all_clients(url, clients, calls, era, exact)
    seconds = time.perf_counter() - begun
    for number in range(0, clients, max(1, clients // 10)):
        alone = Tally()
        single = await one_client(url, number, calls, era, alone, exact)
        complete = len(results[number]) == len(single) == calls
        if complete and results[number] != single:
            tally.note("wrong", f"client {number} alone was answered otherwise")
    report: dict[str, Any] = {
        "clients": clients,
        "calls": clients * calls,
        "protocol": era,
        "outcomes": dict(tally.outcomes),
        "seconds": round(seconds, 1),
        "p50_segment": round(tally.percentile(["segment_object"], 0.5), 3),
        "p95_segment": round(tally.percentile(["segment_object"], 0.95), 3),
        "p95_model_free": round(tally.percentile(MODEL_FREE, 0.95), 3),
        "memory_before_mb": round(before),
        "memory_after_mb": round(process.memory_info().rss / megabyte),
        "examples": tally.examples,
    }
    if exact:
        report["p95_view_idle"] = round(await model_free_seconds(url, 0), 4)
        report["p95_view_with_30_segment_calls"] = round(await model_free_seconds(url, 30), 4)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--era", choices=["legacy", "auto"], default="legacy")
    parser.add_argument("--think", type=float, default=0.005)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--busy", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve, max(args.clients, 30), args.think, args.state)
        return
    if args.kills:
        with tempfile.TemporaryDirectory() as folder:
            state = args.state or Path(folder)
            print(json.dumps(anyio.run(survive, args.kills, args.clients, args.think, state)))
        return
    if args.busy:
        anyio.run(keep_busy, args.busy, args.clients)
        return
    port = free_port()
    command = [sys.executable, "-m"]
    if args.embedded:
        command += ["sam4mllm_tool", "mcp", "--transport", "http", "--port", str(port)]
    else:
        command += ["benchmarks.load", "--serve", str(port), "--clients", str(args.clients)]
        command += ["--think", str(args.think)]
    with server(command, port) as (url, process):
        report = anyio.run(
            measure, url, process, args.clients, args.calls, args.era, not args.embedded
        )
    if args.json:
        print(json.dumps(report, indent=1))
        return
    for name, value in report.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
