"""Every adapter survives what an LLM may send: a schema-valid result, or an error with a hint."""

import asyncio
import base64
import json
import struct
import zlib
from copy import deepcopy

import anyio.from_thread
import jsonschema
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcp import Client
from sam4mllm_integrations import anthropic_tools, openai_functions
from sam4mllm_integrations._shared import run_tool
from sam4mllm_integrations.langchain_tools import Sam4MLLMToolkit
from sam4mllm_integrations.llama_index_tools import tools as llama_tools
from sam4mllm_integrations.mcp_server import ToolServer
from sam4mllm_integrations.openai_agents_tools import tools as agents_tools
from sam4mllm_integrations.pydantic_ai_tools import tools as pydantic_tools
from sam4mllm_integrations.smolagents_tools import ToolCallError
from sam4mllm_integrations.smolagents_tools import tools as smol_tools

from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace
from sam4mllm_tool.types import RgbImage

SCHEMAS = {
    spec.name: jsonschema.Draft202012Validator(spec.result.model_json_schema(mode="serialization"))
    for spec in BUILTIN_TOOLS
}
FIELDS = sorted({field for spec in BUILTIN_TOOLS for field in spec.arguments.model_fields})


def png_that_claims(width: int, height: int) -> str:
    """A few bytes that say they are a picture of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"\x89PNG\r\n\x1a\n" + chunk
    return "data:image/png;base64," + base64.b64encode(data).decode()


texts = st.one_of(
    st.sampled_from(
        [
            "img_1", "img_999", "obj_1", "obj_2", "obj_-1", "img_", "obj_1e9", "the red block",
            "all blocks", "", " ", "\0", "/dev/zero", "/etc/passwd", "../../etc/passwd",
            "file:///etc/passwd", "http://169.254.169.254/latest", "ftp://x/y", "~root/x",
            "data:image/png;base64,AAAA", "data:,", png_that_claims(60_000, 60_000),
            "a" * 5_000, "‮\ud7ff🐕", "1+", "0+", "pqpp", "adaptive", "foreground",
            "union", "subtract", "png", "overlay", "OUT", "BLOCKS",
        ]
    ),
    st.text(max_size=20),
)  # fmt: skip
numbers = st.one_of(
    st.sampled_from([0, 1, -1, 10**400, -(2**63), 0.5, 1e308, float("nan"), float("inf"), True]),
    st.floats(-50, 250),
    st.integers(-10, 300),
)
points = st.fixed_dictionaries(
    {"x": numbers, "y": numbers}, optional={"label": st.sampled_from(["foreground", "background"])}
)
values = st.recursive(
    st.none() | texts | numbers | points,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
# Half of the documents are of the kind their tool asks for, so that calls get past the first check.
inside = st.fixed_dictionaries({"x": st.integers(0, 199), "y": st.integers(0, 119)})
PLAUSIBLE = {
    "image": st.sampled_from(["BLOCKS", "img_1"]),
    "expression": st.sampled_from(["the red block", "all blocks", "nothing"]),
    "object_id": st.sampled_from(["obj_1", "obj_2", "obj_3"]),
    "object_ids": st.lists(
        st.sampled_from(["obj_1", "obj_2", "obj_3", "obj_4"]), min_size=2, max_size=3
    ),
    "count": st.sampled_from(["1", "1+", "0+"]),
    "alternates": st.integers(0, 3),
    "phrase": st.sampled_from(["block", "the red block", "nothing"]),
    "limit": st.integers(1, 5),
    "strategy": st.sampled_from(["pqpp", "adaptive", "box_only", "propose"]),
    "box": st.sampled_from([[10, 10, 90, 100], [0, 0, 200, 120], [-5, -5, 5, 5], [9, 9, 9, 9]]),
    "combine": st.sampled_from(["union", "intersect", "subtract"]),
    "folder": st.sampled_from(["OUT", "/", "/proc"]),
    "formats": st.lists(st.sampled_from(["png", "coco_rle", "coco_polygons", "overlay"])),
    "crop": st.booleans(),
    "max_side": st.integers(64, 300),
    "p_yes_above": st.floats(0, 1),
    "p_no_above": st.floats(0, 1),
}
POINTS = {
    "segment_object": st.integers(1, 20),
    "is_point_inside_object": st.lists(inside, min_size=1, max_size=4),
    "segment_with_prompts": st.lists(
        st.builds(lambda point: {**point, "label": "foreground"}, inside), max_size=3
    ),
}


def plausible(tool: str, field: str) -> st.SearchStrategy:
    """A value of the kind that the tool asks for, though not always a fitting one."""
    return POINTS[tool] if field == "points" else PLAUSIBLE[field]


@st.composite
def calls(draw) -> tuple[str, dict]:
    """A tool and a document for it, more or less fitting."""
    spec = draw(st.sampled_from(BUILTIN_TOOLS))
    fields = spec.arguments.model_fields
    tame = draw(st.booleans())
    arguments = {}
    for field, info in fields.items():
        if draw(st.integers(0, 2)) == 0 or (tame and info.is_required()):
            kind = plausible(spec.name, field)
            arguments[field] = draw(kind if tame else values | kind)
    if not tame or draw(st.integers(0, 3)) == 0:
        spoilt = draw(st.sampled_from([*fields, *FIELDS]) | st.text(max_size=6))
        arguments[spoilt] = draw(values)
    return spec.name, arguments


@pytest.fixture(scope="module")
def place(tmp_path_factory, blocks):
    folder = tmp_path_factory.mktemp("hostile")
    blocks.pil.save(folder / "blocks.png")
    return folder


def toolbox_at(place, model) -> Toolbox:
    """With a picture, three masks and an empty one."""
    policy = ImagePolicy(allowed_dirs=(place,))
    toolbox = Toolbox(model, Workspace(policy, max_bytes=32 * 1024**2))
    for expression in ("all blocks", "the red block"):
        arguments = {"image": str(place / "blocks.png"), "expression": expression}
        toolbox.call("segment_object", arguments)
    nothing = {"object_ids": ["obj_1", "obj_2"], "combine": "intersect"}
    toolbox.call("compare_objects", nothing)
    return toolbox


def placed(value, place):
    """The document with its places filled in."""
    if isinstance(value, dict):
        return {key: placed(part, place) for key, part in value.items()}
    if isinstance(value, list):
        return [placed(part, place) for part in value]
    names = {"BLOCKS": str(place / "blocks.png"), "OUT": str(place / "out")}
    return names.get(value, value) if isinstance(value, str) else value


# -- one function an adapter: (name, arguments) → the structured result, or the error told -------


def plain(toolbox):
    def call(name, arguments):
        reply = run_tool(toolbox, name, arguments)
        return reply.text if reply.output is None else reply.output.result.model_dump(mode="json")

    return call


def openai_chat(toolbox):
    from openai.types.chat import ChatCompletionMessage

    def call(name, arguments):
        function = {"name": name, "arguments": json.dumps(arguments)}
        message = ChatCompletionMessage.model_validate(
            {"role": "assistant",
             "tool_calls": [{"id": "c", "type": "function", "function": function}]}
        )  # fmt: skip
        told, *_ = openai_functions.answer_chat(toolbox, message)
        return told["content"]

    return call


def anthropic_messages(toolbox):
    from anthropic.types import Message

    def call(name, arguments):
        message = Message.model_validate(
            {
                "id": "m", "type": "message", "role": "assistant", "model": "m",
                "content": [{"type": "tool_use", "id": "c", "name": name, "input": arguments}],
                "stop_reason": "tool_use", "usage": {"input_tokens": 1, "output_tokens": 1},
            }
        )  # fmt: skip
        (block,) = anthropic_tools.answer(toolbox, message)[0]["content"]
        text = block["content"][0]["text"]
        assert text.startswith("Error: ") == block["is_error"]
        return text

    return call


def smolagents(toolbox):
    by_name = {tool.name: tool for tool in smol_tools(toolbox)}

    def call(name, arguments):
        try:
            said = by_name[name](**arguments)
        except ToolCallError as error:
            return str(error)
        return said if isinstance(said, str) else "a picture"

    return call


def llama_index(toolbox):
    by_name = {tool.metadata.name: tool for tool in llama_tools(toolbox)}

    def call(name, arguments):
        output = by_name[name].call(**arguments)
        assert output.content.startswith("Error: ") == output.is_error
        return (
            output.content if output.is_error else output.raw_output.result.model_dump(mode="json")
        )

    return call


def langchain(toolbox):
    by_name = {tool.name: tool for tool in Sam4MLLMToolkit(toolbox=toolbox).get_tools()}

    def call(name, arguments):
        message = by_name[name].invoke(
            {"type": "tool_call", "id": "c", "name": name, "args": arguments}
        )
        if message.status == "error":
            return f"Error: {message.content}"
        return {k: v for k, v in message.artifact.items() if k != "masks"}

    return call


def openai_agents(toolbox):
    by_name = {tool.name: tool for tool in agents_tools(toolbox)}

    def call(name, arguments):
        said = asyncio.run(by_name[name].on_invoke_tool(None, json.dumps(arguments)))
        return said if isinstance(said, str) else said[0].text

    return call


def pydantic_ai(toolbox):
    from pydantic_ai.exceptions import ToolFailed

    by_name = {tool.name: tool for tool in pydantic_tools(toolbox)}

    def call(name, arguments):
        try:
            returned = asyncio.run(by_name[name].function(**arguments))
        except ToolFailed as error:
            return str(error)
        return returned.metadata.result.model_dump(mode="json")

    return call


ADAPTERS = [plain, openai_chat, anthropic_messages, smolagents, llama_index, langchain,
            openai_agents, pydantic_ai]  # fmt: skip


def check(name: str, said) -> None:
    """A result that fits its schema, a text, or an error with a hint and without a traceback."""
    if isinstance(said, dict):
        SCHEMAS[name].validate(json.loads(json.dumps(said, allow_nan=False)))
    elif said.startswith("Error: "):
        assert "Hint: " in said, said
        assert "Traceback" not in said
        assert len(said) < 3_000
    else:
        assert said


@pytest.fixture(scope="module")
def documents(place) -> list[tuple[str, dict]]:
    """400 calls, drawn once: inventing them takes longer than answering them."""
    drawn = []

    @given(calls())
    @settings(
        max_examples=400, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def draw(document):
        drawn.append(document)

    draw()
    return [(name, placed(arguments, place)) for name, arguments in drawn]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_hostile_documents(adapter, model, place, documents):
    call = adapter(toolbox_at(place, model))
    counts = {"result": 0, "error": 0}
    for name, arguments in deepcopy(documents):
        said = call(name, arguments)
        check(name, said)
        wrong = isinstance(said, str) and said.startswith("Error: ")
        counts["error" if wrong else "result"] += 1
    # Both ways are taken often; else the documents would be too wild, or too tame.
    assert min(counts.values()) > 40, counts


def test_hostile_documents_over_mcp(model, place, documents):
    tools = ToolServer(lambda: model, [place])
    client = Client(tools.server, mode="legacy")
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(client),
    ):
        for name, document in documents:
            arguments = json.loads(json.dumps(document), parse_constant=str)
            result = portal.call(client.call_tool, name, arguments)
            text = result.content[0].text
            check(name, text if result.is_error else result.structured_content)
        assert len(portal.call(client.list_tools).tools) == len(BUILTIN_TOOLS)


@given(st.text(max_size=40) | st.recursive(values, st.lists, max_leaves=3).map(json.dumps))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_argument_texts_that_are_not_even_documents(model, text):
    reply = run_tool(Toolbox(model), "segment_object", text)
    assert reply.is_error
    check("segment_object", reply.text)


def test_names_and_deep_nesting(model):
    toolbox = Toolbox(model)
    for name in ("", "segment", "__class__", "a" * 10_000):
        check("segment_object", run_tool(toolbox, name, {}).text)
    check("segment_object", run_tool(toolbox, "segment_object", "[" * 100_000).text)
    check("view_objects", run_tool(toolbox, "view_objects", {"image": {"a": [{}] * 10_000}}).text)


def test_memory_stays_bounded_over_2000_calls_on_200_images(model, blocks):
    toolbox = Toolbox(model, Workspace(max_bytes=4 * 1024**2))
    pictures = []
    for number in range(200):
        picture = blocks.pil.copy()
        picture.putpixel((0, 0), (number, 0, 0))
        pictures.append(RgbImage.from_pil(picture).pil)
    process = psutil.Process()
    arguments = {"expression": "the red block", "count": "1", "strategy": "box_only"}
    for number in range(2_000):
        image = toolbox.workspace.open_image(pictures[number % 200]).image_id
        toolbox.call("segment_object", {"image": image, **arguments})
        if number == 400:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 32 * 1024**2
    kept = toolbox.workspace.objects()
    assert 0 < len(kept) < 100
