"""What the page sends: bounded bodies, and JSON that is checked."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sam4mllm_tool.errors import ImageError, InputError

T = TypeVar("T", bound=BaseModel)

MOST_JSON = 1024**2


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


async def read_body(request: Request, most: int) -> bytes:
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


async def parsed(request: Request, model: type[T]) -> T:
    """The request's JSON body. A page of another origin cannot send this type unasked."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "Send application/json.")
    data = await read_body(request, MOST_JSON)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise InputError("the request cannot be read", hint="Load the page again.") from error
