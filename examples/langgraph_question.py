"""A question instead of a name: the LangGraph workflow, with a human asked before it saves.

No other model is needed: the MLLM behind the tools also understands and judges. Pass
``question_graph`` any LangChain chat model that calls tools to let that one think.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from sam4mllm_integrations.langgraph_workflow import QuestionSettings, question_graph

from sam4mllm_tool import ImagePolicy, Sam4MLLM, TargetCount, Toolbox, Workspace, embedded

QUESTION = "what wakes you up in the morning?"


def main() -> None:
    """Ask, watch the steps, agree to save."""
    # The picture is known to answer the question, so the MLLM has to point at something.
    settings = QuestionSettings(count=TargetCount.ONE, keep_best_above=0.0)
    thread = {"configurable": {"thread_id": "example"}}

    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(ImagePolicy(output_dirs=(Path(folder),)))
        graph = question_graph(
            Toolbox(Sam4MLLM.from_pretrained, workspace),
            settings=settings,
            checkpointer=InMemorySaver(),
        )
        start = {
            "question": QUESTION,
            "image": str(embedded.DEMO / "demo.png"),
            "save_to": str(Path(folder) / "masks"),
        }
        for update in graph.stream(start, thread, stream_mode="updates"):
            for node, change in update.items():
                if node == "__interrupt__":
                    print("may I save", change[0].value["object_ids"], "?")
                else:
                    print(*change["steps"], sep="\n")
        assert not (Path(folder) / "masks").exists()

        state = graph.invoke(Command(resume=True), thread)
        assert state["status"] == "found"
        assert state["attempts"] <= settings.max_attempts
        assert all(Path(file).exists() for file in state["files"])
        print("saved", [Path(file).name for file in state["files"]])


if __name__ == "__main__":
    main()
