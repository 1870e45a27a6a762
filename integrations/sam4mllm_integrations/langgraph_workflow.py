"""LangGraph: a workflow for questions whose answer is a mask ("what would you cut paper with?").

    understand → locate → probe points → segment → look and judge → accept
                   ↑___________ retry ___________________|          (→ ask a human → save)

With ``QuestionSettings(candidates=8)`` every candidate is proposed and drawn at once instead::

    understand → propose → look and judge → accept

    graph = question_graph(toolbox, chat_model)
    graph.invoke({"question": "What would you cut paper with?", "image": "desk.jpg"})

The state holds handles and short text only, so that any checkpointer can keep it. Stages of the
tool calls are streamed as custom events (``stream_mode="custom"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add
from typing import Annotated, Any, Literal, TypedDict

from sam4mllm_integrations._shared import Picture, bounded_picture
from sam4mllm_tool.concurrency import CallContext, call_context
from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.pipeline.candidates import noun_phrase
from sam4mllm_tool.tools.builtin.is_point_inside_object import PointsResult
from sam4mllm_tool.tools.builtin.locate_object import LocateResult
from sam4mllm_tool.tools.builtin.propose_objects import ProposeResult
from sam4mllm_tool.tools.builtin.save_objects import SaveResult
from sam4mllm_tool.tools.builtin.view_objects import ViewResult
from sam4mllm_tool.tools.registry import ToolOutput
from sam4mllm_tool.tools.schemas import ObjectsResult, ToolResult
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import TargetCount

try:
    from langchain_core.language_models import BaseChatModel
    from langgraph.config import get_stream_writer
    from langgraph.graph import END, START, StateGraph
    from langgraph.graph.state import CompiledStateGraph
    from langgraph.types import Checkpointer, interrupt
except ImportError as error:
    raise ImportError('the workflow needs: pip install "sam4mllm-tool[langgraph]"') from error

from sam4mllm_integrations.question_thinkers import ChatThinker, Found, LocalThinker, Thinker

JUDGE_PICTURE_CHARACTERS = 400_000
_STEP_LENGTH = 300


class Attempt(TypedDict):
    """What is tried: an expression, and a box for it if the first box was judged wrong."""

    expression: str
    box: list[float] | None


class Best(TypedDict):
    """The best objects so far, kept in case nothing is accepted."""

    object_ids: list[str]
    expression: str
    confidence: float


class QuestionInput(TypedDict, total=False):
    """What a run starts from; ``save_to`` is a folder to save to, after a human agreed."""

    question: str
    image: str
    save_to: str | None


class QuestionState(QuestionInput, total=False):
    """State of a run; handles and short text only.

    Attributes:
        status: ``"found"`` or ``"not_found"`` once the run is over.
        confident: whether the judge accepted ``object_ids``; else they are the best there was.
        steps: what was done, one line per step.
    """

    image_id: str
    queue: list[Attempt]
    attempt: Attempt
    attempts: int
    object_ids: list[str]
    action: Literal["accept", "retry", "not_found"]
    best: Best
    status: Literal["found", "not_found"]
    confident: bool
    files: list[str]
    steps: Annotated[list[str], add]
    tool_calls: Annotated[int, add]
    tokens: Annotated[int, add]


@dataclass(frozen=True)
class QuestionSettings:
    """Bounds of a run.

    Attributes:
        max_attempts: how many expressions and boxes are tried.
        alternates: other boxes to try for an expression whose box was judged wrong.
        max_objects: objects of one attempt that are looked at.
        count: how many objects an expression may mean.
        candidates: with more than 0, so many candidates of ``propose_objects`` are looked at,
            instead of locating the expression. A judge that sees is shown all of them,
            any other those that the MLLM takes to be meant.
        keep_best_above: confidence from which the best objects are the answer though none were
            accepted; above 1 = never.
    """

    max_attempts: int = 4
    alternates: int = 1
    max_objects: int = 6
    count: TargetCount = TargetCount.ZERO_OR_MORE
    candidates: int = 0
    keep_best_above: float = 0.25


def question_graph(
    toolbox: Toolbox,
    chat_model: BaseChatModel | None = None,
    *,
    vision: bool = True,
    thinker: Thinker | None = None,
    settings: QuestionSettings | None = None,
    checkpointer: Checkpointer = None,
) -> CompiledStateGraph[QuestionState, None, QuestionInput, QuestionState]:
    """The workflow over these tools.

    Args:
        toolbox: the tools.
        chat_model: understands and judges; the MLLM behind the tools if left out.
        vision: whether the chat model can see pictures.
        thinker: your own, instead of both.
        settings: bounds of a run.
        checkpointer: needed to save, as a human is asked before.
    """
    mind = thinker or (ChatThinker(chat_model, vision) if chat_model else LocalThinker(toolbox))
    flow = _Flow(toolbox, mind, settings or QuestionSettings())
    graph = StateGraph(QuestionState, input_schema=QuestionInput, output_schema=QuestionState)
    for node in (
        flow.understand, flow.locate, flow.probe, flow.segment, flow.judge, flow.conclude, flow.save
    ):  # fmt: skip
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "understand")
    graph.add_conditional_edges("understand", flow.go_on, ["locate", "conclude"])
    graph.add_conditional_edges(
        "locate", flow.after_locate, ["probe", "judge", "locate", "conclude"]
    )
    graph.add_edge("probe", "segment")
    graph.add_edge("segment", "judge")
    graph.add_conditional_edges("judge", flow.after_judge, ["locate", "conclude"])
    graph.add_conditional_edges("conclude", flow.after_conclude, ["save", END])
    graph.add_edge("save", END)
    return graph.compile(checkpointer=checkpointer, name="question")


@dataclass(frozen=True)
class _Flow:
    """The nodes (state → update) and the choices between them."""

    toolbox: Toolbox
    thinker: Thinker
    settings: QuestionSettings

    # -- nodes -----------------------------------------------------------------------------------

    def understand(self, state: QuestionState) -> QuestionState:
        """Name what to look for."""
        view = self._call("view_objects", image=state["image"])
        assert isinstance(view.result, ViewResult)
        image_id = view.result.image_id
        thought = self.thinker.understand(state["question"], image_id, _picture(view))
        queue = [Attempt(expression=text, box=None) for text in thought.candidates]
        return {
            "image_id": image_id,
            "queue": queue,
            "attempts": 0,
            "object_ids": [],
            "best": Best(object_ids=[], expression="", confidence=-1.0),
            "files": [],
            "steps": [_step("understand", "look for " + "; ".join(thought.candidates))],
            "tool_calls": 1,
            "tokens": thought.tokens,
        }

    def locate(self, state: QuestionState) -> QuestionState:
        """Try the next expression; or the next box, which is drawn at once."""
        attempt, *queue = state["queue"]
        update: QuestionState = {
            "attempt": attempt,
            "attempts": state["attempts"] + 1,
            "object_ids": [],
            "tool_calls": 1,
        }
        try:
            output = self._try(state["image_id"], attempt)
        except DialogueError as error:
            return {**update, "queue": queue, "steps": [_step("locate", str(error))]}
        if isinstance(output.result, LocateResult):
            boxes = [Attempt(expression=attempt["expression"], box=a.box)
                     for a in output.result.alternates]  # fmt: skip
            queue = boxes + queue
        found = self._found(output.result)
        return {
            **update,
            "queue": queue,
            "object_ids": found[: self.settings.max_objects],
            "steps": [_step("locate", output.text)],
        }

    def _try(self, image_id: str, attempt: Attempt) -> ToolOutput:
        if attempt["box"] is not None:
            return self._call("segment_with_prompts", image=image_id, box=attempt["box"])
        expression = attempt["expression"]
        if self.settings.candidates:
            text_prompted = self.toolbox.model.proposer is not None
            return self._call(
                "propose_objects",
                image=image_id,
                phrase=noun_phrase(expression) if text_prompted else expression,
                expression=expression,
            )
        return self._call(
            "locate_object",
            image=image_id,
            expression=expression,
            count=self.settings.count.value,
            alternates=self.settings.alternates,
        )

    def _found(self, result: ToolResult) -> list[str]:
        """What is to be judged, the likeliest first."""
        if not isinstance(result, ProposeResult):
            assert isinstance(result, ObjectsResult)
            return [one.object_id for one in result.objects]
        judged = [one.object_id for one in result.candidates[: self.settings.candidates]]
        sees = getattr(self.thinker, "vision", False)
        return [object_id for object_id in judged if sees or object_id in result.meant]

    def probe(self, state: QuestionState) -> QuestionState:
        """Ask about points on each object; the answers guide the masks."""
        steps = []
        for object_id in state["object_ids"]:
            result = self._call("is_point_inside_object", object_id=object_id).result
            assert isinstance(result, PointsResult)
            answers = [point.answer for point in result.points]
            counts = ", ".join(f"{answers.count(a)} {a}" for a in dict.fromkeys(answers))
            steps.append(_step("probe", f"{object_id}: {counts}"))
        return {"steps": steps, "tool_calls": len(state["object_ids"])}

    def segment(self, state: QuestionState) -> QuestionState:
        """Draw the masks."""
        texts = [
            self._call("segment_with_prompts", object_id=object_id).text
            for object_id in state["object_ids"]
        ]
        return {"steps": [_step("segment", text) for text in texts], "tool_calls": len(texts)}

    def judge(self, state: QuestionState) -> QuestionState:
        """Look at the overlay: accept, retry, or not found."""
        view = self._call("view_objects", object_ids=state["object_ids"])
        assert isinstance(view.result, ViewResult)
        expression = state["attempt"]["expression"]
        found = Found(expression, view.result.shown, view.text, _picture(view))
        thought = self.thinker.judge(state["question"], state["image_id"], found)
        judged = thought.judgement
        kept = [found.shown[n] for n in judged.keep if n in found.shown]
        queue = state["queue"]
        if judged.action == "retry" and judged.expression:
            queue = [Attempt(expression=judged.expression, box=None), *queue]
        update: QuestionState = {
            "action": judged.action,
            "queue": queue,
            "object_ids": kept or list(found.shown.values()),
            "steps": [_step("judge", f"{judged.action}. {judged.reason}")],
            "tool_calls": 1,
            "tokens": thought.tokens,
        }
        if thought.confidence > state["best"]["confidence"]:
            update["best"] = Best(
                object_ids=update["object_ids"],
                expression=expression,
                confidence=thought.confidence,
            )
        return update

    def conclude(self, state: QuestionState) -> QuestionState:
        """The accepted objects, the best ones if they are good enough, or none."""
        accepted = state.get("action") == "accept"
        best = state["best"]
        chosen = state["object_ids"] if accepted else best["object_ids"]
        enough = accepted or (
            state.get("action") != "not_found"
            and best["confidence"] >= self.settings.keep_best_above
        )
        if not chosen or not enough:
            outcome = f"nothing found in {state['attempts']} attempts"
            return {
                "status": "not_found",
                "confident": state.get("action") == "not_found",
                "object_ids": [],
                "steps": [_step("conclude", outcome)],
            }
        return {
            "status": "found",
            "confident": accepted,
            "object_ids": chosen,
            "steps": [_step("conclude", ", ".join(chosen))],
        }

    def save(self, state: QuestionState) -> QuestionState:
        """Save, after a human agreed: resume with true, false, or another folder's path."""
        answer = interrupt(
            {
                "question": state["question"],
                "object_ids": state["object_ids"],
                "save_to": state["save_to"],
            }
        )
        if not answer:
            return {"steps": [_step("save", "declined")]}
        folder = answer if isinstance(answer, str) else state["save_to"]
        result = self._call("save_objects", object_ids=state["object_ids"], folder=folder).result
        assert isinstance(result, SaveResult)
        return {"files": result.files, "steps": [_step("save", result.text)], "tool_calls": 1}

    # -- choices ---------------------------------------------------------------------------------

    def go_on(self, state: QuestionState) -> str:
        """Another attempt, if there is anything left to try."""
        left = state["queue"] and state["attempts"] < self.settings.max_attempts
        return "locate" if left else "conclude"

    def after_locate(self, state: QuestionState) -> str:
        """On to the points; what is drawn goes to the judge."""
        if not state["object_ids"]:
            return self.go_on(state)
        drawn = state["attempt"]["box"] is not None or self.settings.candidates
        return "judge" if drawn else "probe"

    def after_judge(self, state: QuestionState) -> str:
        """Done, or another attempt."""
        return self.go_on(state) if state["action"] == "retry" else "conclude"

    def after_conclude(self, state: QuestionState) -> str:
        """Save if that was asked for and there is something to save."""
        return "save" if state.get("save_to") and state["object_ids"] else END

    def _call(self, name: str, **arguments: Any) -> ToolOutput:
        writer = get_stream_writer()
        context = CallContext(on_stage=lambda stage: writer({"tool": name, "stage": stage}))
        with call_context(context):
            return self.toolbox.call(name, arguments)


def _picture(view: ToolOutput) -> Picture:
    assert view.picture is not None
    return bounded_picture(view.picture, JUDGE_PICTURE_CHARACTERS)


def _step(node: str, text: str) -> str:
    return f"{node}: {text}"[:_STEP_LENGTH]


__all__ = ["QuestionInput", "QuestionSettings", "QuestionState", "question_graph"]
