"""Who thinks in the question workflow: a chat model, or the local MLLM itself.

A thinker names what to look for, and judges what was found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel, Field, ValidationError

from sam4mllm_integrations._shared import Picture
from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.pipeline.faults import checked_replies, typed_faults
from sam4mllm_tool.protocols import Turn
from sam4mllm_tool.tools.toolbox import Toolbox

MAX_CANDIDATES = 5
_MAX_WORDS = 8

Schema = TypeVar("Schema", bound=BaseModel)


class Candidates(BaseModel):
    """What to look for in the picture."""

    expressions: list[str] = Field(
        min_length=1,
        max_length=MAX_CANDIDATES,
        description="Short noun phrases for things that may answer the question, most likely "
        "first, such as 'the scissors'.",
    )


class Judgement(BaseModel):
    """Whether the marked objects answer the question."""

    action: Literal["accept", "retry", "not_found"] = Field(
        description="'accept' the objects in keep, 'retry' to look for something else, or "
        "'not_found' if nothing in the picture answers the question."
    )
    keep: list[int] = Field(
        default=[], description="With 'accept': numbers of the marked objects; empty means all."
    )
    expression: str | None = Field(
        default=None, description="With 'retry': another expression to look for, if you have one."
    )
    reason: str = Field(default="", description="One sentence.")


@dataclass(frozen=True)
class Thought:
    """A thinker's answer, and what it cost.

    Attributes:
        confidence: of a judgement, 0…1: how sure it is that the best object is right.
    """

    candidates: tuple[str, ...] = ()
    judgement: Judgement = field(default_factory=lambda: Judgement(action="retry"))
    confidence: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Found:
    """What was found, as a judge sees it: numbers in the picture → object_id."""

    expression: str
    shown: dict[int, str]
    text: str
    picture: Picture


class Thinker(Protocol):
    """Understands a question about a picture, and judges what was found."""

    def understand(self, question: str, image_id: str, picture: Picture) -> Thought:
        """Expressions to look for, most likely first."""

    def judge(self, question: str, image_id: str, found: Found) -> Thought:
        """Accept, retry, or not found."""


# -- a chat model --------------------------------------------------------------------------------

_UNDERSTAND = (
    "A segmentation tool will look for objects in a picture. Name what it should look for to "
    "answer the user's question."
)
_JUDGE = (
    "A segmentation tool has marked objects with numbers. Judge whether they answer the user's "
    "question."
)


@dataclass(frozen=True)
class ChatThinker:
    """Any LangChain chat model that calls tools; with ``vision`` it is shown the pictures."""

    model: BaseChatModel
    vision: bool = True

    def understand(self, question: str, image_id: str, picture: Picture) -> Thought:
        """Expressions to look for.

        Raises:
            DialogueError: no readable answer in two tries.
        """
        content = self._content(f"Question: {question}", picture)
        named, tokens = self._ask(Candidates, _UNDERSTAND, content)
        return Thought(candidates=tuple(named.expressions), tokens=tokens)

    def judge(self, question: str, image_id: str, found: Found) -> Thought:
        """Accept, retry, or not found.

        Raises:
            DialogueError: no readable answer in two tries.
        """
        marked = ", ".join(str(number) for number in found.shown)
        text = f"Question: {question}\nLooked for: {found.expression}\nMarked: {marked}"
        content = self._content(f"{text}\n{found.text}", found.picture)
        judgement, tokens = self._ask(Judgement, _JUDGE, content)
        confidence = 1.0 if judgement.action == "accept" else 0.0
        return Thought(judgement=judgement, confidence=confidence, tokens=tokens)

    def _content(self, text: str, picture: Picture) -> list[str | dict[str, Any]]:
        parts: list[str | dict[str, Any]] = [{"type": "text", "text": text}]
        if self.vision:
            image = {"base64": picture.base64, "mime_type": picture.mime_type}
            parts.append({"type": "image", **image})
        return parts

    def _ask(
        self, schema: type[Schema], task: str, content: list[str | dict[str, Any]]
    ) -> tuple[Schema, int]:
        """The arguments of the one tool the model is given, and the tokens spent."""
        caller = self.model.bind_tools([schema], tool_choice="any")
        messages: list[BaseMessage] = [SystemMessage(task), HumanMessage(content)]
        tokens, answer = 0, ""
        for _ in range(2):
            reply = caller.invoke(messages)
            tokens += _tokens(reply)
            answer = str(reply.content)
            calls = reply.tool_calls if isinstance(reply, AIMessage) else []
            complaint = f"Answer by calling {schema.__name__}."
            try:
                if calls:
                    return schema.model_validate(calls[0]["args"]), tokens
            except ValidationError as error:
                complaint = f"These arguments do not fit: {error}"
            messages.append(reply)
            answers = [ToolMessage(complaint, tool_call_id=c["id"], status="error") for c in calls]
            messages += answers or [HumanMessage(complaint)]
        raise DialogueError(
            f"the chat model did not call {schema.__name__} in a readable way",
            raw_reply=answer,
            hint="Use a chat model that can call tools.",
        )


def _tokens(reply: Any) -> int:
    usage = getattr(reply, "usage_metadata", None)
    return int(usage["total_tokens"]) if usage else 0


# -- the local MLLM ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalThinker:
    """The MLLM behind the tools, without any other model.

    It is asked in words what could answer the question, unless it was taught a small vocabulary
    only; each object's box is verified for what was looked for. The question itself is
    always a candidate: an MLLM that was taught such questions finds the object by it directly.

    Attributes:
        accept_above: probability, as verified, from which an object is accepted.
    """

    toolbox: Toolbox
    accept_above: float = 0.5

    def understand(self, question: str, image_id: str, picture: Picture) -> Thought:
        """The question itself, and what the MLLM says if it reads like names of things."""
        model = self.toolbox.model
        if model.mllm.notes.vocabulary is not None:
            return Thought(candidates=(question,))
        image = self.toolbox.workspace.image(image_id).image
        asked = (
            f"{question}\nName the objects in the picture that answer this, "
            "each as a short noun phrase on a line of its own."
        )
        with typed_faults(model.mllm.name):
            reply = model.mllm.generate(image, (Turn("user", asked),), max_new_tokens=48)
            checked_replies([reply])
        named = _phrases(reply.text)
        candidates = list(dict.fromkeys((question, *named)))[:MAX_CANDIDATES]
        return Thought(candidates=tuple(candidates), tokens=reply.tokens)

    def judge(self, question: str, image_id: str, found: Found) -> Thought:
        """Verify of each object's box that it shows the expression."""
        model, workspace = self.toolbox.model, self.toolbox.workspace
        image = workspace.image(image_id).image
        boxes = {number: workspace.object(o).box for number, o in found.shown.items()}
        answers = model.verify(image, found.expression, list(boxes.values()))
        shares = {
            number: answer.p_yes / max(answer.p_yes + answer.p_no, 1e-9)
            for number, answer in zip(boxes, answers, strict=True)
        }
        keep = [number for number, share in shares.items() if share >= self.accept_above]
        listed = ", ".join(f"{number}: {share:.2f}" for number, share in shares.items())
        judgement = Judgement(
            action="accept" if keep else "retry", keep=keep, reason=f"verified: {listed}"
        )
        confidence = max(shares.values(), default=0.0)
        return Thought(judgement=judgement, confidence=confidence, tokens=len(boxes))


def _phrases(reply: str) -> list[str]:
    """Lines and list items that read like names of things."""
    parts = [
        re.sub(r"^[\s\d.)*-]+", "", part).strip(" .\"'") for part in re.split(r"[\n,;]", reply)
    ]
    return [part for part in parts if _reads_like_a_name(part.split())]


def _reads_like_a_name(words: list[str]) -> bool:
    return 0 < len(words) <= _MAX_WORDS and all(word.isalpha() for word in words)


__all__ = ["Candidates", "ChatThinker", "Found", "Judgement", "LocalThinker", "Thinker", "Thought"]
