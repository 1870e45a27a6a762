"""The outcome of a call as the protocol has it: a result, or an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mcp_types as types
from mcp.shared.exceptions import MCPError

from sam4mllm_integrations.mcp_masks import mask_links
from sam4mllm_tool.errors import BackendError, Busy, InputError

if TYPE_CHECKING:
    from sam4mllm_integrations._shared import ToolReply

logger = logging.getLogger(__name__)

TRACE = "sam4mllm/trace"
"""In a request's ``_meta``: ask for the trace. In the result's: the trace, masks as COCO RLE.

For programs: clients do not show ``_meta`` to the LLM.
"""


def tool_result(
    reply: ToolReply, links: bool, meta: types.RequestParamsMeta | None
) -> types.CallToolResult:
    """A tool's reply as text, typed content, picture and links to masks."""
    content: list[types.ContentBlock] = [types.TextContent(text=reply.text)]
    if reply.output is None:
        return types.CallToolResult(content=content, is_error=True)
    if reply.picture is not None:
        picture = reply.picture
        content.append(types.ImageContent(data=picture.base64, mime_type=picture.mime_type))
    for object_id in reply.output.masks if links else ():
        content += mask_links(object_id)
    structured = reply.output.result.model_dump(mode="json")
    trace = reply.output.trace
    wanted = trace is not None and meta is not None and meta.get(TRACE) is True
    return types.CallToolResult(
        content=content,
        structured_content=structured,
        _meta={TRACE: trace.model_dump(mode="json")} if trace and wanted else None,
    )


@contextmanager
def protocol_errors(request_id: str = "") -> Iterator[None]:
    """What a tool's result cannot say, as an error of the protocol.

    What a client is told is one line. Where nothing but the server can help, the log has the rest.

    Raises:
        MCPError: in place of any other error.
    """
    try:
        yield
    except MCPError:
        raise
    except InputError as error:
        raise MCPError(types.INVALID_PARAMS, str(error)) from error
    except BackendError as error:
        data: dict[str, Any] = {"error": type(error).__name__, "retryable": error.retryable}
        if isinstance(error, Busy):
            data["retry_after"] = round(error.retry_after, 1)
        elif not error.retryable:
            logger.error("request %s failed", request_id, exc_info=error)
        raise _internal(str(error), data, request_id) from error
    except Exception as error:
        logger.exception("request %s failed", request_id)
        told = f"This is a fault of the server; its log has request {request_id}."
        raise _internal(told, {"error": "ServerFault", "retryable": False}, request_id) from error


def _internal(message: str, data: dict[str, Any], request_id: str) -> MCPError:
    known = {"request_id": request_id} if request_id else {}
    return MCPError(types.INTERNAL_ERROR, " ".join(message.split()), data | known)
