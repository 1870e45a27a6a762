"""Anthropic tool use: strict tool definitions, and the answer to a message's tool calls.

reply = client.messages.create(model=…, messages=messages, tools=tools(toolbox), max_tokens=…)
messages += [{"role": "assistant", "content": reply.content}, *answer(toolbox, reply)]
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from pydantic import BaseModel

from sam4mllm_integrations._shared import (
    ToolReply,
    arguments_schema,
    arun_tool,
    inlined,
    run_tool,
    without_null,
)
from sam4mllm_tool.tools.toolbox import Toolbox

try:
    from anthropic import transform_schema
    from anthropic.types import (
        Message,
        MessageParam,
        ToolParam,
        ToolResultBlockParam,
        ToolUseBlock,
    )
except ImportError as error:
    raise ImportError('Anthropic tools need: pip install "sam4mllm-tool[anthropic]"') from error


def strict_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Arguments in Anthropic's strict subset, by the SDK's own transformation.

    Limits the API cannot check are stated in the descriptions. Optional fields are left out rather
    than null: the API allows few fields of several types.
    """
    return transform_schema(without_null(inlined(arguments_schema(model))))


def tools(toolbox: Toolbox) -> list[ToolParam]:
    """Tool definitions for the Messages API."""
    return [
        {
            "name": spec.name,
            "description": spec.description,
            "input_schema": strict_schema(spec.arguments),
            "strict": True,
        }
        for spec in toolbox.specs()
    ]


def answer(
    toolbox: Toolbox, message: Message, *, others: Container[str] = ()
) -> list[MessageParam]:
    """Run a message's tool calls; returns the user message to append, none if it has no calls.

    Args:
        toolbox: the tools.
        message: the assistant's message.
        others: names of tools that somebody else answers; merge their results into this message.

    Raises:
        BackendError: the system failed: not something to tell the model.
    """
    calls = _calls(message, others)
    return _user_message([_block(c.id, run_tool(toolbox, c.name, c.input)) for c in calls])


async def aanswer(
    toolbox: Toolbox, message: Message, *, others: Container[str] = ()
) -> list[MessageParam]:
    """:func:`answer` without blocking the event loop."""
    calls = _calls(message, others)
    return _user_message([_block(c.id, await arun_tool(toolbox, c.name, c.input)) for c in calls])


def _calls(message: Message, others: Container[str]) -> list[ToolUseBlock]:
    return [b for b in message.content if b.type == "tool_use" and b.name not in others]


def _user_message(blocks: list[ToolResultBlockParam]) -> list[MessageParam]:
    return [{"role": "user", "content": blocks}] if blocks else []


def _block(call_id: str, reply: ToolReply) -> ToolResultBlockParam:
    block: ToolResultBlockParam = {
        "type": "tool_result",
        "tool_use_id": call_id,
        "content": [{"type": "text", "text": reply.text}],
        "is_error": reply.is_error,
    }
    if reply.picture is not None:
        block["content"] = [
            {"type": "text", "text": reply.text},
            {
                "type": "image",
                "source": {
                    "type": "base64",
                    "media_type": reply.picture.mime_type,
                    "data": reply.picture.base64,
                },
            },
        ]
    return block
