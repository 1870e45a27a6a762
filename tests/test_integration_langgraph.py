"""The question workflow: with the local MLLM alone, and with a chat model that calls tools."""

import json
from dataclasses import dataclass, field

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command
from sam4mllm_integrations.langgraph_workflow import QuestionSettings, question_graph

from sam4mllm_tool.errors import CheckpointError, DialogueError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.protocols import Reply
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace

THREAD = {"configurable": {"thread_id": "1"}}


@dataclass
class TalkingMllm(TruthfulMllm):
    """Names things when asked in words; may answer with a wrong box first."""

    named: str = ""
    wrong_first: bool = False

    def generate(self, image, dialogue, **options):
        if "Name the objects" in dialogue[-1].text:
            return Reply(self.named, -1.0, tokens=7)
        return super().generate(image, dialogue, **options)

    def alternates(self, image, dialogue, **options):
        replies = super().alternates(image, dialogue, **options)
        return replies[::-1] if self.wrong_first else replies


class ChatScript(GenericFakeChatModel):
    """A chat model that calls the tools it is bound to, as scripted."""

    bound: list
    heard: list

    def bind_tools(self, tools, **options):
        self.bound.append((tools, options))
        return self

    def _generate(self, messages, *args, **options):
        self.heard.append(messages)
        return super()._generate(messages, *args, **options)


def says(name, **arguments):
    usage = {"input_tokens": 90, "output_tokens": 10, "total_tokens": 100}
    calls = [{"name": name, "args": arguments, "id": "c"}]
    return AIMessage("", tool_calls=calls, usage_metadata=usage)


def chat(*messages) -> ChatScript:
    return ChatScript(messages=iter(messages), bound=[], heard=[])


def toolbox_of(truth, output_dirs=(), **options) -> Toolbox:
    model = Sam4MLLM(TalkingMllm(truth, **options), ColourSegmenter())
    return Toolbox(model, Workspace(ImagePolicy(output_dirs=output_dirs)))


def ask(graph, path, question="the red block", config=None, **more):
    return graph.invoke({"question": question, "image": str(path), **more}, config)


def areas(toolbox, state) -> list[int]:
    return [toolbox.workspace.object(o).mask.area for o in state["object_ids"]]


# -- without a chat model ------------------------------------------------------------------------


def test_the_local_mllm_answers_alone(truth, blocks_file):
    toolbox = toolbox_of(truth)
    state = ask(question_graph(toolbox), blocks_file)
    assert (state["status"], state["confident"], state["attempts"]) == ("found", True, 1)
    assert areas(toolbox, state) == [3600]
    named = [step.partition(":")[0] for step in state["steps"]]
    assert named == ["understand", "locate", "probe", "segment", "judge", "conclude"]
    assert state["tool_calls"] == 5
    assert "obj_1: 9 inside" in state["steps"][2]


def test_it_looks_for_what_the_mllm_names(truth, blocks_file):
    named = "1. the blue block\n- [12,13], (4)\n2. a very very very very very long thing to name"
    toolbox = toolbox_of(truth, named=named)
    state = ask(question_graph(toolbox), blocks_file, "What is as blue as the sky?")
    assert areas(toolbox, state) == [2400]
    assert state["steps"][0].endswith("look for What is as blue as the sky?; the blue block")
    assert state["attempts"] == 2
    assert state["tokens"] == 7 + 1


def test_a_wrong_box_is_judged_and_another_one_tried(truth, blocks_file):
    toolbox = toolbox_of(truth, wrong_first=True)
    state = ask(question_graph(toolbox, settings=QuestionSettings(alternates=2)), blocks_file)
    assert state["confident"]
    assert state["attempts"] > 1
    assert state["attempt"]["box"] is not None
    assert areas(toolbox, state) == [3600]


def test_the_best_is_kept_when_nothing_is_accepted(truth, blocks_file):
    # Without alternates the wrong box is all there is, and the MLLM doubts it.
    toolbox = toolbox_of(truth, wrong_first=True, certainty=0.7)
    settings = QuestionSettings(max_attempts=1, keep_best_above=0.2)
    state = ask(question_graph(toolbox, settings=settings), blocks_file)
    assert (state["status"], state["confident"]) == ("found", False)
    strict = QuestionSettings(max_attempts=1, keep_best_above=0.4)
    state = ask(question_graph(toolbox, settings=strict), blocks_file)
    assert (state["status"], state["object_ids"]) == ("not_found", [])


