"""The MCP server's clients: telling them apart, and bounding each by its roots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.shared.message import ServerMessageMetadata
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from sam4mllm_integrations.mcp_work import Limits
from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.errors import Busy
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.tools.state import StateStore
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace

USER, COOKIE = "sam4mllm.user", "sam4mllm.cookie"
"""Entries of the ASGI scope: the user whose token was sent, the cookie that this server signed."""

LOCAL = "local"
"""The key of the client that started this process; it is never forgotten."""

_ROOTS_TIMEOUT_SECONDS = 20.0
_SWEEP_SECONDS = 10.0

_Context = ServerRequestContext[Any, Any]


@dataclass
class Client:
    """What belongs to one client.

    Attributes:
        key: what tells it apart.
        toolbox: over the client's own workspace.
        asked: whether its roots have been asked for.
        last_call: when it was heard of last, on the monotonic clock.
        running: its calls that are not finished.
    """

    key: str
    toolbox: Toolbox
    asked: bool = False
    last_call: float = field(default_factory=time.monotonic)
    running: int = 0


class Clients:
    """All clients. None is ever pushed out by another: beyond the bound new ones are refused.

    Args:
        model: whose models all clients share.
        allow_dirs: folders that clients may read.
        policy: limits, network access, and the folders that clients may write to.
        limits: how many clients, how long, how much memory.
        state: keeps the workspaces of clients that may come back.
    """

    def __init__(
        self,
        model: Toolbox,
        allow_dirs: tuple[Path, ...],
        policy: ImagePolicy,
        limits: Limits,
        state: StateStore | None = None,
    ) -> None:
        self._model = model
        self._allow_dirs = allow_dirs
        self._policy = replace(policy, allowed_dirs=allow_dirs, isolated=True)
        self._limits = limits
        self._state = state
        self._known: dict[str, Client] = {}
        self._last_number = 0
        self._swept = time.monotonic()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def bytes_kept(self) -> int:
        """What all workspaces take."""
        return sum(one.toolbox.workspace.bytes_kept for one in list(self._known.values()))

    async def of(self, ctx: _Context) -> Client:
        """The client behind a request.

        Raises:
            Busy: it is new, and there are as many as there may be.
            StorageError: what is kept of it cannot be read.
        """
        self._forget_idle()
        key, returns = _client_key(ctx)
        if key not in self._known:
            self._check_number()
            workspace = await run_in_thread(self._workspace, key, returns)
            if key not in self._known:  # another call of the same client may have come first
                self._check_number()
                self._known[key] = Client(key, self._model.for_workspace(workspace))
        client = self._known[key]
        client.last_call = time.monotonic()
        return client

    def forget(self, key: str) -> None:
        """A client has left: its handles are no longer needed."""
        client = self._known.pop(key, None)
        if client is not None:
            self._last_number = max(self._last_number, client.toolbox.workspace.last_number)

    def _check_number(self) -> None:
        if len(self._known) >= self._limits.clients:
            raise Busy(f"{len(self._known)} clients are being served", retry_after=60)

    def _workspace(self, key: str, returns: bool) -> Workspace:
        """A client's workspace; its state is read from disk."""
        return Workspace(
            self._policy,
            max_bytes=self._limits.client_bytes,
            room=lambda: self._limits.memory_bytes - self.bytes_kept,
            # Handles from before a client was forgotten must not name anything new.
            last_number=self._last_number if returns else 0,
            state=self._state.workspace(key) if self._state and returns else None,
        )

    def _forget_idle(self) -> None:
        now = time.monotonic()
        if now - self._swept < min(_SWEEP_SECONDS, self._limits.idle_seconds):
            return
        self._swept = now
        for client in list(self._known.values()):
            if (
                client.key != LOCAL
                and not client.running
                and now - client.last_call > self._limits.idle_seconds
            ):
                self.forget(client.key)

    async def learn_roots(
        self, ctx: _Context, client: Client, answers: types.InputResponses | None
    ) -> types.InputRequiredResult | None:
        """Bound a client by its roots, once; from 2026-07-28 on by asking before answering."""
        capabilities = ctx.session.client_capabilities
        if client.asked or capabilities is None or capabilities.roots is None:
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
        (await self.of(ctx)).asked = False


def session_key(session_id: str) -> str:
    """The key of a client that is one session."""
    return f"session {session_id}"


def _client_key(ctx: _Context) -> tuple[str, bool]:
    """What tells clients apart, and whether the same may come back after it was forgotten.

    Each is something this server issued or was configured with: the process over stdio, a user's
    own token, a session (the SDK refuses ids it did not issue), or a signed cookie from 2026-07-28
    on, where HTTP has no sessions.
    """
    if ctx.request is None:
        return LOCAL, True
    scope = ctx.request.scope
    if scope.get(USER):
        return f"user {scope[USER]}", True
    if ctx.protocol_version not in MODERN_PROTOCOL_VERSIONS:
        return session_key(ctx.request.headers["mcp-session-id"]), False
    return f"cookie {scope[COOKIE]}", True


def _folders(roots: Sequence[types.Root]) -> tuple[Path, ...]:
    """The roots that are folders of this machine."""
    parts = [urlsplit(str(root.uri)) for root in roots]
    paths = [url2pathname(part.path) for part in parts if part.scheme == "file"]
    return tuple(Path(path) for path in paths if "\0" not in path)


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
