"""The MCP server's clients: telling them apart, and bounding each by its roots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mcp_types as types
from cachetools import LRUCache
from mcp.server.context import ServerRequestContext
from mcp.shared.message import ServerMessageMetadata
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace

CLIENT_COOKIE = "sam4mllm_client"
MAX_CLIENTS = 32
CLIENT_BYTES = 256 * 1024**2
_ROOTS_TIMEOUT_SECONDS = 20.0

_Context = ServerRequestContext[Any, Any]


@dataclass
class Client:
    """What belongs to one client.

    Attributes:
        toolbox: over the client's own workspace.
        own: whether it is known to be a single client, so that its roots may bound it.
        asked: whether its roots have been asked for.
    """

    toolbox: Toolbox
    own: bool
    asked: bool = False


class Clients:
    """All clients; the one that was silent for longest is forgotten first.

    Args:
        model: whose models all clients share.
        allow_dirs: folders that clients may read.
        policy: limits, network access, and the folders that clients may write to.
    """

    def __init__(self, model: Toolbox, allow_dirs: tuple[Path, ...], policy: ImagePolicy) -> None:
        self._model = model
        self._allow_dirs = allow_dirs
        self._policy = replace(policy, allowed_dirs=allow_dirs, isolated=True)
        self._known: LRUCache[str, Client] = LRUCache(MAX_CLIENTS)

    def of(self, ctx: _Context) -> Client:
        """The client behind a request."""
        key, own = _client_key(ctx)
        if key not in self._known:
            workspace = Workspace(self._policy, max_bytes=CLIENT_BYTES)
            self._known[key] = Client(self._model.for_workspace(workspace), own)
        return self._known[key]

    async def learn_roots(
        self, ctx: _Context, client: Client, answers: types.InputResponses | None
    ) -> types.InputRequiredResult | None:
        """Bound a client by its roots, once; from 2026-07-28 on by asking before answering."""
        capabilities = ctx.session.client_capabilities
        if client.asked or not client.own or capabilities is None or capabilities.roots is None:
            return None
        answer: Any
        if ctx.protocol_version in MODERN_PROTOCOL_VERSIONS:
            if not answers or "roots" not in answers:
                return types.InputRequiredResult(input_requests={"roots": types.ListRootsRequest()})
            answer = answers["roots"]
        else:
            answer = await ctx.session.send_request(
                types.ListRootsRequest(),
                types.ListRootsResult,
                _ROOTS_TIMEOUT_SECONDS,
                ServerMessageMetadata(related_request_id=ctx.request_id),
            )
        client.asked = True
        if isinstance(answer, types.ListRootsResult):
            local = ctx.request is None  # a stdio client started us: its roots are as good as ours
            folders = _bounded(self._allow_dirs, _folders(answer.roots), trusted=local)
            workspace = client.toolbox.workspace
            workspace.policy = replace(workspace.policy, allowed_dirs=folders)
        return None

    async def forget_roots(self, ctx: _Context, params: Any) -> None:
        """The client's roots have changed: ask again at the next call."""
        self.of(ctx).asked = False


def _client_key(ctx: _Context) -> tuple[str, bool]:
    """What tells clients apart, and whether it does so for certain.

    A process over stdio, a session over HTTP. From 2026-07-28 on HTTP has no sessions: a cookie
    tells clients apart that keep one, and clients of the same name share a workspace that do not.
    """
    if ctx.request is None:
        return "local", True
    if ctx.protocol_version not in MODERN_PROTOCOL_VERSIONS:
        return f"session {ctx.request.headers.get('mcp-session-id')}", True
    cookie = ctx.request.cookies.get(CLIENT_COOKIE)
    if cookie:
        return f"cookie {cookie[:64]}", True
    known = ctx.session.client_params
    name = f"{known.client_info.name} {known.client_info.version}" if known else ""
    host = ctx.request.client.host if ctx.request.client else ""
    return f"shared {host} {name}", False


def _folders(roots: Sequence[types.Root]) -> tuple[Path, ...]:
    """The roots that are folders of this machine."""
    parts = [urlsplit(str(root.uri)) for root in roots]
    return tuple(Path(url2pathname(part.path)) for part in parts if part.scheme == "file")


def _bounded(
    allowed: tuple[Path, ...], roots: tuple[Path, ...], *, trusted: bool
) -> tuple[Path, ...]:
    """Where ``--allow-dir`` and roots meet; a trusted client's roots are enough by themselves."""
    if not roots:
        return allowed
    if not allowed:
        return roots if trusted else ()
    ours, theirs = [p.resolve() for p in allowed], [p.resolve() for p in roots]
    inner = [a for a in ours if any(a.is_relative_to(r) for r in theirs)]
    inner += [r for r in theirs if any(r.is_relative_to(a) for a in ours)]
    return tuple(dict.fromkeys(inner))
