"""OpenAI and Anthropic: strict schemas, and whole conversations through the official clients."""

import base64
import copy
import io
import json
import re

import pytest
from anthropic import Anthropic, AsyncAnthropic, transform_schema
from anthropic.types import MessageParam, ToolParam
from openai import AsyncOpenAI, OpenAI
from openai.lib._pydantic import _ensure_strict_json_schema
from openai.lib._tools import PydanticFunctionTool
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.responses import FunctionToolParam, ResponseInputItemParam
from PIL import Image
from pydantic import TypeAdapter
from sam4mllm_integrations import anthropic_tools, openai_functions
from scripted_llm import Call, ScriptedLlm

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS
from sam4mllm_tool.tools.toolbox import Toolbox

BY_NAME = pytest.mark.parametrize("spec", BUILTIN_TOOLS, ids=lambda spec: spec.name)
# Keywords the two APIs refuse in strict mode.
OPENAI_REFUSES = {"default", "minLength", "maxLength", "$ref", "oneOf", "allOf", "not"}
ANTHROPIC_REFUSES = {"minimum", "maximum", "minLength", "maxLength", "maxItems", "default", "not"}


@pytest.fixture
def toolbox(model) -> Toolbox:
    return Toolbox(model)


def objects(schema):
    """Every object schema inside a schema."""
    if isinstance(schema, list):
        for part in schema:
            yield from objects(part)
    elif isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for part in schema.values():
            yield from objects(part)


def keywords(schema) -> set[str]:
    """Every keyword used in a schema (names of properties are not keywords)."""
    if isinstance(schema, list):
        return set().union(*map(keywords, schema))
    if not isinstance(schema, dict):
        return set()
    inner = [
        keywords(list(value.values()) if key == "properties" else value)
        for key, value in schema.items()
    ]
    return set(schema).union(*inner)


@BY_NAME
def test_openai_schemas_are_strict(spec):
    schema = openai_functions.strict_schema(spec.arguments)
    # The SDK's own transformation finds nothing left to do.
    assert _ensure_strict_json_schema(copy.deepcopy(schema), path=(), root=schema) == schema
    assert not keywords(schema) & OPENAI_REFUSES
    for part in objects(schema):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])


@BY_NAME
def test_anthropic_schemas_are_strict(spec):
    schema = anthropic_tools.strict_schema(spec.arguments)
    assert transform_schema(copy.deepcopy(schema)) == schema
    assert not keywords(schema) & ANTHROPIC_REFUSES
    assert all(part["additionalProperties"] is False for part in objects(schema))
    assert "anyOf" not in keywords(schema)
    told = {name for name, f in spec.arguments.model_fields.items() if f.is_required()}
    assert set(schema.get("required", ())) == told


def test_anthropic_limits_on_optional_fields_over_all_strict_tools():
    schemas = [anthropic_tools.strict_schema(spec.arguments) for spec in BUILTIN_TOOLS]
    parts = [part for schema in schemas for part in objects(schema)]
    optional = sum(len(part["properties"]) - len(part.get("required", ())) for part in parts)
    assert optional <= 24


def test_definitions_are_what_the_sdks_declare(toolbox):
    chat = openai_functions.chat_tools(toolbox)
    TypeAdapter(list[ChatCompletionToolParam]).validate_python(chat)
    TypeAdapter(list[FunctionToolParam]).validate_python(openai_functions.responses_tools(toolbox))
    TypeAdapter(list[ToolParam]).validate_python(anthropic_tools.tools(toolbox))
    assert all(tool["function"]["strict"] for tool in chat)
    assert not any(isinstance(tool["function"], PydanticFunctionTool) for tool in chat)
    texts = {tool["function"]["name"]: tool["function"]["description"] for tool in chat}
    assert max(map(len, texts.values())) <= 1024
    assert {name for name, text in texts.items() if "pixels of the upright image" in text} == {
        spec.name for spec in BUILTIN_TOOLS if spec.has_coordinates
    }


# -- conversations -------------------------------------------------------------------------------


def handle(seen: str) -> str:
    return re.search(r"obj_\d+", seen)[0]


def script(path):
    """Two masks at once, a look at the first, a mistake, its mending, an answer."""
    nothing = dict.fromkeys(("strategy", "points", "p_yes_above", "p_no_above", "count"))
    return [
        lambda seen: [
            Call("segment_object", {"image": str(path), "expression": e, **nothing})
            for e in ("the red block", "the blue block")
        ],
        lambda seen: [
            Call("view_objects", {"object_ids": [handle(seen)], "crop": None, "max_side": None})
        ],
        lambda seen: [Call("view_objects", {"object_ids": ["obj_77"]}), Call("weather", {})],
        lambda seen: [Call("compare_objects", {"object_ids": ["obj_1", "obj_2"]})],
        lambda seen: re.search(r"obj_1 is (\w+ \w+)", seen)[0],
    ]


def picture_of(uri: str) -> Image.Image:
    header, _, data = uri.partition(",")
    assert header == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def check_texts(texts: list[str]) -> None:
    """What the model was told, call by call."""
    red, blue, view, wrong, unknown, compared = texts
    assert "obj_1 'the red block'" in red
    assert "mask 3600 px" in red
    assert "obj_2 'the blue block'" in blue
    assert "Marked" in view
    assert wrong.startswith("Error: there is no object 'obj_77'")
    assert "Hint: " in wrong
    assert "no tool 'weather'" in unknown
    assert "obj_1 is right of" in compared
    assert all(len(text) < 2_000 for text in texts)


