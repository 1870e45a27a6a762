"""OpenAI function calling: strict tool definitions, and the answers to a response's tool calls.

    tools = chat_tools(toolbox)
    reply = client.chat.completions.create(model=…, messages=messages, tools=tools)
    message = reply.choices[0].message
    messages += [message, *answer_chat(toolbox, message)]

The Responses API has the same pair: :func:`responses_tools` and :func:`answer_responses`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from sam4mllm_integrations._shared import (
    ToolReply,
    arguments_schema,
    arun_tool,
    inlined,
    run_tool,
)
from sam4mllm_tool.tools.toolbox import Toolbox

try:
    from openai.types.chat import (
        ChatCompletionMessage,
        ChatCompletionMessageParam,
        ChatCompletionToolParam,
    )
    from openai.types.responses import FunctionToolParam, Response, ResponseInputItemParam
except ImportError as error:
    raise ImportError('OpenAI tools need: pip install "sam4mllm-tool[openai]"') from error

_NOT_IN_STRICT_MODE = ("default", "minLength")


class _Call(NamedTuple):
    call_id: str
    name: str
    arguments: str


def strict_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Arguments in OpenAI's strict subset: all properties required, optional ones nullable."""
    return _strict(inlined(arguments_schema(model)))


def chat_tools(toolbox: Toolbox) -> list[ChatCompletionToolParam]:
    """Tool definitions for Chat Completions."""
    return [
        {
            "type": "function",
            "function": {
                "name": spec.name,
                "description": spec.description,
                "parameters": strict_schema(spec.arguments),
                "strict": True,
            },
        }
        for spec in toolbox.specs()
    ]


def responses_tools(toolbox: Toolbox) -> list[FunctionToolParam]:
    """Tool definitions for the Responses API."""
    return [
        {
            "type": "function",
            "name": spec.name,
            "description": spec.description,
            "parameters": strict_schema(spec.arguments),
            "strict": True,
        }
        for spec in toolbox.specs()
    ]


def answer_chat(
    toolbox: Toolbox, message: ChatCompletionMessage, *, others: Container[str] = ()
) -> list[ChatCompletionMessageParam]:
    """Run a message's tool calls; returns what to append after it.

    Tool messages hold text only, so pictures follow in a user message.

    Args:
        toolbox: the tools.
        message: the assistant's message.
        others: names of tools that somebody else answers.

    Raises:
        BackendError: the system failed: not something to tell the model.
    """
    calls = _chat_calls(message, others)
    return _chat_answers([(call, run_tool(toolbox, call.name, call.arguments)) for call in calls])


async def aanswer_chat(
    toolbox: Toolbox, message: ChatCompletionMessage, *, others: Container[str] = ()
) -> list[ChatCompletionMessageParam]:
    """:func:`answer_chat` without blocking the event loop."""
    calls = _chat_calls(message, others)
    return _chat_answers(
        [(call, await arun_tool(toolbox, call.name, call.arguments)) for call in calls]
    )


def answer_responses(
    toolbox: Toolbox, response: Response, *, others: Container[str] = ()
) -> list[ResponseInputItemParam]:
    """Run a response's function calls; returns the items to send as the next input.

    Raises:
        BackendError: the system failed: not something to tell the model.
    """
    calls = _response_calls(response, others)
    return [_output_item(call, run_tool(toolbox, call.name, call.arguments)) for call in calls]


async def aanswer_responses(
    toolbox: Toolbox, response: Response, *, others: Container[str] = ()
) -> list[ResponseInputItemParam]:
    """:func:`answer_responses` without blocking the event loop."""
    calls = _response_calls(response, others)
    return [
        _output_item(call, await arun_tool(toolbox, call.name, call.arguments)) for call in calls
    ]


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in schema.items() if key not in _NOT_IN_STRICT_MODE}
    if "anyOf" in kept:
        kept["anyOf"] = [_strict(kind) for kind in kept["anyOf"]]
    if "items" in kept:
        kept["items"] = _strict(kept["items"])
    if "properties" in kept:
        required = set(schema.get("required", ()))
        properties = {name: _strict(part) for name, part in kept["properties"].items()}
        kept["properties"] = {
            name: part if name in required else _nullable(part) for name, part in properties.items()
        }
        kept["required"] = list(properties)
    return kept


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    description = schema.pop("description", "")
    return {"anyOf": [schema, {"type": "null"}], "description": description}


def _chat_calls(message: ChatCompletionMessage, others: Container[str]) -> Iterator[_Call]:
    for call in message.tool_calls or ():
        if call.type == "function" and call.function.name not in others:
            yield _Call(call.id, call.function.name, call.function.arguments)


def _chat_answers(answered: list[tuple[_Call, ToolReply]]) -> list[ChatCompletionMessageParam]:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "tool", "tool_call_id": call.call_id, "content": reply.text}
        for call, reply in answered
    ]
    for call, reply in answered:
        if reply.picture is not None:
            caption = f"The picture that {call.name} ({call.call_id}) returned:"
            messages.append(
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": caption},
                        {"type": "image_url", "image_url": {"url": reply.picture.data_uri}},
                    ],
                }
            )
    return messages


def _response_calls(response: Response, others: Container[str]) -> Iterator[_Call]:
    for item in response.output:
        if item.type == "function_call" and item.name not in others:
            yield _Call(item.call_id, item.name, item.arguments)


def _output_item(call: _Call, reply: ToolReply) -> ResponseInputItemParam:
    if reply.picture is None:
        return {"type": "function_call_output", "call_id": call.call_id, "output": reply.text}
    return {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": [
            {"type": "input_text", "text": reply.text},
            {"type": "input_image", "image_url": reply.picture.data_uri, "detail": "auto"},
        ],
    }
