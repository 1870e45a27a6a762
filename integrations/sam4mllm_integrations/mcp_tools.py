"""The tools as MCP sees them: listing, calling, masks as resources.

The server answers ``initialize`` and ``tools/list`` before any weights are loaded, and loads them
in the background. Each client has a workspace of its own. Results are typed
(``structuredContent``) with short text; masks are resources, linked from the result that drew them.
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
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam4mllm_integrations._shared import (
    MAX_PICTURE_CHARACTERS,
    ToolReply,
    arguments_schema,
    arun_tool,
    without_titles,
)
from sam4mllm_tool.concurrency import CallContext, call_context
from sam4mllm_tool.errors import BackendError, InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.isolation import warm_up
from sam4mllm_tool.masks.files import masks_to_coco
from sam4mllm_tool.tools.coordinates import Coordinates
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import ObjectRecord, labelled_masks

try:
    import mcp_types as types
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp.shared.exceptions import MCPError

    from sam4mllm_integrations.mcp_clients import Clients
except ImportError as error:
    raise ImportError('the MCP server needs: pip install "sam4mllm-tool[mcp]"') from error

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline.model import Sam4MLLM

MASK_URI = "sam4mllm://masks/"
_LOAD_AFTER_SECONDS = 0.2

INSTRUCTIONS = (
    "Finds and masks objects described in words. Start with segment_object(image, expression). "
    "Results carry image_id and object_id handles: pass these on instead of files or masks. Masks "
    "are resources (PNG and COCO JSON), linked from the results. Files can be read and written "
    "only in the folders the server allows."
)

logger = logging.getLogger(__name__)
_Context = ServerRequestContext[Any, Any]


@dataclass
class ToolServer:
    """The tools as an MCP server; :attr:`server` is the SDK's.

    Args:
        load: loads the models; called once, in the background.
        allow_dirs: folders that may be read. Over stdio the client's own roots are enough; over
            HTTP nothing on disk can be read without them.
        policy: limits, network access and ``output_dirs``, the folders that may be written to; its
            ``allowed_dirs`` are replaced by ``allow_dirs`` and roots.
        coordinates: what the tools' numbers mean, see :class:`sam4mllm_tool.tools.toolbox.Toolbox`.
        max_picture_characters: bound on a picture's base64 form.
        mask_links: whether results link to their masks. Some clients (langchain-mcp-adapters) hand
            such links to the LLM as pictures, which providers refuse.
        tools, read_only: which tools, see :class:`sam4mllm_tool.tools.toolbox.Toolbox`.
    """

    load: Callable[[], Sam4MLLM]
    allow_dirs: Sequence[Path] = ()
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    coordinates: Coordinates = "pixels"
    max_picture_characters: int = MAX_PICTURE_CHARACTERS
    mask_links: bool = True
    tools: Sequence[ToolSpec | str] | None = None
    read_only: bool = False

    def __post_init__(self) -> None:
        self._model = Toolbox(
            self.load, coordinates=self.coordinates, tools=self.tools, read_only=self.read_only
        )
        self._loading: threading.Thread | None = None
        self._clients = Clients(self._model, tuple(self.allow_dirs), self.policy)
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
            "notifications/roots/list_changed", types.NotificationParams, self._clients.forget_roots
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
        self._check_name(params.name)
        client = self._clients.of(ctx)
        question = await self._clients.learn_roots(ctx, client, params.input_responses)
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

    def _check_name(self, name: str) -> None:
        try:
            self._model.spec(name)
        except InputError as error:
            raise MCPError(types.INVALID_PARAMS, str(error)) from error

    def _load_in_background(self) -> None:
        if self._loading is None:
            self._loading = threading.Thread(target=self._load_now, name="load", daemon=True)
            self._loading.start()

    def _load_now(self) -> None:
        warm_up()
        try:
            self._model.model  # noqa: B018 - asking for it loads it
        except Exception:
            logger.exception("the models could not be loaded; the next call tries again")

    # -- masks as resources ----------------------------------------------------------------------

    async def list_masks(self, ctx: _Context, params: Any) -> types.ListResourcesResult:
        """The masks of the client's objects."""
        objects = self._clients.of(ctx).toolbox.workspace.objects()
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
        workspace = self._clients.of(ctx).toolbox.workspace
        try:
            one = workspace.object(object_id)
            record = workspace.image(one.image_id)
        except InputError as error:
            raise MCPError(types.INVALID_PARAMS, str(error)) from error
        if one.mask is None:
            raise MCPError(types.INVALID_PARAMS, f"{object_id} has no mask yet")
        mime = _MASK_KINDS[kind][0]
        if kind == "json":
            text = json.dumps(masks_to_coco(labelled_masks([one]), record.image, record.file_name))
            return types.ReadResourceResult(
                contents=[types.TextResourceContents(uri=uri, mime_type=mime, text=text)]
            )
        png = BytesIO()
        one.mask.to_pil().save(png, "PNG")
        blob = base64.b64encode(png.getvalue()).decode("ascii")
        return types.ReadResourceResult(
            contents=[types.BlobResourceContents(uri=uri, mime_type=mime, blob=blob)]
        )


_MASK_KINDS = {
    "png": ("image/png", "a PNG picture: 255 on the object, 0 elsewhere"),
    "json": ("application/json", "a COCO JSON document with an RLE mask"),
}


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
