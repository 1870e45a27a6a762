"""Reading the page's requests: bodies of bounded size, and validated JSON."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sam4mllm_tool.errors import ImageError, InputError

T = TypeVar("T", bound=BaseModel)

MAX_JSON_BYTES = 1024**2


class Call(BaseModel):
    """A request to run a tool."""

    model_config = ConfigDict(extra="forbid")

    tool: str = Field(max_length=100)
    arguments: dict[str, Any] = {}
    panel: Literal["a", "b"] = "a"


class Named(BaseModel):
    """A request that names one thing."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=4000)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the request's body.

    Raises:
        ImageError: it is larger than ``max_bytes`` bytes; the rest is not read.
    """
    parts, size = [], 0
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> ImageError:
    return ImageError(
        f"The file is larger than {max_bytes // 1024**2} MiB.",
        hint="Use a smaller or better compressed picture.",
    )


async def parsed(request: Request, model: type[T]) -> T:
    """The request's JSON body. Other origins cannot send this type without a CORS preflight."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "Send application/json.")
    data = await read_body(request, MAX_JSON_BYTES)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise InputError("the request cannot be read", hint="Load the page again.") from error
