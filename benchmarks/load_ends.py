"""Servers that are ended amid their clients' work: what was acknowledged, and what was accepted.

``python -m benchmarks.load --kills 20`` ends a server that keeps its state with ``kill -9`` that
often, at random moments, and asks after every restart for every object it had acknowledged.
``--sigterms 10`` ends servers with SIGTERM: every call sent before must be answered or refused as
busy, and the process must end by itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
from mcp import MCPError

from benchmarks.load_server import (
    PATIENCE,
    area,
    as_user,
    connected,
    free_port,
    is_busy,
    question,
    server,
    serving,
)

_SECONDS_TO_END = 60


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
        with contextlib.suppress(Exception):
            async with as_user(url, number) as client:
                while True:
                    answer = await client.call_tool("segment_object", question(number))
                    assert answer.structured_content is not None
                    (one,) = answer.structured_content["objects"]
                    acknowledged[number][one["object_id"]] = one["area"]

    for _ in range(kills + 1):
        port = free_port()
        command = [*serving(port, clients, think), "--state", str(state)]
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


async def drain(times: int, clients: int, think: float) -> dict[str, Any]:
    """SIGTERM at random moments of the clients' work, each with a call on the way at all times.

    Returns:
        Calls sent before the signal: ``answered``, ``refused`` (busy), ``wrong`` or ``lost``; calls
        sent after it that met a closed door; and how the processes ended.
    """
    outcomes: Counter[str] = Counter()
    examples: list[str] = []
    chance = random.Random(0)
    ends: list[tuple[int | None, float]] = []
    signalled = math.inf

    def note(outcome: str, begun: float, what: str) -> None:
        if outcome == "lost" and begun > signalled:
            outcome = "sent too late"
        outcomes[outcome] += 1
        if outcome not in {"answered", "refused"} and len(examples) < 10:
            examples.append(f"{outcome}: {what[:200]}")

    async def work(url: str, number: int, times_answered: list[int]) -> None:
        begun = 0.0  # of the call that has no outcome yet
        try:
            async with connected(url) as client:
                while True:
                    begun = time.monotonic()
                    outcome, what = await _outcome(client, number)
                    note(outcome, begun, what)
                    begun = 0.0
                    if outcome != "answered":
                        return
                    times_answered[number] += 1
        except Exception as error:  # a client that lost its connection ends its calls at once
            if begun:
                note("lost", begun, repr(error))

    for _ in range(times):
        port = free_port()
        signalled = math.inf
        answered = [0] * clients
        with server(serving(port, clients, think), port) as (url, process):
            async with anyio.create_task_group() as tasks:
                for number in range(clients):
                    tasks.start_soon(work, url, number, answered)
                with anyio.fail_after(PATIENCE):
                    while not all(answered):
                        await anyio.sleep(0.01)
                await anyio.sleep(chance.uniform(0.0, 1.0))
                process.send_signal(signal.SIGTERM)
                signalled = time.monotonic()
            code = await anyio.to_thread.run_sync(process.wait, _SECONDS_TO_END)
            ends.append((code, round(time.monotonic() - signalled, 1)))
    return {
        "sigterms": times,
        "clients": clients,
        "outcomes": dict(outcomes),
        "exit_codes": sorted({str(code) for code, _ in ends}),
        "longest_end_seconds": max(seconds for _, seconds in ends),
        "examples": examples,
    }


async def _outcome(client: Any, number: int) -> tuple[str, str]:
    try:
        answer = await client.call_tool("segment_object", question(number))
    except MCPError as error:
        return ("refused" if is_busy(error) else "lost"), str(error)
    except Exception as error:
        return "lost", repr(error)
    if answer.is_error or answer.structured_content["objects"][0]["area"] != area(number):
        return "wrong", str(answer.content)
    return "answered", ""
