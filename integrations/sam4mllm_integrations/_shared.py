"""Shared by the adapters: schemas, calls with errors for the agent, size-bounded pictures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel

from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.errors import DialogueError, InputError
from sam4mllm_tool.tools.builtin.view_objects import ViewResult
from sam4mllm_tool.tools.registry import ToolOutput
from sam4mllm_tool.tools.toolbox import Toolbox

MAX_PICTURE_CHARACTERS = 900_000
"""Bound on a picture's base64 form; clients commonly refuse a tool result of 1 MB."""

_JPEG_QUALITIES = (90, 75)
_SMALLEST_SIDE = 64


@dataclass(frozen=True)
class Picture:
    """An encoded picture within a stated size."""

    data: bytes
    mime_type: Literal["image/png", "image/jpeg"]
    width: int
    height: int

    @property
    def base64(self) -> str:
        """The picture as base64 text."""
        return base64.b64encode(self.data).decode("ascii")

    @property
    def data_uri(self) -> str:
        """The picture as a ``data:`` URI."""
        return f"data:{self.mime_type};base64,{self.base64}"


@dataclass(frozen=True)
class ToolReply:
    """A call's outcome for an agent.

    Attributes:
        text: the result in words, or what was wrong and what to do about it.
        output: the typed result with masks; ``None`` after an error.
        picture: of ``view_objects``, within the size bound.
    """

    text: str
    output: ToolOutput | None = None
    picture: Picture | None = None

    @property
    def is_error(self) -> bool:
        """Whether the agent has to fix its call."""
        return self.output is None


def run_tool(
    toolbox: Toolbox,
    name: str,
    arguments: str | Mapping[str, Any] | None,
    *,
    max_picture_characters: int = MAX_PICTURE_CHARACTERS,
) -> ToolReply:
    """Run a tool for an agent: input and dialogue errors become a reply, with the hint.

    Args:
        toolbox: the tools.
        name: name of the tool.
        arguments: as a mapping or as the JSON text an LLM wrote. ``null`` counts as left out.
        max_picture_characters: bound on the picture's base64 form.

    Raises:
        BackendError: a model, device or endpoint failed: never disguised as a tool's output.
    """
    try:
        output = toolbox.call(name, _mapping(arguments))
    except (InputError, DialogueError) as error:
        return ToolReply(f"Error: {error}")
    return _reply(output, max_picture_characters)


async def arun_tool(
    toolbox: Toolbox,
    name: str,
    arguments: str | Mapping[str, Any] | None,
    *,
    max_picture_characters: int = MAX_PICTURE_CHARACTERS,
) -> ToolReply:
    """:func:`run_tool` in a worker thread; cancelling the task frees the model's turn."""
    call = partial(run_tool, max_picture_characters=max_picture_characters)
    return await run_in_thread(call, toolbox, name, arguments)


def bounded_picture(image: Image.Image, max_characters: int = MAX_PICTURE_CHARACTERS) -> Picture:
    """Encode ``image`` so that its base64 form has at most ``max_characters``.

    PNG if that fits, else JPEG, else a smaller JPEG.
    """
    picture = _png(image)
    for quality in _JPEG_QUALITIES:
        if _fits(picture, max_characters):
            return picture
        picture = _jpeg(image, quality)
    while not _fits(picture, max_characters) and max(image.size) > _SMALLEST_SIDE:
        excess = math.sqrt(_characters(picture) / max_characters)
        scale = min(0.9, 1 / excess)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
        picture = _jpeg(image, _JPEG_QUALITIES[-1])
    return picture


def arguments_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of a tool's arguments, without the titles pydantic makes up."""
    schema: dict[str, Any] = without_titles(model.model_json_schema())
    return schema


def without_titles(schema: Any) -> Any:
    """The schema without ``title`` keywords (a property that is called title stays)."""
    if isinstance(schema, list):
        return [without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: without_titles(part) for name, part in value.items()}
        if key in {"properties", "$defs"}
        else without_titles(value)
        for key, value in schema.items()
        if key != "title"
    }


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with every ``$ref`` replaced by what it refers to (ours are not recursive)."""
    definitions = schema.get("$defs", {})

    def walk(part: Any) -> Any:
        if isinstance(part, list):
            return [walk(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            target = definitions[part["$ref"].rpartition("/")[2]]
            return {**walk(target), **walk({k: v for k, v in part.items() if k != "$ref"})}
        return {key: walk(value) for key, value in part.items() if key != "$defs"}

    result: dict[str, Any] = walk(schema)
    return result


def without_null(schema: Any) -> Any:
    """The schema with ``X | null`` written as ``X``: an optional field is simply left out."""
    if isinstance(schema, list):
        return [without_null(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: without_null(value) for key, value in schema.items()}
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
        if len(kinds) == 1:
            rest = {k: v for k, v in schema.items() if k != "anyOf"}
            rest = {k: v for k, v in rest.items() if (k, v) != ("default", None)}
            return {**kinds[0], **rest}
    return schema


def _mapping(arguments: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments as a mapping, without nulls.

    Raises:
        InputError: not a JSON object.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"the arguments are not valid JSON: {error}", hint="Send one JSON object."
            ) from error
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise InputError("the arguments are not a JSON object", hint="Send one JSON object.")
    return {name: value for name, value in arguments.items() if value is not None}


def _reply(output: ToolOutput, max_characters: int) -> ToolReply:
    if output.picture is None:
        return ToolReply(output.text, output)
    picture = bounded_picture(output.picture, max_characters)
    output = _with_view_size(output, picture)
    return ToolReply(output.text, output, picture)


def _with_view_size(output: ToolOutput, picture: Picture) -> ToolOutput:
    """The result's text with the size of the picture that is sent."""
    result = output.result
    sent = picture.width, picture.height
    if not isinstance(result, ViewResult) or sent == (result.view_width, result.view_height):
        return output
    text = f"{result.text} Sent at {picture.width}x{picture.height}."
    update = {"view_width": picture.width, "view_height": picture.height, "text": text}
    return ToolOutput(result.model_copy(update=update), output.masks, output.picture)


def _png(image: Image.Image) -> Picture:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return Picture(buffer.getvalue(), "image/png", image.width, image.height)


def _jpeg(image: Image.Image, quality: int) -> Picture:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return Picture(buffer.getvalue(), "image/jpeg", image.width, image.height)


def _characters(picture: Picture) -> int:
    return 4 * math.ceil(len(picture.data) / 3)


def _fits(picture: Picture, max_characters: int) -> bool:
    return _characters(picture) <= max_characters
