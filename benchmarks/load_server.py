"""The server under load: stand-in models that know each client's picture, and what it shows."""

from __future__ import annotations

import base64
import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
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
MEGABYTE = 1024**2
PATIENCE = 300.0
_SAMPLE_SECONDS = 5.0


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


def question(number: int) -> dict[str, Any]:
    """The arguments with which client ``number`` segments its block."""
    return {"image": picture(number), "expression": f"block {number}"}


def is_busy(error: MCPError) -> bool:
    """Whether the server refused the call because it has too much to do."""
    return isinstance(error.error.data, dict) and error.error.data.get("error") == "Busy"


def serve(port: int, clients: int, think: float, state: Path | None) -> None:
    """A server with stand-in models that know every client's block; with state, each is a user."""
    from sam4mllm_integrations.mcp_server import Credentials, HttpSettings
    from sam4mllm_integrations.mcp_server import serve as serve_mcp

    users = {f"client-{number}": token(number) for number in range(clients)} if state else {}
    http = HttpSettings(port=port, credentials=Credentials(users=users))
    serve_mcp(lambda: stand_ins(clients, think), transport="http", http=http, state=state)


def stand_ins(clients: int, think: float, in_turn: bool = False) -> Sam4MLLM:
    """Stand-in models that know every client's block and take ``think`` seconds per reply.

    Concurrent callers wait side by side, or ``in_turn``, as for a model on one GPU.
    """
    import numpy as np

    from sam4mllm_tool.pipeline.model import Sam4MLLM
    from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
    from sam4mllm_tool.types import Mask

    turn = threading.Lock() if in_turn else contextlib.nullcontext()

    class Thinking(TruthfulMllm):
        def generate(self, *args: Any, **options: Any) -> Any:
            with turn:
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


def serving(port: int, clients: int, think: float) -> list[str]:
    """The command of a server with stand-in models."""
    command = [sys.executable, "-m", "benchmarks.load", "--serve", str(port)]
    return [*command, "--clients", str(clients), "--think", str(think)]


@contextlib.asynccontextmanager
async def connected(url: str, era: str = "auto", **headers: str) -> AsyncIterator[Client]:
    """The official client. It is patient: all clients share a processor, and the server is meant.

    Nothing is encrypted here, and making ready to check certificates takes a client 30 ms.
    """
    async with (
        httpx2.AsyncClient(headers=headers, timeout=PATIENCE, verify=False) as http,
        Client(
            streamable_http_client(url, http_client=http),
            mode=era,
            read_timeout_seconds=PATIENCE,
        ) as client,
    ):
        yield client


def as_user(url: str, number: int) -> contextlib.AbstractAsyncContextManager[Client]:
    """A client that shows its user's token."""
    return connected(url, Authorization=f"Bearer {token(number)}")


async def gauges(url: str) -> dict[str, float]:
    """What the server tells of itself: waiting calls, bytes kept, …"""
    async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        text = (await http.get(url.replace("/mcp", "/metrics"))).text
    lines = [line.split() for line in text.splitlines() if line.startswith("sam4mllm_")]
    return {line[0].removeprefix("sam4mllm_"): float(line[1]) for line in lines if len(line) == 2}


class Memory:
    """A server's memory over time, in MB: what is resident, its workers included, and what of it
    are pictures and masks kept for clients.
    """

    def __init__(self, url: str, process: psutil.Process) -> None:
        self._url, self._process = url, process
        self._begun = time.monotonic()
        self.samples: list[tuple[float, float, float]] = []

    async def sample(self) -> None:
        """Note the present seconds, resident and kept memory."""
        resident = 0
        for one in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker has just ended
                resident += one.memory_info().rss
        kept = (await gauges(self._url))["kept_bytes"]
        seconds = time.monotonic() - self._begun
        self.samples.append((seconds, resident / MEGABYTE, kept / MEGABYTE))

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            await self.sample()
            await anyio.sleep(_SAMPLE_SECONDS)

    def report(self) -> dict[str, Any]:
        """The start, each minute and the end; and how fast the memory grew in the second half,
        what is kept for clients left out.
        """
        start = self.samples[0][0]
        shown: dict[str, list[float]] = {}
        for seconds, resident, kept in self.samples:
            minute = int((seconds - start) // 60)
            shown.setdefault(f"minute {minute}" if minute else "start", [resident, kept])
        shown["end"] = list(self.samples[-1][1:])
        later = self.samples[len(self.samples) // 2 :]
        minutes = [seconds / 60 for seconds, _, _ in later]
        own = [resident - kept for _, resident, kept in later]
        slope = statistics.linear_regression(minutes, own).slope if len(later) > 1 else None
        return {
            "resident_and_kept_mb": {name: _rounded(two) for name, two in shown.items()},
            "growth_mb_per_minute": None if slope is None else round(slope, 1),
        }

    @property
    def latest(self) -> list[float]:
        """The last sample's resident and kept memory."""
        return _rounded(self.samples[-1][1:])


def _rounded(sizes: Sequence[float]) -> list[float]:
    return [round(size, 1) for size in sizes]
