"""The MCP server over streamable HTTP: who may connect, and telling clients apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sam4mllm_integrations.hosts import is_loopback, served_names
from sam4mllm_integrations.mcp_bodies import Bodies, BodyRefused, ClientGone
from sam4mllm_integrations.mcp_clients import COOKIE, USER, session_key
from sam4mllm_integrations.mcp_credentials import Credentials
from sam4mllm_integrations.mcp_refusals import plain_refusals
from sam4mllm_integrations.mcp_tools import ToolServer
from sam4mllm_tool.errors import InputError

if TYPE_CHECKING:
    from starlette.applications import Starlette

PATH = "/mcp"
CLIENT_COOKIE = "sam4mllm_client"
_COOKIE_RULES = f"Path={PATH}; HttpOnly; SameSite=Strict"
_OPEN_PATHS = {"/health", "/ready"}


@dataclass(frozen=True)
class HttpSettings:
    """How the server is reached over HTTP.

    Attributes:
        host: address to listen on; anything but loopback needs a token.
        port: port to listen on.
        credentials: tokens that clients must send.
        allowed_hosts: further names that requests may be addressed to, such as a proxy's.
        allowed_origins: web pages whose requests are served, as ``https://name[:port]``.
        max_body: bound on a request's body; by default a picture of ``max_bytes`` as a data URI.
        bodies_bytes: bound on the bodies of all requests together.
        header_seconds, body_seconds: how long a request's headers and body may take; the headers'
            time begins with the connection, and a client that is short of time itself may take long
            to send them.
        keep_alive_seconds: how long a connection may be idle between requests. Clients give up idle
            connections after 5 s (HTTPX); the server must not be first, or it closes one just as a
            request is sent on it.
        connections: bound on connections, before anyone has shown a token. A client has two to
            four: one for each request under way, and one to listen on.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    credentials: Credentials = field(default_factory=Credentials)
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    max_body: int | None = None
    bodies_bytes: int = 1024**3
    header_seconds: float = 60.0
    body_seconds: float = 60.0
    keep_alive_seconds: int = 30
    connections: int = 4096


def http_app(tools: ToolServer, settings: HttpSettings | None = None) -> Starlette:
    """The server as an ASGI application: ``/mcp``, ``/health``, ``/ready`` and ``/metrics``.

    Requests must name a loopback host, ``host``, one of this machine's names if it listens on all
    addresses, or an allowed host, and, if they come from a web page, one of these as origin: a
    page that rebinds its name to this machine is turned away.

    Raises:
        InputError: ``host`` is not loopback and there is no token.
    """
    settings = settings or HttpSettings()
    check_reach(settings.host, settings.credentials)
    names = served_names(settings.host, settings.allowed_hosts)
    origins = [f"{scheme}://{name}" for name in names for scheme in ("http", "https")]
    max_body = settings.max_body or tools.policy.max_bytes * 4 // 3 + 64 * 1024
    app = tools.server.streamable_http_app(
        streamable_http_path=PATH,
        host=settings.host,
        max_request_body_size=max_body,
        session_idle_timeout=tools.limits.idle_seconds,
        max_sessions=tools.limits.clients,
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=[name + port for name in names for port in ("", ":*")],
            allowed_origins=[
                *(origin + port for origin in origins for port in ("", ":*")),
                *settings.allowed_origins,
            ],
        ),
    )

    async def health(request: Request) -> Response:
        return PlainTextResponse("alive")

    async def ready(request: Request) -> Response:
        state = {"ready": tools.ready and not tools.draining, "draining": tools.draining}
        return JSONResponse(state, 200 if state["ready"] else 503)

    async def metrics(request: Request) -> Response:
        text, media_type = tools.watch.exposition()
        return Response(text, media_type=media_type)

    for path, endpoint in (("/health", health), ("/ready", ready), ("/metrics", metrics)):
        app.add_route(path, endpoint, methods=["GET"])
    app.add_middleware(Gate, tools=tools, settings=settings, max_body=max_body)
    return app


def check_reach(host: str, credentials: Credentials) -> None:
    """Refuse to listen where other machines reach the server, if it asks for no token.

    Raises:
        InputError: so.
    """
    if not is_loopback(host) and not credentials.needed:
        raise InputError(
            f"{host} can be reached from other machines",
            hint="Set a token, or listen on 127.0.0.1.",
        )


class Gate:
    """Everything that is settled before a request is read: who sends it, how much, how fast."""

    def __init__(
        self, app: ASGIApp, tools: ToolServer, settings: HttpSettings, max_body: int
    ) -> None:
        self.app = app
        self._tools = tools
        self._settings = settings
        self._max_body = max_body
        self._bodies = Bodies(max(settings.bodies_bytes, max_body), settings.body_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._admitted(scope, headers):
            refusal = PlainTextResponse(
                "A bearer token is needed.",
                401,
                {"WWW-Authenticate": "Bearer", "Connection": "close"},
            )
            await refusal(scope, receive, send)
            return
        send = plain_refusals(self._with_cookie(scope, headers, send))
        await self._serve(scope, receive, send, headers)

    def _admitted(self, scope: Scope, headers: Headers) -> bool:
        credentials = self._settings.credentials
        if not credentials.needed:
            return True
        user = credentials.user_of(headers.get("authorization", ""))
        if user is None:
            return False
        scope[USER] = user
        # The SDK ties a session to the credential that opened it.
        token = AccessToken(token="", client_id=user or "shared", scopes=[])
        scope["user"] = AuthenticatedUser(token)
        return True

    def _announced(self, scope: Scope, headers: Headers) -> int:
        """Bytes of the body by its header; a larger one is refused by the SDK."""
        stated = headers.get("content-length", "") if scope["method"] == "POST" else ""
        return min(int(stated), self._max_body) if stated.isdecimal() else 0

    def _with_cookie(self, scope: Scope, headers: Headers, send: Send) -> Send:
        """From 2026-07-28 on there are no sessions: a signed cookie tells clients apart.

        A request without one gets a workspace that only the cookie in its answer opens again.
        """
        version = headers.get("mcp-protocol-version")
        if version is None or version in HANDSHAKE_PROTOCOL_VERSIONS:
            return send
        credentials = self._settings.credentials
        name = credentials.name_in(_cookie(headers))
        if name is not None:
            scope[COOKIE] = name
            return send
        cookie = credentials.new_cookie()
        scope[COOKIE] = credentials.name_in(cookie)

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = f"{CLIENT_COOKIE}={cookie}; {_COOKIE_RULES}"
                MutableHeaders(scope=message).append("set-cookie", header)
            await send(message)

        return send_with_cookie

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Pass the request on, with bounds on its body."""
        status = 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with (
                self._tools.answering(scope["method"] == "POST"),
                self._bodies.one(receive, self._announced(scope, headers)) as bounded,
            ):
                await self.app(scope, bounded, send_noting)
        except ClientGone:
            return
        except BodyRefused as refused:
            if status:
                raise
            answer = PlainTextResponse(refused.text, refused.status, refused.headers)
            await answer(scope, receive, send)
        session = headers.get("mcp-session-id")
        if scope["method"] == "DELETE" and session and 200 <= status < 300:
            self._tools.forget(session_key(session))


def _cookie(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(CLIENT_COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""
