"""The LangChain toolkit: LangChain's own test suites, and an agent that goes step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage, messages_to_dict
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from sam4mllm_integrations.langchain_tools import Sam4MLLMTool, Sam4MLLMToolkit

from sam4mllm_tool import embedded
from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm
from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace

DEMO = str(embedded.DEMO / "demo.png")
BOX = [10, 10, 100, 100]
EXAMPLES: dict[str, dict[str, Any]] = {
    "segment_object": {"image": DEMO, "expression": "the tree", "count": "1"},
    "locate_object": {"image": DEMO, "expression": "the tree", "count": "1"},
    "propose_objects": {"image": DEMO, "phrase": "the tree"},
    "is_point_inside_object": {"object_id": "obj_1", "points": [{"x": 40, "y": 40}]},
    "segment_with_prompts": {"image": DEMO, "box": BOX},
    "compare_objects": {"object_ids": ["obj_1", "obj_2"]},
    "view_objects": {"image": DEMO, "max_side": 128},
    "save_objects": {"object_ids": ["obj_1"], "folder": "FOLDER", "formats": ["png"]},
}


def _toolbox(model: Any, folder: Any) -> Toolbox:
    """A toolbox that already holds two objects with masks, and may write to the folder."""
    toolbox = Toolbox(model, Workspace(ImagePolicy(output_dirs=(Path(folder),))))
    for side in (100, 150):
        toolbox.call("segment_with_prompts", {"image": DEMO, "box": [10, 10, side, side]})
    return toolbox


def _suites(name: str) -> tuple[type, type]:
    """LangChain's unit and integration suites for one tool."""

    class Common:
        @pytest.fixture(autouse=True)
        def _with_model(self, embedded_model: Any, tmp_path: Any) -> None:
            self.model, self.folder = embedded_model, str(tmp_path)

        @property
        def tool_constructor(self) -> Any:
            toolbox = _toolbox(self.model, self.folder)
            return Sam4MLLMTool.from_spec(toolbox, toolbox.spec(name))

        @property
        def tool_invoke_params_example(self) -> dict[str, Any]:
            example = dict(EXAMPLES[name])
            if "folder" in example:
                example["folder"] = self.folder
            return example

    unit = type(f"TestUnit_{name}", (Common, ToolsUnitTests), {})
    integration = type(f"TestIntegration_{name}", (Common, ToolsIntegrationTests), {})
    return unit, integration


for _spec in BUILTIN_TOOLS:
    for _suite in _suites(_spec.name):
        globals()[_suite.__name__] = _suite


class ScriptedChat(GenericFakeChatModel):
    """A chat model that makes the stated tool calls one after another."""

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self


def _calls(*steps: tuple[str, dict[str, Any]]) -> ScriptedChat:
    messages = [
        AIMessage("", tool_calls=[{"name": name, "args": args, "id": f"call_{n}"}])
        for n, (name, args) in enumerate(steps)
    ]
    return ScriptedChat(messages=iter([*messages, AIMessage("Done.")]))


async def test_an_agent_goes_step_by_step_and_its_history_stays_small(embedded_model, tmp_path):
    chat = _calls(
        ("locate_object", {"image": DEMO, "expression": "the tree", "count": "1"}),
        ("is_point_inside_object", {"object_id": "obj_1"}),
        ("segment_with_prompts", {"object_id": "obj_1"}),
        ("segment_object", {"image": "img_1", "expression": "the alarm clock", "count": "1"}),
        ("compare_objects", {"object_ids": ["obj_1", "obj_2"]}),
        ("save_objects", {"object_ids": ["obj_1", "obj_2"], "folder": str(tmp_path)}),
    )
    workspace = Workspace(ImagePolicy(output_dirs=(tmp_path,)))
    toolkit = Sam4MLLMToolkit(toolbox=Toolbox(embedded_model, workspace))
    agent = create_agent(chat, toolkit.get_tools())
    state = await agent.ainvoke({"messages": [("user", "Is the tree bigger than the clock?")]})
    told = [m for m in state["messages"] if isinstance(m, ToolMessage)]
    assert [m.status for m in told] == ["success"] * 6
    assert state["messages"][-1].content == "Done."
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert all("counts" not in m.content for m in told)
    assert told[2].artifact["masks"]["obj_1"]["size"] == [320, 320]
    assert len(json.dumps(messages_to_dict(state["messages"]))) < 20_000


def test_errors_an_agent_can_mend_reach_it_with_the_hint(model, blocks_file):
    agent = create_agent(
        _calls(
            ("segment_object", {"image": "/nowhere.png", "expression": "x"}),
            ("segment_object", {"image": str(blocks_file)}),
            ("segment_object", {"image": str(blocks_file), "expression": "the red block"}),
        ),
        Sam4MLLMToolkit(toolbox=Toolbox(model)).get_tools(),
    )
    state = agent.invoke({"messages": [("user", "go")]})
    told = [m for m in state["messages"] if isinstance(m, ToolMessage)]
    assert [m.status for m in told] == ["error", "error", "success"]
    assert "Hint:" in told[0].content
    assert "expression: Field required" in told[1].content


def test_dialogue_errors_reach_the_agent_and_backend_errors_the_caller(blocks_file):
    from sam4mllm_tool.pipeline.model import Sam4MLLM

    call = {
        "name": "locate_object",
        "args": {"image": str(blocks_file), "expression": "x"},
        "id": "1",
        "type": "tool_call",
    }
    mumbling = Toolbox(Sam4MLLM(ScriptedMllm(["mumble"]), ColourSegmenter()))
    message = Sam4MLLMToolkit(toolbox=mumbling).get_tools()[1].invoke(call)
    assert message.status == "error"
    assert "no box" in message.content

    def broken() -> Sam4MLLM:
        raise CheckpointError("gone")

    with pytest.raises(CheckpointError):
        Sam4MLLMToolkit(toolbox=Toolbox(broken)).get_tools()[1].invoke(call)


def test_a_view_is_a_picture_block(model, blocks_file):
    tool = next(
        t for t in Sam4MLLMToolkit(toolbox=Toolbox(model)).get_tools() if t.name == "view_objects"
    )
    call = {
        "name": tool.name,
        "args": {"image": str(blocks_file), "max_side": 64},
        "id": "1",
        "type": "tool_call",
    }
    text, picture = tool.invoke(call).content_blocks
    assert text["type"] == "text"
    assert picture["type"] == "image"
    assert picture["mime_type"] == "image/png"


def test_a_toolkit_by_name_keeps_to_its_folders(tmp_path, blocks_file):
    toolkit = Sam4MLLMToolkit.from_pretrained(allow_dirs=[tmp_path / "elsewhere"])
    tool = toolkit.get_tools()[0]
    call = {"image": str(blocks_file), "expression": "x"}
    assert "does not allow" in tool.invoke(call)
