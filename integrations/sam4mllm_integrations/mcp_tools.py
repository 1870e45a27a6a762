"""The tools as MCP sees them: listing, calling, masks as resources.

The server answers ``initialize`` and ``tools/list`` before any weights are loaded, and loads them
in the background. Each client has a workspace of its own. Results are typed
(``structuredContent``) with short text; masks are resources, linked from the result that drew them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sam4mllm_integrations._shared import (
    MAX_PICTURE_CHARACTERS,
    ToolReply,
    arguments_schema,
    run_tool,
    without_titles,
)
from sam4mllm_tool.concurrency import CallContext, call_context, run_in_thread
from sam4mllm_tool.errors import Busy, InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.isolation import warm_up
from sam4mllm_tool.tools.coordinates import Coordinates
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.state import StateStore
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace

try:
    import mcp_types as types
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp.shared.exceptions import MCPError

    from sam4mllm_integrations.mcp_clients import Client, Clients
    from sam4mllm_integrations.mcp_masks import mask_list, mask_templates, read_mask
    from sam4mllm_integrations.mcp_results import protocol_errors, tool_result
    from sam4mllm_integrations.mcp_watch import CallWatch, Watch
    from sam4mllm_integrations.mcp_work import FairQueue, Limits, deadline
except ImportError as error:
    raise ImportError('the MCP server needs: pip install "sam4mllm-tool[mcp]"') from error

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline.model import Sam4MLLM

CALL_ID = "sam4mllm/call-id"
"""Entry of a request's ``_meta``: a call repeated under the same id gets the first one's answer."""
_MAX_CALL_ID = 200
_LOAD_AFTER_SECONDS = 0.2

INSTRUCTIONS = (
    "Finds and masks objects described in words. Start with segment_object(image, expression). "
    "Results carry image_id and object_id handles: pass these on instead of files or masks. Masks "
    "are resources (PNG and COCO JSON), linked from the results. Files can be read and written "
    "only in the folders the server allows."
)

logger = logging.getLogger(__name__)
_Context = ServerRequestContext[Any, Any]
T = TypeVar("T")


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
        limits: what clients are granted.
        state: keeps the workspaces of clients that may come back: over stdio, with users' tokens
            or cookies. Sessions end with the process, and so do their handles.
    """

    load: Callable[[], Sam4MLLM]
    allow_dirs: Sequence[Path] = ()
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    coordinates: Coordinates = "pixels"
    max_picture_characters: int = MAX_PICTURE_CHARACTERS
    mask_links: bool = True
    tools: Sequence[ToolSpec | str] | None = None
    read_only: bool = False
    limits: Limits = field(default_factory=Limits)
    state: StateStore | None = None

    def __post_init__(self) -> None:
        self._model = Toolbox(
            self._loaded, coordinates=self.coordinates, tools=self.tools, read_only=self.read_only
        )
        self._loading: threading.Thread | None = None
        self.ready = False
        self.draining = False
        self.running = 0
        self.answers = 0
        self._clients = Clients(
            self._model, tuple(self.allow_dirs), self.policy, self.limits, self.state
        )
        waiting, others = self.limits.waiting_calls, self.limits.other_calls
        self._queue = FairQueue(self.limits.model_calls, waiting)
        self._others = FairQueue(others, waiting, each=max(1, others // 2))
        self.watch = Watch(
            {
                ("sam4mllm_waiting_calls", "Calls that wait for the models."): (
                    lambda: self._queue.waiting
                ),
                ("sam4mllm_running_calls", "Calls that are not finished."): lambda: self.running,
                ("sam4mllm_clients", "Clients with a workspace."): lambda: len(self._clients),
                ("sam4mllm_kept_bytes", "Pixels, masks and logits kept for clients."): (
                    lambda: self._clients.bytes_kept
                ),
            }
        )
        self.server: Server[Any] = Server(
            "sam4mllm-tool",
            version=version("sam4mllm-tool"),
            instructions=INSTRUCTIONS,
            on_list_tools=self.list_tools,
            # Without this the SDK lists all tools again at each call.
            get_tool_input_schema=self._input_schema,
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

    @cached_property
    def _tools(self) -> list[types.Tool]:
        # Every connection lists the tools, and pydantic needs about 20 ms to make their schemas.
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

    def _input_schema(self, name: str) -> dict[str, Any] | None:
        return next((tool.input_schema for tool in self._tools if tool.name == name), None)

    async def call_tool(
        self, ctx: _Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult | types.InputRequiredResult:
        """Run a tool within the deadline, reporting each stage.

        Raises:
            MCPError: no such tool, too much asked at once, or the system failed.
        """
        self._check_name(params.name)
        with protocol_errors():
            client = await self._admitted(ctx)
        call_id = _call_id(params)
        with self.watch.call(params.name, client.key) as call, self._counted(client):
            with protocol_errors(call.request_id), deadline(self.limits.call_seconds):
                question = await self._clients.learn_roots(ctx, client, params.input_responses)
                if question is not None:
                    call.outcome = "question"
                    return question
                result = await self._run(ctx, client, params, call_id, call)
            call.outcome = "tool_error" if result.is_error else "ok"
        return result

    def forget(self, key: str) -> None:
        """A client has left."""
        self._clients.forget(key)

    @contextmanager
    def answering(self, counts: bool) -> Iterator[None]:
        """Count a request until its answer has been sent, if it has one."""
        self.answers += counts
        try:
            yield
        finally:
            self.answers -= counts

    async def _admitted(self, ctx: _Context) -> Client:
        if self.draining:
            raise Busy("the server is shutting down", retry_after=self.limits.drain_seconds)
        return await self._clients.of(ctx)

    @contextmanager
    def _counted(self, client: Client) -> Iterator[None]:
        self.running += 1
        client.running += 1
        try:
            yield
        finally:
            self.running -= 1
            client.running -= 1

    async def _run(
        self,
        ctx: _Context,
        client: Client,
        params: types.CallToolRequestParams,
        call_id: str,
        call: CallWatch,
    ) -> types.CallToolResult:
        """Pictures are opened, and tools without a model run, beside the queue at the models."""
        if not self._model.spec(params.name).needs_model:
            async with self._others.place(client.key):
                return await self._run_now(ctx, client, params, call_id, call)
        try:
            arguments = await self._with_image_opened(client, params.arguments)
        except InputError as error:
            return tool_result(ToolReply(f"Error: {error}"), self.mask_links, params.meta)
        params = params.model_copy(update={"arguments": arguments})
        async with self._queue.place(client.key):
            return await self._run_now(ctx, client, params, call_id, call)

    async def _with_image_opened(
        self, client: Client, arguments: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """A source that takes time to fetch or decode must not take a place at the models."""
        source = (arguments or {}).get("image")
        if not arguments or not isinstance(source, str):
            return arguments
        async with self._others.place(client.key):
            record = await run_in_thread(client.toolbox.workspace.open_image, source)
        return {**arguments, "image": record.image_id}

    async def _run_now(
        self,
        ctx: _Context,
        client: Client,
        params: types.CallToolRequestParams,
        call_id: str,
        call: CallWatch,
    ) -> types.CallToolResult:
        loop = asyncio.get_running_loop()
        numbers = itertools.count(1)
        told: list[Future[None]] = []

        def on_stage(stage: str) -> None:  # called in the worker thread
            call.stage(stage)
            report = ctx.session.report_progress(next(numbers), None, stage)
            told.append(asyncio.run_coroutine_threadsafe(report, loop))

        try:
            with call_context(CallContext(on_stage=on_stage)):
                result = await run_in_thread(self._result, client, params, call_id)
            await asyncio.gather(*map(asyncio.wrap_future, told))
        finally:
            for report in told:
                report.cancel()
        return result

    def _result(
        self, client: Client, params: types.CallToolRequestParams, call_id: str
    ) -> types.CallToolResult:
        """Run the tool; a call that was answered before is answered the same, and not run."""

        def run() -> types.CallToolResult:
            reply = run_tool(
                client.toolbox,
                params.name,
                params.arguments,
                max_picture_characters=self.max_picture_characters,
            )
            return tool_result(reply, self.mask_links, params.meta)

        if not call_id:
            return run()
        with client.toolbox.workspace.once(call_id) as once:
            if once.answer is None:
                result = run()
                if once.made or not self._model.spec(params.name).read_only:
                    once.answer = result.model_dump_json(by_alias=True)
        return types.CallToolResult.model_validate_json(once.answer) if once.answer else result

    def _check_name(self, name: str) -> None:
        try:
            self._model.spec(name)
        except InputError as error:
            raise MCPError(types.INVALID_PARAMS, str(error)) from error

    def _loaded(self) -> Sam4MLLM:
        model = self.load()
        self.ready = True
        return model

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
        return mask_list(await self._read(ctx, Workspace.objects))

    async def list_mask_templates(
        self, ctx: _Context, params: Any
    ) -> types.ListResourceTemplatesResult:
        """How the address of a mask is made from an object_id."""
        return mask_templates()

    async def read_mask(
        self, ctx: _Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        """A mask in full.

        Raises:
            MCPError: no such object, or it has no mask.
        """
        content = await self._read(ctx, partial(read_mask, uri=str(params.uri)))
        return types.ReadResourceResult(contents=[content])

    async def _read(self, ctx: _Context, function: Callable[[Workspace], T]) -> T:
        """What a function finds in the client's workspace, within the bounds on other calls.

        Raises:
            MCPError: it failed, or took too long.
        """
        with protocol_errors(), deadline(self.limits.call_seconds):
            client = await self._admitted(ctx)
            async with self._others.place(client.key):
                return await run_in_thread(function, client.toolbox.workspace)


def _call_id(params: types.CallToolRequestParams) -> str:
    """The id under which the client may repeat the call; "" if it gave none.

    Raises:
        MCPError: it is no short text.
    """
    call_id = (params.meta or {}).get(CALL_ID, "")
    if not isinstance(call_id, str) or len(call_id) > _MAX_CALL_ID:
        raise MCPError(
            types.INVALID_PARAMS, f"{CALL_ID} is not a text of {_MAX_CALL_ID} characters"
        )
    return call_id
