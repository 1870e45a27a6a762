"""The tools of a running MCP server, called from here: no models are loaded, and no torch.

remote = RemoteTools("http://127.0.0.1:8765", token="…")
remote.segment(Path("desk.png").read_bytes(), "the tree").objects[0]["mask"]  # COCO RLE
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, cast

from sam4mllm_tool.errors import EndpointError, ExpressionError, InputError
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.tools.coordinates import Frame
from sam4mllm_tool.types import Point, TargetCount

try:
    import mcp_types as types
    from mcp import Client

    from sam4mllm_integrations.mcp_connection import Connection
    from sam4mllm_integrations.mcp_results import TRACE
except ImportError as error:
    raise ImportError('the MCP client needs: pip install "sam4mllm-tool[mcp]"') from error

_LABELS = {"inside": "foreground", "outside": "background", "undecided": "undecided"}


class RemoteTools:
    """The tools of a server that runs ``sam4mllm-tool mcp --transport http``.

    Args:
        server: its address; ``/mcp`` is added if it has no path.
        token: bearer token, if the server asks for one.
        call_seconds: how long a call may take; the server has a deadline of its own.
        busy_seconds: how long a busy server is asked again before the call fails.

    Raises:
        InputError: the address or the token cannot be right.
    """

    def __init__(
        self,
        server: str,
        token: str | None = None,
        *,
        call_seconds: float = 300.0,
        busy_seconds: float = 60.0,
    ) -> None:
        self._connection = Connection(
            server, token, call_seconds=call_seconds, busy_seconds=busy_seconds
        )

    def segment(
        self,
        picture: bytes,
        expression: str,
        *,
        count: TargetCount = TargetCount.ZERO_OR_MORE,
        **options: Any,
    ) -> Trace:
        """The whole run of ``segment_object``; its ``objects`` hold the masks.

        Args:
            picture: the encoded file.
            expression: what to find.
            count: how many objects it may mean.
            options: further arguments of the tool, such as ``strategy`` and ``points``.

        Raises:
            InputError: the tool refuses the call, or the server the client (``AccessDenied``).
            BackendError: the server cannot be reached (``EndpointError``), stays ``Busy``, or
                fails.
        """
        arguments = {"image": _data_uri(picture), "expression": expression, "count": count.value}

        async def ask(client: Client) -> Trace:
            answer = await _call(client, "segment_object", arguments | options, trace=True)
            if not answer.meta or TRACE not in answer.meta:
                raise EndpointError(
                    f"{self._connection.url} sends no traces",
                    hint="Update the server.",
                    retryable=False,
                )
            return Trace.model_validate(answer.meta[TRACE])

        return self._connection.run(ask)

    def probe(
        self, picture: bytes, expression: str, points: Sequence[Point] | None = None
    ) -> dict[str, Any]:
        """Whether points lie on the object: ``locate_object``, then ``is_point_inside_object``.

        Args:
            picture: the encoded file.
            expression: the object.
            points: in pixels; by default an even grid over the box.

        Returns:
            ``image_size`` and ``box`` in pixels, ``points`` with ``x``, ``y``, ``label``,
            ``p_yes`` and ``p_no`` as a trace holds them, and ``notes``.

        Raises:
            ExpressionError: nothing matches.
            InputError, BackendError: as :meth:`segment`.
        """
        places = None if points is None else [{"x": x, "y": y} for x, y in points]

        async def ask(client: Client) -> dict[str, Any]:
            await self._check_pixels(client)
            arguments = {"image": _data_uri(picture), "expression": expression}
            found = _structured(await _call(client, "locate_object", arguments))
            if not found["objects"]:
                raise ExpressionError(
                    f"nothing in the picture matches {expression!r}",
                    hint="Describe something that is there.",
                )
            first = found["objects"][0]
            about = {"object_id": first["object_id"], "points": places}
            answers = _structured(await _call(client, "is_point_inside_object", about))
            return {
                "image_size": [found["image_width"], found["image_height"]],
                "box": first["box"],
                "points": list(map(_point, answers["points"])),
                "notes": found["notes"],
            }

        return self._connection.run(ask)

    async def _check_pixels(self, client: Client) -> None:
        """Points are sent in pixels, whatever the server is set to."""
        pixels = Frame.describe("pixels")
        for tool in (await client.list_tools()).tools:
            if tool.name == "is_point_inside_object" and pixels not in (tool.description or ""):
                raise InputError(
                    f"the numbers of {self._connection.url} are thousandths",
                    hint="Ask a server without --coordinates relative_1000.",
                )


async def _call(
    client: Client, name: str, arguments: dict[str, Any], *, trace: bool = False
) -> types.CallToolResult:
    """A tool's result.

    Raises:
        InputError: the tool refuses the call.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    meta = cast(types.RequestParamsMeta, {TRACE: True}) if trace else None
    answer = await client.call_tool(name, given, meta=meta)
    if answer.is_error:
        texts = [block.text for block in answer.content if isinstance(block, types.TextContent)]
        message, _, hint = "\n".join(texts).removeprefix("Error: ").partition(" Hint: ")
        raise InputError(message, hint=hint)
    return answer


def _structured(answer: types.CallToolResult) -> dict[str, Any]:
    return answer.structured_content or {}


def _point(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "x": answer["x"],
        "y": answer["y"],
        "label": _LABELS[answer["answer"]],
        "p_yes": answer["p_yes"],
        "p_no": answer["p_no"],
    }


def _data_uri(picture: bytes) -> str:
    # The server goes by the content, not by the stated type.
    return f"data:application/octet-stream;base64,{base64.b64encode(picture).decode('ascii')}"
