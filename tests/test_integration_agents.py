"""smolagents, LlamaIndex, OpenAI Agents, Pydantic AI: the tools in the framework's own loop.

Where the framework has an OpenAI client it talks to a local server that plays the LLM.
"""

import io
import re
from collections.abc import Iterator

import pytest
from PIL import Image
from scripted_llm import Call, ScriptedLlm

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS
from sam4mllm_tool.tools.toolbox import Toolbox

NAMES = [spec.name for spec in BUILTIN_TOOLS]


@pytest.fixture
def toolbox(model) -> Toolbox:
    return Toolbox(model)


@pytest.fixture
def broken() -> Toolbox:
    def load():
        raise CheckpointError("weights are missing", hint="Install them.")

    return Toolbox(load)


def handle(seen: str) -> str:
    return re.findall(r"obj_\d+", seen)[-1]


def script(path):
    """Segment, look, make a mistake, mend it, answer."""
    return [
        lambda seen: [Call("segment_object", {"image": str(path), "expression": "the red block"})],
        lambda seen: [Call("view_objects", {"object_ids": [handle(seen)]})],
        lambda seen: [Call("segment_with_prompts", {"object_id": "obj_77"})],
        lambda seen: [
            Call(
                "segment_with_prompts",
                {
                    "object_id": handle(seen.partition("Known objects:")[2]),
                    "points": [{"x": 25.0, "y": 35.0, "label": "foreground"}],
                },
            )
        ],
        lambda seen: f"{handle(seen)} has {re.search(r'mask ([0-9]+) px', seen)[1]} pixels",
    ]


ANSWER = "obj_2 has 3600 pixels"


def failing(path):
    return [lambda seen: [Call("locate_object", {"image": str(path), "expression": "x"})]] * 3


@pytest.fixture
def llm(blocks_file) -> Iterator[ScriptedLlm]:
    with ScriptedLlm(script(blocks_file)) as server:
        yield server


@pytest.fixture
def bad_luck(blocks_file) -> Iterator[ScriptedLlm]:
    with ScriptedLlm(failing(blocks_file)) as server:
        yield server


# -- smolagents ----------------------------------------------------------------------------------


def smol_model(llm):
    from smolagents import OpenAIModel

    return OpenAIModel("m", api_base=f"{llm.url}/v1", api_key="none")


def with_final_answer(steps):
    *calls, answer = steps
    return [*calls, lambda seen: [Call("final_answer", {"answer": answer(seen)})]]


def test_smolagents_tool_calling_agent(toolbox, blocks_file, blocks):
    from sam4mllm_integrations.smolagents_tools import after_step, tools
    from smolagents import LogLevel, ToolCallingAgent

    with ScriptedLlm(with_final_answer(script(blocks_file))) as llm:
        agent = ToolCallingAgent(
            tools(toolbox),
            smol_model(llm),
            step_callbacks=[after_step],
            verbosity_level=LogLevel.OFF,
        )
        assert agent.run("How big is the red block?") == ANSWER
    assert set(NAMES) < set(agent.tools)
    offered = {tool["function"]["name"]: tool["function"] for tool in llm.requests[0]["tools"]}
    assert offered["segment_object"]["parameters"]["required"] == ["image", "expression"]
    steps = agent.memory.steps[1:]
    assert [step.error is not None for step in steps] == [False, False, True, False, False]
    assert "no object 'obj_77'" in steps[2].error.message
    assert "Hint: " in steps[2].error.message
    (shown,) = steps[1].observations_images
    assert shown.size == blocks.size
    # The picture really goes out to the model.
    sent = [block for m in llm.requests[2]["messages"] for block in m["content"] or ()]
    assert any("image_url" in block for block in sent if isinstance(block, dict))


def test_smolagents_code_agent_with_an_image_in_its_state(toolbox, blocks):
    from sam4mllm_integrations.smolagents_tools import tools
    from smolagents import ChatMessage, CodeAgent, LogLevel, MessageRole, Model

    class Coder(Model):
        def generate(self, messages, **options):
            code = 'text = segment_object(photo, "the blue block")\nfinal_answer(text)'
            return ChatMessage(MessageRole.ASSISTANT, f"<code>\n{code}\n</code>")

    agent = CodeAgent(tools(toolbox), Coder(), verbosity_level=LogLevel.OFF)
    answer = agent.run("Mask the blue block", additional_args={"photo": blocks.pil})
    assert "mask 2400 px" in answer


def test_smolagents_image_type(toolbox, blocks):
    from sam4mllm_integrations.smolagents_tools import tools
    from smolagents.agent_types import AgentImage

    view = next(tool for tool in tools(toolbox) if tool.name == "view_objects")
    seen = view(image=AgentImage(blocks.pil), sanitize_inputs_outputs=True)
    assert isinstance(seen, AgentImage)
    assert seen.to_raw().size == blocks.size
    assert toolbox.workspace.open_image(blocks.pil).image_id == "img_1"


def test_smolagents_stops_when_the_system_failed(broken, bad_luck):
    from sam4mllm_integrations.smolagents_tools import after_step, tools
    from smolagents import LogLevel, ToolCallingAgent

    agent = ToolCallingAgent(
        tools(broken), smol_model(bad_luck), step_callbacks=[after_step],
        verbosity_level=LogLevel.OFF,
    )  # fmt: skip
    with pytest.raises(CheckpointError):
        agent.run("?")
    assert len(bad_luck.requests) == 1


# -- LlamaIndex ----------------------------------------------------------------------------------


