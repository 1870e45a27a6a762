"""OpenAI function calling, with a local server in the LLM's place.

Leave out ``base_url`` and ``api_key`` to talk to the real one.
"""

from __future__ import annotations

import re
from typing import Any

from openai import OpenAI
from sam4mllm_integrations.openai_functions import answer_chat, chat_tools
from scripted_llm import Call, ScriptedLlm

from sam4mllm_tool import Sam4MLLM, Toolbox, embedded

PICTURE = str(embedded.DEMO / "demo.png")


def handle(seen: str) -> str:
    """The object_id in a tool's result."""
    found = re.search(r"obj_\d+", seen)
    assert found is not None
    return found[0]


def nothing_else(name: str, **arguments: Any) -> Call:
    """A call in strict mode: what is not needed is null."""
    return Call(name, {"strategy": None, "points": None, "p_yes_above": None, "p_no_above": None}
                | arguments)  # fmt: skip


SCRIPT = [
    lambda seen: [
        nothing_else("segment_object", image=PICTURE, expression="the tree", count="1")
    ],
    lambda seen: [
        Call("view_objects", {"object_ids": [handle(seen)], "image": None, "crop": True,
                              "max_side": None})
    ],
    lambda seen: "Here is the tree.",
]  # fmt: skip


def main() -> None:
    """The loop every function-calling program has."""
    toolbox = Toolbox(Sam4MLLM.from_pretrained)
    messages: list[Any] = [{"role": "user", "content": f"Show me the tree in {PICTURE}."}]
    with ScriptedLlm(SCRIPT) as llm:
        client = OpenAI(base_url=f"{llm.url}/v1", api_key="none")
        while True:
            reply = client.chat.completions.create(
                model="any", messages=messages, tools=chat_tools(toolbox)
            )
            message = reply.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                break
            messages += answer_chat(toolbox, message)

    for entry in messages:
        entry = entry if isinstance(entry, dict) else entry.model_dump()
        print(f"{entry['role']:>9}: {str(entry['content'] or entry.get('tool_calls'))[:200]}")
    assert messages[-1].content == "Here is the tree."
    results = [m["content"] for m in messages if isinstance(m, dict) and m["role"] == "tool"]
    assert len(results) == 2
    assert not any(text.startswith("Error") for text in results)
    picture = messages[-2]["content"][1]["image_url"]["url"]
    assert picture.startswith("data:image/")


if __name__ == "__main__":
    main()
