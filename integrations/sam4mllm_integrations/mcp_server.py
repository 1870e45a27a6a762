"""MCP server: the tools over stdio or streamable HTTP, for any MCP client.

It answers ``initialize`` and ``tools/list`` before any weights are loaded, and loads them in the
background. Each client has a workspace of its own. Results are typed (``structuredContent``) with
short text; masks are resources, linked from the result that drew them.

    sam4mllm-tool mcp --allow-dir ~/pictures
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cachetools import LRUCache

from sam4mllm_integrations._shared import (
    MAX_PICTURE_CHARACTERS,
    ToolReply,
    arguments_schema,
    arun_tool,
    without_titles,
)
from sam4mllm_tool.access import ImagePolicy
from sam4mllm_tool.calls import CallContext, call_context
from sam4mllm_tool.errors import BackendError, InputError
from sam4mllm_tool.export import coco_document
from sam4mllm_tool.frames import Coordinates
from sam4mllm_tool.tools import Toolbox, get_tool
from sam4mllm_tool.workspace import ObjectRecord, Workspace

try:
    import mcp_types as types
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
    from mcp.shared.exceptions import MCPError
    from mcp.shared.message import ServerMessageMetadata
    from mcp_types.version import MODERN_PROTOCOL_VERSIONS
except ImportError as error:
    raise ImportError('the MCP server needs: pip install "sam4mllm-tool[mcp]"') from error

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline import Sam4MLLM

MASK_URI = "sam4mllm://masks/"
CLIENT_COOKIE = "sam4mllm_client"
MAX_CLIENTS = 32
CLIENT_BYTES = 256 * 1024**2
_LOAD_AFTER_SECONDS = 0.2
_ROOTS_TIMEOUT_SECONDS = 20.0

INSTRUCTIONS = (
    "Finds and masks objects described in words. Start with segment_object(image, expression). "
    "Results carry image_id and object_id handles: pass these on instead of files or masks. Masks "
    "are resources (PNG and COCO JSON), linked from the results. Files can be read and written "
    "only in the folders the server allows."
)

logger = logging.getLogger(__name__)
_Context = ServerRequestContext[Any, Any]


@dataclass
class _Client:
    """What belongs to one client.

    Attributes:
        toolbox: over the client's own workspace.
        own: whether it is known to be a single client, so that its roots may bound it.
        asked: whether its roots have been asked for.
    """

    toolbox: Toolbox
    own: bool
    asked: bool = False


@dataclass
class ToolServer:
    """The tools as an MCP server; :attr:`server` is the SDK's.

    Args:
        load: loads the models; called once, in the background.
        allow_dirs: folders that may be read and written. Over stdio the client's own roots are
            enough; over HTTP nothing on disk can be reached without them.
        policy: limits and network access; its folders are replaced by ``allow_dirs`` and roots.
        coordinates: what the tools' numbers mean, see :class:`sam4mllm_tool.tools.Toolbox`.
        max_picture_characters: bound on a picture's base64 form.
        mask_links: whether results link to their masks. Some clients (langchain-mcp-adapters) hand
            such links to the LLM as pictures, which providers refuse.
    """

    load: Callable[[], Sam4MLLM]
    allow_dirs: Sequence[Path] = ()
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    coordinates: Coordinates = "pixels"
    max_picture_characters: int = MAX_PICTURE_CHARACTERS
    mask_links: bool = True

    def __post_init__(self) -> None:
        self._model = Toolbox(self.load, coordinates=self.coordinates)
        self._loading: threading.Thread | None = None
        self._clients: LRUCache[str, _Client] = LRUCache(MAX_CLIENTS)
        self.server: Server[Any] = Server(
            "sam4mllm-tool",
            version=version("sam4mllm-tool"),
            instructions=INSTRUCTIONS,
            on_list_tools=self.list_tools,
            on_call_tool=self.call_tool,
            on_list_resources=self.list_masks,
            on_list_resource_templates=self.list_mask_templates,
            on_read_resource=self.read_mask,
        )
        self.server.add_notification_handler(
            "notifications/roots/list_changed", types.NotificationParams, self.forget_roots
        )

    # -- tools -----------------------------------------------------------------------------------

    async def list_tools(self, ctx: _Context, params: Any) -> types.ListToolsResult:
        """All tools; the models start loading once this has been answered."""
        asyncio.get_running_loop().call_later(_LOAD_AFTER_SECONDS, self._load_in_background)
        return types.ListToolsResult(tools=self._tools)

    @property
    def _tools(self) -> list[types.Tool]:
        return [
            types.Tool(
                name=spec.name,
                title=spec.name.replace("_", " ").capitalize(),
                description=spec.description,
                input_schema=arguments_schema(spec.arguments),
                output_schema=without_titles(spec.result.model_json_schema(mode="serialization")),
                annotations=types.ToolAnnotations(
                    read_only_hint=spec.read_only,
                    destructive_hint=not spec.read_only,
                    idempotent_hint=True,
                    open_world_hint=self.policy.allow_network,
                ),
            )
            for spec in self._model.specs()
        ]

    async def call_tool(
        self, ctx: _Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult | types.InputRequiredResult:
        """Run a tool, reporting each stage.

        Raises:
            MCPError: no such tool, or the system failed.
        """
        _check_name(params.name)
        client = self._client(ctx)
        question = await self._learn_roots(ctx, client, params.input_responses)
        if question is not None:
            return question
        try:
            reply = await self._run(ctx, client.toolbox, params.name, params.arguments)
        except BackendError as error:
            data = {"error": type(error).__name__, "retryable": error.retryable}
            raise MCPError(types.INTERNAL_ERROR, str(error), data) from error
        return _tool_result(reply, self.mask_links)

    async def _run(
        self, ctx: _Context, toolbox: Toolbox, name: str, arguments: dict[str, Any] | None
    ) -> ToolReply:
        loop = asyncio.get_running_loop()
        numbers = itertools.count(1)
        told: list[Future[None]] = []

        def on_stage(stage: str) -> None:  # called in the worker thread
            report = ctx.session.report_progress(next(numbers), None, stage)
            told.append(asyncio.run_coroutine_threadsafe(report, loop))

        try:
            with call_context(CallContext(on_stage=on_stage)):
                reply = await arun_tool(
                    toolbox, name, arguments, max_picture_characters=self.max_picture_characters
                )
            await asyncio.gather(*map(asyncio.wrap_future, told))
        finally:
            for report in told:
                report.cancel()
        return reply

    def _load_in_background(self) -> None:
        if self._loading is None:
            self._loading = threading.Thread(target=self._load_now, name="load", daemon=True)
            self._loading.start()

    def _load_now(self) -> None:
        try:
            self._model.model  # noqa: B018 - asking for it loads it
        except Exception:
            logger.exception("the models could not be loaded; the next call tries again")

    # -- masks as resources ----------------------------------------------------------------------

    async def list_masks(self, ctx: _Context, params: Any) -> types.ListResourcesResult:
        """The masks of the client's objects."""
        objects = self._client(ctx).toolbox.workspace.objects()
        masks = [link for one in objects if one.mask is not None for link in _mask_links(one)]
        plain = [types.Resource(**link.model_dump(exclude={"type"})) for link in masks]
        return types.ListResourcesResult(resources=plain)

    async def list_mask_templates(
        self, ctx: _Context, params: Any
    ) -> types.ListResourceTemplatesResult:
        """How the address of a mask is made from an object_id."""
        templates = [
            types.ResourceTemplate(
                name=f"mask_{kind}",
                uri_template=f"{MASK_URI}{{object_id}}.{kind}",
                description=f"Mask of an object as {text}.",
                mime_type=mime,
            )
            for kind, (mime, text) in _MASK_KINDS.items()
        ]
        return types.ListResourceTemplatesResult(resource_templates=templates)

    async def read_mask(
        self, ctx: _Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        """A mask in full.

        Raises:
            MCPError: no such object, or it has no mask.
        """
        uri = str(params.uri)
        object_id, _, kind = uri.removeprefix(MASK_URI).rpartition(".")
        if not uri.startswith(MASK_URI) or kind not in _MASK_KINDS:
            raise MCPError(types.INVALID_PARAMS, f"there is no resource {uri[:120]!r}")
        workspace = self._client(ctx).toolbox.workspace
        try:
            one = workspace.object(object_id)
            record = workspace.image(one.image_id)
        except InputError as error:
            raise MCPError(types.INVALID_PARAMS, str(error)) from error
        if one.mask is None:
            raise MCPError(types.INVALID_PARAMS, f"{object_id} has no mask yet")
        mime = _MASK_KINDS[kind][0]
        if kind == "json":
            text = json.dumps(coco_document(record, [one]))
            return types.ReadResourceResult(
                contents=[types.TextResourceContents(uri=uri, mime_type=mime, text=text)]
            )
        png = BytesIO()
        one.mask.to_pil().save(png, "PNG")
        blob = base64.b64encode(png.getvalue()).decode("ascii")
        return types.ReadResourceResult(
            contents=[types.BlobResourceContents(uri=uri, mime_type=mime, blob=blob)]
        )

    # -- clients ---------------------------------------------------------------------------------

    def _client(self, ctx: _Context) -> _Client:
        """The client behind a request; what was used longest ago is forgotten first."""
        key, own = _client_key(ctx)
        if key not in self._clients:
            policy = replace(self.policy, allowed_dirs=tuple(self.allow_dirs), output_dirs=None)
            workspace = Workspace(policy, max_bytes=CLIENT_BYTES)
            self._clients[key] = _Client(self._model.for_workspace(workspace), own)
        return self._clients[key]

    async def _learn_roots(
        self, ctx: _Context, client: _Client, answers: types.InputResponses | None
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
            folders = _bounded(tuple(self.allow_dirs), _folders(answer.roots), trusted=local)
            workspace = client.toolbox.workspace
            workspace.policy = replace(workspace.policy, allowed_dirs=folders)
        return None

    async def forget_roots(self, ctx: _Context, params: Any) -> None:
        """The client's roots have changed: ask again at the next call."""
        self._client(ctx).asked = False


_MASK_KINDS = {
    "png": ("image/png", "a PNG picture: 255 on the object, 0 elsewhere"),
    "json": ("application/json", "a COCO JSON document with an RLE mask"),
}


def _check_name(name: str) -> None:
    try:
        get_tool(name)
    except InputError as error:
        raise MCPError(types.INVALID_PARAMS, str(error)) from error


def _tool_result(reply: ToolReply, links: bool) -> types.CallToolResult:
    content: list[types.ContentBlock] = [types.TextContent(text=reply.text)]
    if reply.output is None:
        return types.CallToolResult(content=content, is_error=True)
    if reply.picture is not None:
        picture = reply.picture
        content.append(types.ImageContent(data=picture.base64, mime_type=picture.mime_type))
    for object_id in reply.output.masks if links else ():
        content += _mask_links(object_id)
    structured = reply.output.result.model_dump(mode="json")
    return types.CallToolResult(content=content, structured_content=structured)


def _mask_links(one: ObjectRecord | str) -> list[types.ResourceLink]:
    object_id, name = (one, "") if isinstance(one, str) else (one.object_id, f" ({one.name[:60]})")
    return [
        types.ResourceLink(
            name=f"{object_id}.{kind}",
            uri=f"{MASK_URI}{object_id}.{kind}",
            description=f"Mask of {object_id}{name} as {text}.",
            mime_type=mime,
        )
        for kind, (mime, text) in _MASK_KINDS.items()
    ]


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


async def serve_stdio(tools: ToolServer) -> None:
    """Serve one client over stdin and stdout until it leaves."""
    async with stdio_server() as (reading, writing):
        await tools.server.run(reading, writing, tools.server.create_initialization_options())


def serve(
    load: Callable[[], Sam4MLLM],
    *,
    transport: str = "stdio",
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    allow_dirs: Sequence[Path] = (),
    policy: ImagePolicy | None = None,
    coordinates: Coordinates = "pixels",
    mask_links: bool = True,
) -> None:
    """Serve until interrupted.

    Args:
        load: loads the models, e.g. :func:`sam4mllm_tool.load.load`.
        transport: ``"stdio"`` or ``"http"`` (streamable HTTP at ``/mcp``).
        host, port: where HTTP listens; anything but loopback needs a token.
        token: bearer token that HTTP clients must send.
        allow_dirs, policy, coordinates, mask_links: see :class:`ToolServer`.

    Raises:
        InputError: an unknown transport, or an open address without a token.
    """
    tools = ToolServer(
        load, tuple(allow_dirs), policy or ImagePolicy(), coordinates, mask_links=mask_links
    )
    if transport == "stdio":
        asyncio.run(serve_stdio(tools))
    elif transport == "http":
        import uvicorn

        from sam4mllm_integrations.mcp_http import http_app

        app = http_app(tools, host=host, token=token)
        uvicorn.run(app, host=host, port=port, log_level="warning")
    else:
        raise InputError(f"unknown transport {transport!r}", hint="Use 'stdio' or 'http'.")
