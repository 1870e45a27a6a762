"""Running the server's process: connections that may not dawdle, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from types import FrameType
from typing import Any

import anyio
import uvicorn
from mcp.server.stdio import stdio_server
from uvicorn.protocols.http.h11_impl import H11Protocol

from sam4mllm_integrations.mcp_http import HttpSettings, http_app
from sam4mllm_integrations.mcp_tools import ToolServer
from sam4mllm_tool.errors import InputError

_SECONDS_FOR_LAST_BYTES = 5
_OTHER_FILES = 512


async def serve_stdio(tools: ToolServer) -> None:
    """Serve one client over stdin and stdout until it leaves, or until SIGTERM."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_end_after_sigterm, tools, tasks.cancel_scope)
        async with stdio_server() as (reading, writing):
            await tools.server.run(reading, writing, tools.server.create_initialization_options())
        tasks.cancel_scope.cancel()


async def _end_after_sigterm(tools: ToolServer, scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            tools.draining = True
            with anyio.move_on_after(tools.limits.drain_seconds):
                while tools.running:
                    await anyio.sleep(0.05)
                await anyio.sleep(0.1)  # the last answer is on its way
            scope.cancel()


def serve_http(tools: ToolServer, settings: HttpSettings) -> None:
    """Serve over HTTP until interrupted; SIGTERM lets running calls end first.

    Raises:
        InputError: an address that other machines reach, without a token; or one that cannot be
            listened on.
    """
    files = _allow_files(settings.connections + _OTHER_FILES)
    settings = replace(settings, connections=max(1, files - _OTHER_FILES))
    try:
        HttpServer(tools, settings).run()
    except SystemExit as error:  # uvicorn has logged why
        raise InputError(
            f"{settings.host}, port {settings.port} cannot be listened on",
            hint="Stop the server that listens there, or choose another --port.",
        ) from error


def _allow_files(number: int) -> int:
    """Raise the soft limit on open files, often 1,024, so far as the hard limit lets us.

    Else idle connections use up what the bound on connections grants, and nobody gets in.

    Returns:
        How many of ``number`` may be open.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return number
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class HttpServer(uvicorn.Server):
    """uvicorn that first refuses new calls, then answers the running ones, then ends."""

    def __init__(self, tools: ToolServer, settings: HttpSettings) -> None:
        class Connection(_TimedConnection):
            header_seconds = settings.header_seconds

        super().__init__(
            uvicorn.Config(
                http_app(tools, settings),
                host=settings.host,
                port=settings.port,
                http=Connection,
                limit_concurrency=settings.connections,
                timeout_keep_alive=settings.keep_alive_seconds,
                timeout_graceful_shutdown=_SECONDS_FOR_LAST_BYTES,
                log_level="warning",
            )
        )
        self._tools = tools
        self._drained_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains. A second Ctrl-C ends at once.

        A second SIGTERM changes nothing: a process manager and the shell around the server may both
        send one.
        """
        if not self._tools.draining:
            self._tools.draining = True
            self._drained_at = time.monotonic() + self._tools.limits.drain_seconds
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether to end."""
        drained = not self._tools.answers or time.monotonic() > self._drained_at
        return await super().on_tick(counter) or (self._tools.draining and drained)


class _TimedConnection(H11Protocol):
    """Closes a connection on which no request is complete in time, from its first byte on."""

    header_seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        """Time runs while a request has begun to arrive and its headers are not complete."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