def test_retries_are_bounded(truth, blocks_file):
    named = "\n".join(f"thing {letter}" for letter in "abcdefgh")
    toolbox = toolbox_of(truth, named=named)
    settings = QuestionSettings(max_attempts=3)
    state = ask(question_graph(toolbox, settings=settings), blocks_file, "a horse")
    assert (state["status"], state["attempts"]) == ("not_found", 3)
    assert state["object_ids"] == []


def test_several_objects(truth, blocks_file):
    toolbox = toolbox_of(truth)
    state = ask(question_graph(toolbox), blocks_file, "all blocks")
    assert sorted(areas(toolbox, state)) == [2400, 3600]


# -- with a chat model ---------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [True, False])
def test_a_chat_model_understands_and_judges(truth, blocks_file, vision):
    toolbox = toolbox_of(truth)
    model = chat(
        says("Candidates", expressions=["the green block", "all blocks"]),
        says("Judgement", action="retry", expression="the blue block", reason="Too many."),
        says("Judgement", action="accept", keep=[3, 99]),
    )
    graph = question_graph(toolbox, model, vision=vision)
    state = ask(graph, blocks_file, "What is as blue as the sky?")
    assert (state["status"], state["confident"], state["attempts"]) == ("found", True, 3)
    assert areas(toolbox, state) == [2400]
    assert state["tokens"] == 300
    assert [tools[0].__name__ for tools, _ in model.bound] == [
        "Candidates", "Judgement", "Judgement",
    ]  # fmt: skip
    shown = [part for part in model.heard[-1][-1].content if part["type"] == "image"]
    assert bool(shown) == vision
    assert "Marked: 3" in model.heard[-1][-1].content[0]["text"]


def test_a_chat_model_may_say_that_nothing_is_there(truth, blocks_file):
    model = chat(
        says("Candidates", expressions=["the red block"]),
        says("Judgement", action="not_found", reason="It is only paint."),
    )
    state = ask(question_graph(toolbox_of(truth), model), blocks_file, "Which one can I eat?")
    assert (state["status"], state["confident"], state["object_ids"]) == ("not_found", True, [])


def test_a_chat_model_is_told_its_mistake_once(truth, blocks_file):
    model = chat(
        says("Candidates", expressions=[]),
        says("Candidates", expressions=["the red block"]),
        AIMessage("Looks right to me."),
        says("Judgement", action="accept"),
    )
    assert ask(question_graph(toolbox_of(truth), model), blocks_file)["confident"]
    complaint = model.heard[1][-1]
    assert isinstance(complaint, ToolMessage)
    assert "do not fit" in complaint.content
    silent = chat(AIMessage("I see."), AIMessage("I do."))
    with pytest.raises(DialogueError, match="did not call Candidates"):
        ask(question_graph(toolbox_of(truth), silent), blocks_file)


# -- state, streaming, people --------------------------------------------------------------------


def test_the_state_of_a_long_run_is_small_and_plain(truth, blocks_file, tmp_path):
    toolbox = toolbox_of(truth)
    expressions = ["the red block", "all blocks", "the blue block", "nothing", "the red block"]
    judgements = [says("Judgement", action="retry", reason="No. " * 400) for _ in range(4)]
    model = chat(says("Candidates", expressions=expressions), *judgements)
    settings = QuestionSettings(max_attempts=10)
    with SqliteSaver.from_conn_string(str(tmp_path / "runs.sqlite")) as saver:
        graph = question_graph(toolbox, model, settings=settings, checkpointer=saver)
        with pytest.raises(RuntimeError):  # the script ends in the middle of the run
            ask(graph, blocks_file, config=THREAD)
        states = [state.values for state in graph.get_state_history(THREAD)]
        assert len(states) > 12
        assert all(json.loads(json.dumps(values)) == values for values in states)
        assert max(len(json.dumps(values)) for values in states) < 50_000
        # Another process with the same workspace goes on where this one stopped.
        more = chat(says("Judgement", action="accept"))
        again = question_graph(toolbox, more, settings=settings, checkpointer=saver)
        final = again.invoke(None, THREAD)
        assert (final["status"], final["confident"]) == ("found", True)


