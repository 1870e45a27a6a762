"""A LangChain agent that finds, checks and saves an object.

The chat model here is scripted, so that the example runs without a key: put your own in its place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from sam4mllm_integrations.langchain_tools import Sam4MLLMToolkit

from sam4mllm_tool import embedded

PICTURE = str(embedded.DEMO / "demo.png")


class ScriptedChat(GenericFakeChatModel):
    """Stands in for a chat model that calls tools."""

    def bind_tools(self, tools: Sequence[Any], **_: Any) -> ScriptedChat:
        """A real model would receive the tool definitions here."""
        return self


def call(name: str, **arguments: Any) -> AIMessage:
    """What a chat model says when it wants a tool."""
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": name}])


def main() -> None:
    """Run the agent and look at what it got."""
    with tempfile.TemporaryDirectory() as folder:
        chat = ScriptedChat(
            messages=iter(
                [
                    call("segment_object", image=PICTURE, expression="the tree", count="1"),
                    call("is_point_inside_object", object_id="obj_1"),
                    call("save_objects", object_ids=["obj_1"], folder=folder),
                    AIMessage("The tree's mask is saved."),
                ]
            )
        )
        toolkit = Sam4MLLMToolkit.from_pretrained(allow_dirs=[embedded.DEMO], output_dirs=[folder])
        agent = create_agent(chat, toolkit.get_tools())
        state = agent.invoke({"messages": [("user", "Save a mask of the tree.")]})

        for message in state["messages"]:
            print(f"{message.type:>6}: {message.text[:300]}")
        answers = [m for m in state["messages"] if isinstance(m, ToolMessage)]
        assert [m.status for m in answers] == ["success"] * 3
        assert answers[0].artifact["status"] == "found"
        assert "counts" in answers[0].artifact["masks"]["obj_1"]  # the mask, as COCO RLE …
        assert all("counts" not in str(m.content) for m in answers)  # … which no prompt ever saw
        assert len(list(Path(folder).glob("*.png"))) == 2  # mask and overlay


if __name__ == "__main__":
    main()