async def chat_turns(client, toolbox, question, *, twin: bool):
    """The loop a user writes; sync or async."""
    messages = [{"role": "user", "content": question}]
    options = {"model": "m", "messages": messages, "tools": openai_functions.chat_tools(toolbox)}
    while True:
        # parse() refuses tools that are not strict.
        reply = client.chat.completions.parse(**options)
        message = (await reply if twin else reply).choices[0].message
        if not message.tool_calls:
            return message.content, messages
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        if twin:
            messages += await openai_functions.aanswer_chat(toolbox, message)
        else:
            messages += openai_functions.answer_chat(toolbox, message)


@pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
async def test_chat_completions(toolbox, blocks_file, twin):
    with ScriptedLlm(script(blocks_file)) as llm:
        client = (AsyncOpenAI if twin else OpenAI)(base_url=f"{llm.url}/v1", api_key="none")
        answer, messages = await chat_turns(client, toolbox, "Which is left?", twin=twin)
    assert answer == "obj_1 is right of"
    for call in (c for m in messages for c in m.get("tool_calls", ())):
        call["function"].pop("parsed_arguments", None)
    TypeAdapter(list[ChatCompletionMessageParam]).validate_python(messages)
    check_texts([m["content"] for m in messages if m["role"] == "tool"])
    shown = [m["content"] for m in messages[1:] if m["role"] == "user"]
    (parts,) = shown
    assert picture_of(parts[1]["image_url"]["url"]).size == (200, 120)
    # Tool messages follow their call at once; the picture comes after them.
    roles = [m["role"] for m in messages[:7]]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "user"]


@pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
async def test_responses(toolbox, blocks_file, twin):
    items = [{"role": "user", "content": "Which is left?"}]
    with ScriptedLlm(script(blocks_file)) as llm:
        client = (AsyncOpenAI if twin else OpenAI)(base_url=f"{llm.url}/v1", api_key="none")
        for _ in range(5):
            definitions = openai_functions.responses_tools(toolbox)
            reply = client.responses.create(model="m", input=items, tools=definitions)
            response = await reply if twin else reply
            items += [item.model_dump(exclude_none=True) for item in response.output]
            if twin:
                items += await openai_functions.aanswer_responses(toolbox, response)
            else:
                items += openai_functions.answer_responses(toolbox, response)
    assert response.output_text == "obj_1 is right of"
    TypeAdapter(list[ResponseInputItemParam]).validate_python(items)
    outputs = [item["output"] for item in items if item.get("type") == "function_call_output"]
    check_texts([o if isinstance(o, str) else o[0]["text"] for o in outputs])
    assert picture_of(outputs[2][1]["image_url"]).size == (200, 120)


@pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
async def test_messages(toolbox, blocks_file, twin):
    messages = [{"role": "user", "content": "Which is left?"}]
    with ScriptedLlm(script(blocks_file)) as llm:
        client = (AsyncAnthropic if twin else Anthropic)(base_url=llm.url, api_key="none")
        for _ in range(5):
            definitions = anthropic_tools.tools(toolbox)
            reply = client.messages.create(
                model="m", messages=messages, tools=definitions, max_tokens=100
            )
            message = await reply if twin else reply
            messages.append(
                {"role": "assistant", "content": [b.model_dump() for b in message.content]}
            )
            if twin:
                messages += await anthropic_tools.aanswer(toolbox, message)
            else:
                messages += anthropic_tools.answer(toolbox, message)
    assert message.content[0].text == "obj_1 is right of"
    TypeAdapter(list[MessageParam]).validate_python(messages)
    results = [b for m in messages[1:] if m["role"] == "user" for b in m["content"]]
    check_texts([block["content"][0]["text"] for block in results])
    assert [block["is_error"] for block in results] == [False] * 3 + [True] * 2 + [False]
    source = results[2]["content"][1]["source"]
    assert picture_of(f"data:{source['media_type']};base64,{source['data']}").size == (200, 120)


@pytest.mark.parametrize("arguments", ["{", "[]", "null", "", '"x"', '{"image": 1}'])
def test_arguments_that_are_no_use_are_told_to_the_model(toolbox, arguments):
    raw = {"id": "c", "type": "function",
           "function": {"name": "segment_object", "arguments": arguments}}  # fmt: skip
    from openai.types.chat import ChatCompletionMessage

    message = ChatCompletionMessage.model_validate({"role": "assistant", "tool_calls": [raw]})
    (told,) = openai_functions.answer_chat(toolbox, message)
    assert told["content"].startswith("Error: ")
    assert "Hint: " in told["content"]


def test_other_tools_are_left_to_others_and_failures_of_the_system_are_raised(blocks_file):
    def load():
        raise CheckpointError("weights are missing", hint="Install them.")

    toolbox = Toolbox(load)
    steps = [
        lambda seen: [Call("weather", {})],
        lambda seen: [Call("locate_object", {"image": str(blocks_file), "expression": "x"})],
    ]
    with ScriptedLlm(steps) as llm:
        client = OpenAI(base_url=f"{llm.url}/v1", api_key="none")
        messages = [{"role": "user", "content": "?"}]
        first = client.chat.completions.create(model="m", messages=messages).choices[0].message
        assert openai_functions.answer_chat(toolbox, first, others={"weather"}) == []
        messages.append(json.loads(first.model_dump_json(exclude_none=True)))
        second = client.chat.completions.create(model="m", messages=messages).choices[0].message
        with pytest.raises(CheckpointError):
            openai_functions.answer_chat(toolbox, second)
