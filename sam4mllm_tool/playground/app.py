"""The playground as an ASGI application: a page, its files, and the calls it makes."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sam4mllm_integrations.mcp_work import Limits, ModelQueue, deadline
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.errors import BackendError, DialogueError, ImageError, InputError, Sam4MllmError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.pipeline.strategies import STRATEGIES
from sam4mllm_tool.playground import pictures
from sam4mllm_tool.playground.gallery import Offer
from sam4mllm_tool.playground.gate import SESSION, Address, Gate
from sam4mllm_tool.playground.sessions import Session, Sessions
from sam4mllm_tool.playground.view import About, page_state
from sam4mllm_tool.playground.watching import Event, listening
from sam4mllm_tool.tools.toolbox import Toolbox

STATIC = Path(__file__).parent / "static"
LIMITS = Limits(clients=64, memory_bytes=2 * 1024**3, client_bytes=768 * 1024**2, idle_seconds=7200)
"""What browsers are granted; see :class:`Limits`."""
MOST_JSON = 1024**2
_KEEP = {"cache-control": "private, max-age=86400, immutable"}

Action = Callable[[Session], Any]


class Call(BaseModel):
    """A tool call that the page asks for."""

    model_config = ConfigDict(extra="forbid")

    tool: str = Field(max_length=100)
    arguments: dict[str, Any] = {}
    panel: Literal["a", "b"] = "a"


class Named(BaseModel):
    """A request that names one thing."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=4000)


@dataclass
class Playground:
    """The routes, over one model for all sessions.

    Args:
        toolbox: the tools; its model reports its steps if it is a
            :class:`~sam4mllm_tool.playground.watching.WatchedModel`.
        about: what the page says of the models.
        offers: pictures to choose from.
        policy: which files and addresses pictures may come from.
        limits: how many sessions, how long, how much memory.
    """

    toolbox: Toolbox
    about: About
    offers: list[Offer]
    policy: ImagePolicy
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        self._sessions = Sessions(self.toolbox, self.policy, self.limits)
        self._queue = ModelQueue(self.limits.model_calls, self.limits.waiting_calls)

    def routes(self) -> list[BaseRoute]:
        """All of them."""
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

    # -- what the page shows ---------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The page itself."""
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def state(self, request: Request) -> Response:
        """What is on the session's page."""
        return self._answer(self._session(request))

    async def settings(self, request: Request) -> Response:
        """What is the same for all sessions."""
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
        """An offered picture, small."""
        offer = self._offer(str(request.path_params["number"]))

        def draw() -> pictures.File:
            return pictures.thumbnail_file(load_image(offer.read(), self.policy).image)

        return _file(await run_in_thread(draw), _KEEP)

    async def picture(self, request: Request) -> Response:
        """A picture for display."""
        record = self._session(request).workspace.image(request.path_params["image_id"])
        return _file(await run_in_thread(pictures.picture_file, record.image), _KEEP)

    async def mask(self, request: Request) -> Response:
        """An object's mask for display."""
        record = self._session(request).workspace.object(request.path_params["object_id"])
        number = request.query_params.get("number", "1")
        if record.mask is None or not number.isdecimal():
            raise InputError(f"{record.object_id} has no such mask")
        return _file(await run_in_thread(pictures.mask_file, record.mask, int(number)), _KEEP)

    # -- what changes it -------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """Open the picture in the request's body."""
        data = await _body(request, self.policy.max_bytes)
        name = Path(request.query_params.get("name", "picture")).name
        return await self._change(request, lambda session: session.open_picture(data, name))

    async def choose(self, request: Request) -> Response:
        """Open an offered picture."""
        offer = self._offer((await _parsed(request, Named)).name)
        return await self._change(request, lambda s: s.open_picture(offer.read(), offer.name))

    async def open(self, request: Request) -> Response:
        """Open the picture at an address, where the policy allows it."""
        address = (await _parsed(request, Named)).name
        return await self._change(request, lambda session: session.open_picture(address))

    async def remove(self, request: Request) -> Response:
        """Take an object off the page."""
        name = (await _parsed(request, Named)).name
        return await self._change(request, lambda session: session.remove(name))

    async def undo(self, request: Request) -> Response:
        """Undo the last change."""
        return await self._change(request, Session.undo)

    async def clear(self, request: Request) -> Response:
        """Take everything off the page but the picture."""
        return await self._change(request, Session.clear)

    async def call(self, request: Request) -> Response:
        """Make a tool call; answers with a JSON line per event, the last one state or error."""
        call = await _parsed(request, Call)
        session = self._session(request)
        lines = self._events(session, request.scope[SESSION], call)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def _change(self, request: Request, action: Action) -> Response:
        session = self._session(request)
        with deadline(self.limits.call_seconds):
            async with session.lock:
                await run_in_thread(action, session)
        return self._answer(session)

    async def _events(self, session: Session, key: str, call: Call) -> AsyncIterator[str]:
        """Events as the call goes on; a browser that goes away cancels it."""
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

        def tell(event: Event) -> None:  # the models run in another thread
            loop.call_soon_threadsafe(queue.put_nowait, event)

        tell({"event": "stage", "name": "waiting"})
        try:
            with deadline(self.limits.call_seconds), listening(tell):
                async with session.lock, self._queue.place(key):
                    output = await run_in_thread(
                        session.call, call.tool, call.arguments, call.panel
                    )
            result = output.result.model_dump(mode="json")
            tell({"event": "state", "state": page_state(session, self.about), "result": result})
        except Sam4MllmError as error:
            tell({"event": "error", **_error(error)})
        except Exception:
            tell({"event": "error", "message": "The playground failed.", "hint": _SEE_LOG})
            raise

    # -- what is saved ---------------------------------------------------------------------------

    async def save(self, request: Request) -> Response:
        """A file to keep: the overlay, masks, COCO, a trace, the picture, the calls."""
        session, file = self._session(request), request.path_params["file"]
        data, media_type = await run_in_thread(
            self._saved, session, file, request.query_params.get("panel", "a")
        )
        headers = {"content-disposition": f'attachment; filename="{file}"'}
        return Response(data, media_type=media_type, headers=headers)

    def _saved(self, session: Session, file: str, panel: str) -> pictures.File:
        image = session.workspace.image(session.board.image_id)
        pairs = [(one, session.record(one.object_id)) for one in session.board.shown]
        objects = [(one, record) for one, record in pairs if record and one.panel == panel]
        stem, _, suffix = file.rpartition(".")
        match file:
            case "overlay.png":
                masks = {one.number: record.mask for one, record in objects if record.mask}
                return pictures.overlay_download(image, masks)
            case "coco.json":
                return pictures.coco_download(image, [record for _, record in objects])
            case "picture.png":
                return pictures.full_download(image)
            case "calls.json" | "calls.py":
                text = page_state(session, self.about)["json" if suffix == "json" else "python"]
                return text.encode(), "text/plain; charset=utf-8"
        shown = session.board.find(stem)
        record = session.record(stem)
        if suffix == "png" and record is not None and record.mask is not None:
            return pictures.mask_download(record)
        if suffix in ("html", "json") and shown is not None and shown.trace is not None:
            return pictures.trace_download(shown.trace, image, suffix)
        raise InputError(f"there is nothing to save as {file[:60]!r}")

    # -- requests --------------------------------------------------------------------------------

    def _session(self, request: Request) -> Session:
        return self._sessions.of(request.scope[SESSION])

    def _answer(self, session: Session) -> Response:
        return JSONResponse(page_state(session, self.about))

    def _offer(self, number: str) -> Offer:
        if not number.isdecimal() or int(number) >= len(self.offers):
            raise InputError("there is no such picture", hint="Load the page again.")
        return self.offers[int(number)]


