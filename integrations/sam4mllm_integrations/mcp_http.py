"""The MCP server over streamable HTTP: who may connect, and telling clients apart."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from typing import TYPE_CHECKING

from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sam4mllm_integrations.mcp_clients import CLIENT_COOKIE
from sam4mllm_integrations.mcp_tools import ToolServer
from sam4mllm_tool.errors import InputError

if TYPE_CHECKING:
    from starlette.applications import Starlette

PATH = "/mcp"
_COOKIE_RULES = f"Path={PATH}; HttpOnly; SameSite=Strict"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def http_app(tools: ToolServer, *, host: str = "127.0.0.1", token: str | None = None) -> Starlette:
    """The server as an ASGI application, at ``/mcp``.

    Requests must name a loopback host (or ``host``) and, if they come from a web page, one of
    these as origin: a page that rebinds its name to this machine is turned away.

    Raises:
        InputError: ``host`` is not loopback and there is no token.
    """
    if not _is_loopback(host) and not token:
        raise InputError(
            f"{host} can be reached from other machines",
            hint="Set a token, or listen on 127.0.0.1.",
        )
    names = dict.fromkeys((*_LOOPBACK, f"[{host}]" if ":" in host else host))
    app = tools.server.streamable_http_app(
        streamable_http_path=PATH,
        host=host,
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=[f"{name}{port}" for name in names for port in ("", ":*")],
            allowed_origins=[f"http://{name}{port}" for name in names for port in ("", ":*")],
        ),
    )
    app.add_middleware(ClientCookie)
    if token:
        app.add_middleware(BearerToken, token=token)
    return app


class BearerToken:
    """Turns away requests without the token, before anything else looks at them."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "http":
            given = Headers(scope=scope).get("authorization", "").encode()
            if not hmac.compare_digest(given, self.expected):
                refusal = PlainTextResponse(
                    "A bearer token is needed.", 401, {"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class ClientCookie:
    """Gives each client of the session-less protocol a name when it introduces itself.

    The name keeps clients' workspaces apart. It is no credential: it opens nothing that its
    holder could not open anyway.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if headers.get("mcp-method") != "server/discover":
            await self.app(scope, receive, send)
            return
        cookie = (
            f"{CLIENT_COOKIE}={secrets.token_urlsafe(24)}; Path={PATH}; HttpOnly; SameSite=Strict"
        )

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        await self.app(scope, receive, send_with_cookie)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
