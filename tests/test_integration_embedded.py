"""Each framework's own loop on the embedded models: the mask is the one the pipeline draws."""

import re

import pytest
from mcp import Client
from sam4mllm_integrations import anthropic_tools, openai_functions
from sam4mllm_integrations.langgraph_workflow import QuestionSettings, question_graph
from sam4mllm_integrations.mcp_server import ToolServer
from scripted_llm import Call, ScriptedLlm
from test_integration_agents import llama_llm, openai_agent, pydantic_agent, smol_model

from sam4mllm_tool import embedded
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import TargetCount

PICTURE = embedded.DEMO / "demo.png"


@pytest.fixture
def toolbox(embedded_model) -> Toolbox:
    return Toolbox(embedded_model)


@pytest.fixture
def area(embedded_model, demo_image) -> int:
    image, expression = demo_image
    return embedded_model.segment(image, expression, count=TargetCount.ONE).objects[0].mask.area


@pytest.fixture
def arguments(demo_image) -> dict:
    return {"image": str(PICTURE), "expression": demo_image[1], "count": "1"}


def pixels(seen: str) -> str:
    return re.search(r"mask (\d+) px", seen)[1]


@pytest.fixture
def steps(arguments):
    """Segment, look, say how many pixels."""
    told = []

    def look(seen):
        told.append(pixels(seen))
        return [Call("view_objects", {"object_ids": ["obj_1"], "crop": True})]

    return [lambda seen: [Call("segment_object", arguments)], look, lambda seen: told[0]]


async def test_mcp(embedded_model, arguments, area):
    tools = ToolServer(lambda: embedded_model, [embedded.DEMO])
    async with Client(tools.server) as client:
        result = await client.call_tool("segment_object", arguments)
        assert result.structured_content["objects"][0]["area"] == area
        view = await client.call_tool("view_objects", {"object_ids": ["obj_1"]})
        assert view.content[1].type == "image"


def test_openai(toolbox, steps, area):
    from openai import OpenAI

    messages = [{"role": "user", "content": "How big is it?"}]
    with ScriptedLlm(steps) as llm:
        client = OpenAI(base_url=f"{llm.url}/v1", api_key="none")
        for _ in steps:
            tools = openai_functions.chat_tools(toolbox)
            reply = client.chat.completions.create(model="m", messages=messages, tools=tools)
            messages += [
                reply.choices[0].message,
                *openai_functions.answer_chat(toolbox, reply.choices[0].message),
            ]
    assert messages[-1].content == str(area)


def test_anthropic(toolbox, steps, area):
    from anthropic import Anthropic

    messages = [{"role": "user", "content": "How big is it?"}]
    with ScriptedLlm(steps) as llm:
        client = Anthropic(base_url=llm.url, api_key="none")
        for _ in steps:
            message = client.messages.create(
                model="m", max_tokens=9, messages=messages, tools=anthropic_tools.tools(toolbox)
            )
            messages.append({"role": "assistant", "content": message.content})
            messages += anthropic_tools.answer(toolbox, message)
    assert message.content[0].text == str(area)


def test_smolagents(toolbox, steps, area):
    from sam4mllm_integrations.smolagents_tools import after_step, tools
    from smolagents import LogLevel, ToolCallingAgent

    *calls, answer = steps
    final = [*calls, lambda seen: [Call("final_answer", {"answer": answer(seen)})]]
    with ScriptedLlm(final) as llm:
        agent = ToolCallingAgent(
            tools(toolbox), smol_model(llm), step_callbacks=[after_step],
            verbosity_level=LogLevel.OFF,
        )  # fmt: skip
        assert agent.run("How big is it?") == str(area)


async def test_llama_index(toolbox, steps, area):
    from llama_index.core.agent.workflow import FunctionAgent
    from sam4mllm_integrations.llama_index_tools import tools

    llm, _ = llama_llm(steps)
    answer = await FunctionAgent(tools=tools(toolbox), llm=llm).run("How big is it?")
    assert str(answer) == str(area)


async def test_openai_agents(toolbox, steps, area):
    from agents import Runner

    with ScriptedLlm(steps) as llm:
        result = await Runner.run(openai_agent(toolbox, llm, "responses"), "How big is it?")
    assert result.final_output == str(area)


async def test_pydantic_ai(toolbox, steps, area):
    with ScriptedLlm(steps) as llm:
        result = await pydantic_agent(toolbox, llm, "chat").run("How big is it?")
    assert result.output == str(area)


def test_langgraph(toolbox):
    settings = QuestionSettings(count=TargetCount.ONE, keep_best_above=0.0)
    state = question_graph(toolbox, settings=settings).invoke(
        {"question": "what wakes you up in the morning?", "image": str(PICTURE)}
    )
    assert state["status"] == "found"
    assert all(toolbox.workspace.object(o).mask is not None for o in state["object_ids"])