_SEE_LOG = "Look at the terminal in which it runs."


def playground_app(playground: Playground, address: Address) -> Starlette:
    """The application, behind the checks of hosts, origins and sessions."""

    async def typed(request: Request, error: Exception) -> Response:
        assert isinstance(error, Sam4MllmError)
        return JSONResponse(_error(error), 503 if isinstance(error, BackendError) else 400)

    async def untyped(request: Request, error: Exception) -> Response:
        return JSONResponse({"message": "The playground failed.", "hint": _SEE_LOG}, 500)

    app = Starlette(
        routes=playground.routes(),
        exception_handlers={Sam4MllmError: typed, Exception: untyped},
    )
    app.add_middleware(Gate, address=address)
    return app


def _error(error: Sam4MllmError) -> dict[str, Any]:
    """A typed error as the page shows it."""
    message = error.message
    if isinstance(error, DialogueError):
        message += f" The model said: {error.raw_reply[:300]!r}"
    return {"message": message, "hint": error.hint or "", "kind": type(error).__name__}


def _file(file: pictures.File, headers: dict[str, str]) -> Response:
    return Response(file[0], media_type=file[1], headers=headers)


async def _body(request: Request, most: int) -> bytes:
    """The request's body.

    Raises:
        ImageError: it is larger than ``most`` bytes; the rest is not read.
    """
    parts, size = [], 0
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > most:
        raise _too_large(most)
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


def _too_large(most: int) -> ImageError:
    return ImageError(
        f"The file is larger than {most // 1024**2} MiB.",
        hint="Use a smaller or better compressed picture.",
    )


async def _parsed(request: Request, model: type[Any]) -> Any:
    """The request's JSON body. A page of another origin cannot send this type unasked."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "Send application/json.")
    data = await _body(request, MOST_JSON)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise InputError("the request cannot be read", hint="Load the page again.") from error
