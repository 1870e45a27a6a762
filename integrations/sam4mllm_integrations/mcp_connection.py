"""Sessions with a running MCP server over HTTP, with typed errors for what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

from anyio.from_thread import start_blocking_portal

from sam4mllm_integrations.hosts import is_loopback
from sam4mllm_tool.errors import (
    AccessDenied,
    BackendError,
    Busy,
    CallTimeout,
    EndpointError,
    ImageError,
    InputError,
    Sam4MllmError,
)

try:
    import httpx2
    import mcp_types as types
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared.exceptions import MCPError
except ImportError as error:
    raise ImportError('the MCP client needs: pip install "sam4mllm-tool[mcp]"') from error

T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_LARGEST_ANSWER = 256 * 1024**2
_ERRORS = {one.__name__: one for one in BackendError.__subclasses__()}


class Connection:
    """Where a server is, and how to ask it.

    Args:
        server: its address; ``/mcp`` is added if it has no path.
        token: bearer token, if the server asks for one.
        call_seconds: how long a call may take; the server has a deadline of its own.
        busy_seconds: how long a busy server is asked again before the call fails.

    Raises:
        InputError: the address or the token cannot be right.
    """

    def __init__(
        self, server: str, token: str | None, *, call_seconds: float, busy_seconds: float
    ) -> None:
        self.url = _address(server)
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise InputError("the token holds characters that no token has", hint="Copy it again.")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._call_seconds = call_seconds
        self._busy_seconds = busy_seconds

    def run(self, ask: Callable[[Client], Awaitable[T]]) -> T:
        """Ask within a session of its own, again while the server is busy.

        Raises:
            InputError: the server refuses the client (``AccessDenied``) or the call.
            BackendError: it cannot be reached (``EndpointError``), stays ``Busy``, or fails.
        """
        patience = self._busy_seconds
        while True:
            try:
                with start_blocking_portal() as portal:  # a notebook has a loop of its own
                    return portal.call(self._connected, ask)
            except Busy as busy:
                pause = max(0.1, busy.retry_after)
                if pause > patience:
                    raise
                patience -= pause
                time.sleep(pause)

    async def _connected(self, ask: Callable[[Client], Awaitable[T]]) -> T:
        try:
            async with (
                httpx2.AsyncClient(
                    headers=self._headers,
                    timeout=httpx2.Timeout(self._call_seconds, connect=_CONNECT_SECONDS),
                    event_hooks={"response": [self._check_status]},
                    # A proxy of the environment does not reach this machine's own servers.
                    trust_env=not is_loopback(urlsplit(self.url).hostname or ""),
                ) as http,
                # A session is closed at the end, so that the server forgets its pictures; the
                # newest protocol knows only clients that come back or not.
                Client(
                    streamable_http_client(
                        self.url, http_client=http, max_sse_event_size=_LARGEST_ANSWER
                    ),
                    mode="legacy",
                    read_timeout_seconds=self._call_seconds,
                ) as client,
            ):
                return await ask(client)
        except Exception as error:
            raise self._typed(_innermost(error)) from error

    async def _check_status(self, response: httpx2.Response) -> None:
        """What the client library would only call an error response.

        Raises:
            Sam4MllmError: the server refuses the request.
        """
        match response.status_code:
            case 401:
                raise AccessDenied(
                    f"{self.url} asks for a token"
                    if not self._headers
                    else f"{self.url} does not know this token",
                    hint="Give the server's token: --token, or SAM4MLLM_TOKEN.",
                )
            case 403 | 421:
                name = response.request.url.host
                raise AccessDenied(
                    f"{self.url} does not serve requests to {name}",
                    hint=f"Start the server with --allowed-host {name}.",
                )
            case 413:
                raise ImageError(
                    f"the picture is larger than {self.url} takes",
                    hint="Use a smaller picture, or start the server with a larger --max-body.",
                )
            case 503:
                after = response.headers.get("retry-after", "")
                raise Busy(
                    f"{self.url} is busy", retry_after=float(after) if after.isdecimal() else 5.0
                )

    def _typed(self, error: BaseException) -> BaseException:
        """The client library's errors as ours; any other as it is."""
        if isinstance(error, Sam4MllmError):
            return error
        if isinstance(error, MCPError):
            return self._of_protocol(error)
        if isinstance(error, httpx2.TimeoutException) and not isinstance(
            error, httpx2.ConnectTimeout
        ):
            return self._too_late()
        if isinstance(error, httpx2.HTTPError):
            return EndpointError(
                f"{self.url} cannot be reached: {error or type(error).__name__}",
                hint="Start it: sam4mllm-tool mcp --transport http; or correct --server.",
            )
        return error

    def _of_protocol(self, error: MCPError) -> Sam4MllmError:
        data = error.data if isinstance(error.data, dict) else {}
        kind = data.get("error")
        message, _, hint = error.message.partition(" Hint: ")
        if kind == "Busy":
            return Busy(message, retry_after=float(data.get("retry_after", 5.0)))
        if kind is not None:
            retryable = bool(data.get("retryable"))
            return _ERRORS.get(kind, BackendError)(message, hint=hint, retryable=retryable)
        if error.code == types.INVALID_PARAMS:
            return InputError(message, hint=hint)
        if error.code == types.REQUEST_TIMEOUT:
            return self._too_late()
        return EndpointError(
            f"{self.url} does not answer as an MCP server: {message.splitlines()[0][:200]}",
            hint="Name a server that runs: sam4mllm-tool mcp --transport http.",
            retryable=error.code == types.CONNECTION_CLOSED,
        )

    def _too_late(self) -> CallTimeout:
        return CallTimeout(
            f"{self.url} did not answer within {self._call_seconds:g} s", hint="Try again later."
        )


def _address(server: str) -> str:
    """The server's MCP endpoint.

    Raises:
        InputError: not an http(s) address.
    """
    try:
        parts = urlsplit(server.strip())
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc:
        raise InputError(
            f"{server[:120]!r} is not the address of a server",
            hint="Write --server http://127.0.0.1:8765.",
        )
    path = parts.path if parts.path.strip("/") else "/mcp"
    return parts._replace(path=path, fragment="").geturl()


def _innermost(error: BaseException) -> BaseException:
    """What task groups wrap."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
