"""Who may use the playground, and which browser session a request belongs to."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from sam4mllm_integrations.hosts import is_loopback, served_names
from sam4mllm_integrations.mcp_credentials import Credentials
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SESSION = "sam4mllm.session"
"""The ASGI scope's entry that holds the session's key."""

_HEADERS = {
    # Load nothing from other origins, and let no other page frame this one.
    "content-security-policy": "default-src 'self'; img-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # unless the response sets its own
}


@dataclass(frozen=True)
class Address:
    """Where the playground listens.

    Attributes:
        host: address to listen on; any address except loopback needs the token.
        port: port to listen on, 0 for a free one.
        allowed_hosts: additional host names that requests may use, such as a proxy's.
        token: must be in the first URL that a browser opens; "" if none is needed.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    allowed_hosts: Sequence[str] = ()
    token: str = field(default="", repr=False)

    @classmethod
    def on(cls, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> Address:
        """An address, with a new token if other machines can reach it."""
        token = "" if is_loopback(host) else secrets.token_urlsafe(18)
        return cls(host, port, allowed_hosts, token)

    @property
    def url(self) -> str:
        """The URL that a browser opens."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/" + (f"?token={self.token}" if self.token else "")


class Gate:
    """Refuses requests for other host names or from other web pages, and finds the session.

    A session is identified by a cookie that this process signed. A request without such a cookie
    starts a new session, if it has the token or none is needed.
    """

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self.app = app
        self._address = address
        self._names = set(served_names(address.host, address.allowed_hosts))
        self._credentials = Credentials()
        self._cookie = f"sam4mllm_playground_{address.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        known = self._credentials.name_in(self._sent_cookie(headers))
        if known is None and not self._has_token(scope):
            text = "Open the address that the playground printed when it started."
            await PlainTextResponse(text, 403)(scope, receive, send)
            return
        cookie = None if known else self._credentials.new_cookie()
        scope[SESSION] = known or self._credentials.name_in(cookie or "")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    sent.setdefault(name, value)
                if cookie is not None:
                    rules = "Path=/; HttpOnly; SameSite=Strict"
                    sent.append("set-cookie", f"{self._cookie}={cookie}; {rules}")
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, path: str, headers: Headers) -> PlainTextResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name_of(f"//{host}") not in self._names:
            return PlainTextResponse("This host name is not served; --allowed-host adds it.", 421)
        # Another site may link to the page; all other requests must come from the page itself.
        cross_site = headers.get("sec-fetch-site") in {"cross-site", "same-site"} and path != "/"
        if cross_site or (origin is not None and urlsplit(origin).netloc != host):
            return PlainTextResponse("Requests from other web pages are refused.", 403)
        return None

    def _has_token(self, scope: Scope) -> bool:
        expected = self._address.token
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return not expected or hmac.compare_digest(given.encode(), expected.encode())

    def _sent_cookie(self, headers: Headers) -> str:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return cookie.value if cookie else ""


def _name_of(address: str) -> str:
    """The host name of a URL, written as in the Host header, without the port."""
    try:
        name = urlsplit(address).hostname or ""
    except ValueError:
        return ""
    return f"[{name}]" if ":" in name else name
