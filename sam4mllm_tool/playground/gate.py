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
"""Entry of the ASGI scope: the session's key."""

_HEADERS = {
    # The page is ours alone: nothing from elsewhere, no frame around it.
    "content-security-policy": "default-src 'self'; img-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # where a file does not say otherwise
}


@dataclass(frozen=True)
class Address:
    """Where the playground listens.

    Attributes:
        host: address to listen on; anything but loopback needs the token.
        port: port to listen on, 0 for a free one.
        allowed_hosts: further names that requests may be addressed to, such as a proxy's.
        token: must be in the first address that a browser opens; "" = needs none.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    allowed_hosts: Sequence[str] = ()
    token: str = field(default="", repr=False)

    @classmethod
    def on(cls, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> Address:
        """An address with a new token, if other machines reach it."""
        token = "" if is_loopback(host) else secrets.token_urlsafe(18)
        return cls(host, port, allowed_hosts, token)

    @property
    def url(self) -> str:
        """What a browser opens."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/" + (f"?token={self.token}" if self.token else "")


class Gate:
    """Turns away what comes for another name or from another page, and tells sessions apart.

    A session is a cookie that this process signed; a request without one gets a new session, if it
    may have one.
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
            return PlainTextResponse("This playground has another name.", 421)
        # A link from elsewhere may lead to the page; nothing else may be asked for from elsewhere.
        elsewhere = headers.get("sec-fetch-site") in {"cross-site", "same-site"} and path != "/"
        if elsewhere or (origin is not None and urlsplit(origin).netloc != host):
            return PlainTextResponse("Requests of other web pages are not served.", 403)
        return None

    def _has_token(self, scope: Scope) -> bool:
        wanted = self._address.token
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return not wanted or hmac.compare_digest(given.encode(), wanted.encode())

    def _sent_cookie(self, headers: Headers) -> str:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return cookie.value if cookie else ""


def _name_of(address: str) -> str:
    """The host in an address, as the Host header writes it, without the port."""
    try:
        name = urlsplit(address).hostname or ""
    except ValueError:
        return ""
    return f"[{name}]" if ":" in name else name
