"""The playground as an ASGI application: the page, its static files, and its requests."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
from sam4mllm_integrations.mcp_work import FairQueue, Limits, deadline
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.errors import BackendError, DialogueError, InputError, Sam4MllmError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.pipeline.strategies import STRATEGIES
from sam4mllm_tool.playground import pictures
from sam4mllm_tool.playground.gallery import Offer
from sam4mllm_tool.playground.gate import SESSION, Address, Gate
from sam4mllm_tool.playground.requests import Call, Named, parsed, read_body
from sam4mllm_tool.playground.saving import saved_file
from sam4mllm_tool.playground.sessions import Session, Sessions
from sam4mllm_tool.playground.view import About, page_state
from sam4mllm_tool.playground.watching import Event, listening
from sam4mllm_tool.tools.toolbox import Toolbox

STATIC = Path(__file__).parent / "static"
LIMITS = Limits(clients=64, memory_bytes=2 * 1024**3, client_bytes=768 * 1024**2, idle_seconds=7200)
"""Limits for browser sessions; see :class:`Limits`."""
_KEEP = {"cache-control": "private, max-age=86400, immutable"}


@dataclass
class Playground:
    """The routes, over one model for all sessions.

    Args:
        toolbox: the tools; its model reports its steps if it is a
            :class:`~sam4mllm_tool.playground.watching.WatchedModel`.
        about: what the page shows about the models.
        offers: pictures of the gallery.
        policy: which files and addresses pictures may come from.
        limits: number of sessions, idle time, memory, and waiting calls.
    """

    toolbox: Toolbox
    about: About
    offers: list[Offer]
    policy: ImagePolicy
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        self._sessions = Sessions(self.toolbox, self.policy, self.limits)
        self._uploads = anyio.CapacityLimiter(self.limits.other_calls)
        self._thumbnails: dict[str, pictures.File] = {}
        self._queue = FairQueue(self.limits.model_calls, self.limits.waiting_calls)

    def routes(self) -> list[BaseRoute]:
        """All routes of the application."""
        return [
            Route("/", self.page),
            Route("/state", self.state),
            Route("/settings", self.settings),
            Route("/upload", self.upload, methods=["POST"]),
            Route("/choose", self.choose, methods=["POST"]),
            Route("/open", self.open, methods=["POST"]),
            Route("/call", self.call, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/remove", self.remove, methods=["POST"]),
            Route("/clear", self.clear, methods=["POST"]),
            Route("/thumbnails/{number:int}", self.thumbnail),
            Route("/pictures/{image_id}", self.picture),
            Route("/masks/{object_id}", self.mask),
            Route("/save/{file}", self.save),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

    # -- what the page reads ---------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The page itself."""
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def state(self, request: Request) -> Response:
        """The contents of the session's page."""
        return self._state_response(self._session(request))

    async def settings(self, request: Request) -> Response:
        """Settings that are the same for all sessions."""
        settings = self.toolbox.model.settings
        return JSONResponse(
            {
                "about": asdict(self.about),
                "network": self.policy.allow_network,
                "max_bytes": self.policy.max_bytes,
                "offers": [
                    {"name": one.name, "kind": one.kind, "expressions": one.expressions}
                    for one in self.offers
                ],
                "strategies": {
                    name: (inspect.getdoc(type(one)) or "").partition("\n")[0]
                    for name, one in STRATEGIES.items()
                },
                "strategy": settings.strategy,
                "points": settings.points,
                "p_yes_above": settings.thresholds.foreground,
                "p_no_above": settings.thresholds.background,
            }
        )

    async def thumbnail(self, request: Request) -> Response:
        """A thumbnail of a gallery picture."""
        number = str(request.path_params["number"])
        if number not in self._thumbnails:
            offer = self._offer(number)
            image = await run_in_thread(lambda: load_image(offer.read(), self.policy).image)
            self._thumbnails[number] = pictures.thumbnail_file(image)
        return _file(self._thumbnails[number], _KEEP)

    async def picture(self, request: Request) -> Response:
        """An opened picture, scaled for display."""
        record = self._session(request).workspace.image(request.path_params["image_id"])
        return _file(await run_in_thread(pictures.picture_file, record.image), _KEEP)

    async def mask(self, request: Request) -> Response:
        """An object's mask, scaled for display."""
        record = self._session(request).workspace.object(request.path_params["object_id"])
        number = request.query_params.get("number", "1")
        if record.mask is None or not number.isdecimal():
            raise InputError(f"{record.object_id} has no such mask")
        return _file(await run_in_thread(pictures.mask_file, record.mask, int(number)), _KEEP)

    # -- what changes the page -------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """Open the picture in the request's body."""
        session = self._session(request)
        name = Path(request.query_params.get("name", "picture")).name
        with deadline(self.limits.call_seconds):
            async with self._uploads:
                data = await read_body(request, self.policy.max_bytes)
                return await self._open_picture(session, data, name)

    async def choose(self, request: Request) -> Response:
        """Open a picture of the gallery."""
        offer = self._offer((await parsed(request, Named)).name)
        data = await run_in_thread(offer.read)
        return await self._open_picture(self._session(request), data, offer.name)

    async def open(self, request: Request) -> Response:
        """Open the picture at a URL, if the policy allows it."""
        address = (await parsed(request, Named)).name
        return await self._open_picture(self._session(request), address)

    async def remove(self, request: Request) -> Response:
        """Remove an object from the page."""
        name = (await parsed(request, Named)).name
        return await self._apply(request, lambda session: session.remove(name))

    async def undo(self, request: Request) -> Response:
        """Undo the last change."""
        return await self._apply(request, Session.undo)

    async def clear(self, request: Request) -> Response:
        """Remove everything from the page except the picture."""
        return await self._apply(request, Session.clear)

    async def call(self, request: Request) -> Response:
        """Run a tool call. Streams one JSON line per event; the last is ``state`` or ``error``."""
        call = await parsed(request, Call)
        session = self._session(request)
        lines = self._events(session, request.scope[SESSION], call)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def _open_picture(
        self, session: Session, source: str | bytes, name: str = ""
    ) -> Response:
        with deadline(self.limits.call_seconds):
            async with session.lock:
                await session.open_picture(source, name)
        return self._state_response(session)

    async def _apply(self, request: Request, change: Callable[[Session], None]) -> Response:
        session = self._session(request)
        async with session.lock:
            change(session)
        return self._state_response(session)

    async def _events(self, session: Session, key: str, call: Call) -> AsyncIterator[str]:
        """The events of a running call; it is cancelled when the browser disconnects."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        task = asyncio.create_task(self._run(session, key, call, queue))
        try:
            while True:
                event = await queue.get()
                yield json.dumps(event) + "\n"
                if event["event"] in ("state", "error"):
                    break
        finally:
            task.cancel()

    async def _run(
        self, session: Session, key: str, call: Call, queue: asyncio.Queue[Event]
    ) -> None:
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:  # called from the thread that runs the models
            loop.call_soon_threadsafe(queue.put_nowait, event)

        emit({"event": "stage", "name": "waiting"})
        try:
            with deadline(self.limits.call_seconds), listening(emit):
                async with session.lock, self._queue.place(key):
                    output = await session.call(call.tool, call.arguments, call.panel)
            result = output.result.model_dump(mode="json")
            emit({"event": "state", "state": page_state(session, self.about), "result": result})
        except Sam4MllmError as error:
            emit({"event": "error", **_error(error)})
        except Exception:
            emit({"event": "error", "message": "The playground failed.", "hint": _SEE_LOG})
            raise

    # -- downloads -------------------------------------------------------------------------------

    async def save(self, request: Request) -> Response:
        """A file to download: the overlay, masks, COCO, a trace, the picture, the calls."""
        session, file = self._session(request), request.path_params["file"]
        panel = request.query_params.get("panel", "a")
        data, media_type = await run_in_thread(saved_file, session, self.about, file, panel)
        headers = {"content-disposition": f'attachment; filename="{file}"'}
        return Response(data, media_type=media_type, headers=headers)

    # -- requests --------------------------------------------------------------------------------

    def _session(self, request: Request) -> Session:
        return self._sessions.of(request.scope[SESSION])

    def _state_response(self, session: Session) -> Response:
        return JSONResponse(page_state(session, self.about))

    def _offer(self, number: str) -> Offer:
        if not number.isdecimal() or int(number) >= len(self.offers):
            raise InputError("there is no such picture", hint="Load the page again.")
        return self.offers[int(number)]


_SEE_LOG = "See the terminal in which the playground runs."


def playground_app(playground: Playground, address: Address) -> Starlette:
    """The application, with the checks of host, origin and session in front of it."""

    async def expected_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, Sam4MllmError)
        return JSONResponse(_error(error), 503 if isinstance(error, BackendError) else 400)

    async def unexpected_error(request: Request, error: Exception) -> Response:
        return JSONResponse({"message": "The playground failed.", "hint": _SEE_LOG}, 500)

    app = Starlette(
        routes=playground.routes(),
        exception_handlers={Sam4MllmError: expected_error, Exception: unexpected_error},
    )
    app.add_middleware(Gate, address=address)
    return app


def _error(error: Sam4MllmError) -> dict[str, Any]:
    """A typed error as the page shows it."""
    message = error.message
    if isinstance(error, DialogueError):
        message += f" The model replied: {error.raw_reply[:300]!r}"
    return {"message": message, "hint": error.hint or "", "kind": type(error).__name__}


def _file(file: pictures.File, headers: dict[str, str]) -> Response:
    return Response(file[0], media_type=file[1], headers=headers)