def test_steps_and_stages_are_streamed(truth, blocks_file):
    graph = question_graph(toolbox_of(truth))
    start = {"question": "the red block", "image": str(blocks_file)}
    events = list(graph.stream(start, stream_mode=["updates", "custom"]))
    nodes = [next(iter(event)) for kind, event in events if kind == "updates"]
    assert nodes == ["understand", "locate", "probe", "segment", "judge", "conclude"]
    stages = [event for kind, event in events if kind == "custom"]
    assert stages[0] == {"tool": "locate_object", "stage": "locate"}
    assert {"tool": "segment_with_prompts", "stage": "mask"} in stages


async def test_the_graph_runs_asynchronously(truth, blocks_file):
    start = {"question": "the red block", "image": str(blocks_file)}
    state = await question_graph(toolbox_of(truth)).ainvoke(start)
    assert state["status"] == "found"


@pytest.mark.parametrize("answer", [True, False, "elsewhere"])
def test_a_human_is_asked_before_anything_is_saved(truth, blocks_file, tmp_path, answer):
    toolbox = toolbox_of(truth, output_dirs=(tmp_path,))
    graph = question_graph(toolbox, checkpointer=InMemorySaver())
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    state = ask(graph, blocks_file, config=THREAD, save_to=str(out))
    (asked,) = state["__interrupt__"]
    assert asked.value == {
        "question": "the red block", "object_ids": ["obj_1"], "save_to": str(out),
    }  # fmt: skip
    assert not out.exists()
    resume = str(elsewhere) if answer == "elsewhere" else answer
    state = graph.invoke(Command(resume=resume), THREAD)
    assert out.exists() == (answer is True)
    assert elsewhere.exists() == (answer == "elsewhere")
    assert bool(state["files"]) == bool(answer)


def test_nothing_found_is_nothing_to_save(truth, blocks_file, tmp_path):
    graph = question_graph(toolbox_of(truth), checkpointer=InMemorySaver())
    state = ask(graph, blocks_file, "a horse", THREAD, save_to=str(tmp_path / "out"))
    assert "__interrupt__" not in state
    assert state["status"] == "not_found"


def test_a_failing_system_stops_the_run(blocks_file):
    def load():
        raise CheckpointError("weights are missing", hint="Install them.")

    with pytest.raises(CheckpointError):
        ask(question_graph(Toolbox(load)), blocks_file)


@dataclass
class Muttering(TalkingMllm):
    """Says nothing readable the first time it is asked for a box."""

    replies: list[str] = field(default_factory=lambda: ["mm-hm"])

    def alternates(self, image, dialogue, **options):
        if self.replies:
            return [Reply(self.replies.pop())]
        return super().alternates(image, dialogue, **options)


def test_a_reply_that_cannot_be_read_costs_one_attempt(truth, blocks_file):
    mllm = Muttering(truth, named="the red block")
    toolbox = Toolbox(Sam4MLLM(mllm, ColourSegmenter()))
    state = ask(question_graph(toolbox), blocks_file, "What is red?")
    assert (state["status"], state["attempts"]) == ("found", 2)
    assert "no box" in state["steps"][1]


def test_the_evaluation_compares_both_ways(truth, blocks):
    from benchmarks.question_workflow import report, run
    from sam4mllm_tool.evaluation.cases import Case

    cases = [
        Case(name, "blocks", name, lambda: blocks, lambda t=masks: t, (), kind="function")
        for name, masks in truth.items()
    ]
    model = Sam4MLLM(TalkingMllm(truth), ColourSegmenter())
    rows = report(run(model, cases))
    for row in rows.values():
        assert row["questions"] == 3
        assert row["gIoU"][0] == row["cIoU"][0] == 1.0
    assert rows["one-shot"]["tool_calls"] == rows["one-shot, propose"]["tool_calls"] == 1
    assert rows["workflow"]["tool_calls"] == (5 + 5 + 7) / 3
    # A round of boxes is 4 tokens, nine points an object are 9; the workflow also asks for other
    # boxes, names what to look for, and has each object verified.
    assert rows["one-shot"]["tokens"] == (13 + 13 + 22) / 3
    assert rows["workflow"]["tokens"] > rows["one-shot"]["tokens"]