def llama_llm(steps):
    """A function-calling LLM of LlamaIndex's own that follows a script."""
    from llama_index.core.base.llms.types import ToolCallBlock
    from llama_index.core.llms import ChatMessage
    from llama_index.core.llms.mock import MockFunctionCallingLLM

    heard = []

    def reply(messages, **options):
        heard.append(list(messages))
        said = steps[len(heard) - 1](messages[-1].content or "")
        if isinstance(said, str):
            return ChatMessage(role="assistant", content=said)
        blocks = [
            ToolCallBlock(tool_call_id=str(n), tool_name=c.name, tool_kwargs=c.arguments)
            for n, c in enumerate(said)
        ]
        return ChatMessage(role="assistant", blocks=blocks)

    return MockFunctionCallingLLM(response_generator=reply, is_chat_model=True), heard


async def test_llama_index_function_agent(toolbox, blocks_file, blocks):
    from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
    from sam4mllm_integrations.llama_index_tools import stop_on_backend_error, tools

    llm, heard = llama_llm(script(blocks_file))
    handler = FunctionAgent(tools=tools(toolbox), llm=llm).run("How big is the red block?")
    outputs = []
    async for event in handler.stream_events():
        stop_on_backend_error(event)
        if isinstance(event, ToolCallResult):
            outputs.append(event.tool_output)
    assert str(await handler) == ANSWER
    assert [output.is_error for output in outputs] == [False, False, True, False]
    assert "Hint: " in outputs[2].content
    assert outputs[0].raw_output.masks["obj_1"].area == 3600
    (picture,) = [b for b in heard[2][-1].blocks if b.block_type == "image"]
    assert Image.open(picture.resolve_image()).size == blocks.size


def test_llama_index_tools_by_hand(toolbox, blocks_file):
    from llama_index.core.tools.calling import call_tool
    from sam4mllm_integrations.llama_index_tools import tools

    by_name = {tool.metadata.name: tool for tool in tools(toolbox)}
    assert list(by_name) == NAMES
    for tool, spec in zip(by_name.values(), BUILTIN_TOOLS, strict=True):
        told = tool.metadata.to_openai_tool()["function"]["parameters"]
        assert set(told["properties"]) == set(spec.arguments.model_fields)
    arguments = {"image": str(blocks_file), "expression": "the red block"}
    assert "mask 3600 px" in call_tool(by_name["segment_object"], arguments).content


async def test_llama_index_can_stop_when_the_system_failed(broken, blocks_file):
    from llama_index.core.agent.workflow import FunctionAgent
    from sam4mllm_integrations.llama_index_tools import stop_on_backend_error, tools

    llm, _ = llama_llm([*failing(blocks_file), lambda seen: "?"])
    handler = FunctionAgent(tools=tools(broken), llm=llm).run("?")
    with pytest.raises(CheckpointError):
        async for event in handler.stream_events():
            stop_on_backend_error(event)
    await handler.cancel_run()


# -- OpenAI Agents -------------------------------------------------------------------------------


def openai_agent(toolbox, llm, form):
    import agents
    from openai import AsyncOpenAI
    from sam4mllm_integrations.openai_agents_tools import tools

    agents.set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{llm.url}/v1", api_key="none")
    kind = {
        "chat": agents.OpenAIChatCompletionsModel,
        "responses": agents.OpenAIResponsesModel,
    }[form]
    return agents.Agent(name="finder", tools=tools(toolbox), model=kind("m", client))


@pytest.mark.parametrize("form", ["chat", "responses"])
async def test_openai_agents(toolbox, llm, form):
    from agents import Runner

    result = await Runner.run(openai_agent(toolbox, llm, form), "How big is the red block?")
    assert result.final_output == ANSWER
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert "Error: there is no object 'obj_77'" in outputs[2]
    if form == "responses":
        output = llm.requests[2]["input"][-1]["output"]
        assert [block["type"] for block in output] == ["input_text", "input_image"]
        assert output[1]["image_url"].startswith("data:image/png;base64,")
    strict = llm.requests[0]["tools"][0]
    assert strict.get("function", strict)["strict"] is True


async def test_openai_agents_stop_when_the_system_failed(broken, bad_luck):
    from agents import Runner
    from agents.exceptions import UserError

    with pytest.raises((CheckpointError, UserError)) as caught:
        await Runner.run(openai_agent(broken, bad_luck, "responses"), "?")
    assert "weights are missing" in str(caught.value)
    assert len(bad_luck.requests) == 1


# -- Pydantic AI ---------------------------------------------------------------------------------


def pydantic_agent(toolbox, llm, form):
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from sam4mllm_integrations.pydantic_ai_tools import tools

    kind = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[form]
    provider = OpenAIProvider(base_url=f"{llm.url}/v1", api_key="none")
    return Agent(kind("m", provider=provider), tools=tools(toolbox))


@pytest.mark.parametrize("form", ["chat", "responses"])
async def test_pydantic_ai(toolbox, llm, blocks, form):
    from pydantic_ai.messages import ToolReturnPart

    result = await pydantic_agent(toolbox, llm, form).run("How big is the red block?")
    assert result.output == ANSWER
    returns = [
        part
        for message in result.all_messages()
        for part in message.parts
        if isinstance(part, ToolReturnPart)
    ]
    assert [part.outcome for part in returns] == ["success", "success", "failed", "success"]
    assert "Hint: " in str(returns[2].content)
    assert returns[0].metadata.masks["obj_1"].area == 3600
    assert "'counts'" not in str(llm.requests)
    picture = returns[1].content[1]
    assert Image.open(io.BytesIO(picture.data)).size == blocks.size
    assert "data:image/png;base64," in str(llm.requests[2])


async def test_pydantic_ai_stops_when_the_system_failed(broken, bad_luck):
    with pytest.raises(CheckpointError):
        await pydantic_agent(broken, bad_luck, "chat").run("?")
    assert len(bad_luck.requests) == 1
