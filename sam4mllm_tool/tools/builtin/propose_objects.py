"""``propose_objects``: a phrase → every candidate with a mask, judged by an expression if given."""

from __future__ import annotations

from pydantic import Field

from sam4mllm_tool.pipeline.candidates import Candidate, accept, judge, propose
from sam4mllm_tool.tools.output import header, mask_of, object_line, rounded, summary
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import (
    Expression,
    ImageResult,
    ImageSource,
    ObjectSummary,
    ToolArguments,
)
from sam4mllm_tool.tools.workspace import ImageRecord, ObjectRecord
from sam4mllm_tool.types import TargetCount


class ProposeObjectsArguments(ToolArguments):
    """Arguments of ``propose_objects``."""

    image: ImageSource
    phrase: str = Field(
        description="A short noun phrase for the kind of thing, every instance of which is a "
        "candidate: 'apple', 'red cup'."
    )
    expression: Expression | None = Field(
        None,
        description="What is meant, in full ('the red apple left of the dog'): the model is asked "
        "of each candidate whether it is that. Leave out to look for yourself.",
    )


class ProposedObject(ObjectSummary):
    """A candidate."""

    confidence: float | None = Field(
        None, description="How much the proposer believes in it, 0 to 1; not calibrated."
    )
    is_meant: float | None = Field(
        None, description="The model's belief that this is the expression, 0 to 1."
    )


class ProposeResult(ImageResult):
    """Candidates, the surest first; their masks stay in the workspace."""

    candidates: list[ProposedObject] = Field(default=[])
    meant: list[str] = Field(
        default=[],
        description="object_ids that the model takes to be meant, each thing once; empty without "
        "an expression.",
    )


def propose_objects(context: ToolContext, arguments: ProposeObjectsArguments) -> ToolOutput:
    """Find candidates, let the model judge them if an expression is given, keep all of them."""
    record = context.workspace.open_image(arguments.image)
    found = propose(context.model, record.image, arguments.phrase)
    if arguments.expression is not None:
        found = judge(context.model, record.image, arguments.expression, found)
    kept = [context.workspace.add_object(_object(context, record, arguments, one)) for one in found]
    frame = context.frame(record)
    candidates = [
        ProposedObject(
            **summary(frame, one).model_dump(),
            confidence=rounded(candidate.proposal.confidence),
            is_meant=rounded(candidate.share),
        )
        for one, candidate in zip(kept, found, strict=True)
    ]
    taken = {id(one) for one in accept(found, TargetCount.ZERO_OR_MORE)}
    meant = [one.object_id for one, of in zip(candidates, found, strict=True) if id(of) in taken]
    asked = arguments.expression or arguments.phrase
    notes = (*record.notes, *context.model.stated(record.image, asked).notes)
    if candidates:
        lines = [*map(_line, candidates), _next_step(meant, arguments.expression is not None)]
        head = header(record, "found", "\n".join(lines), notes)
    else:
        text = f"Nothing in {record.image_id} is proposed for {arguments.phrase[:80]!r}."
        head = header(record, "not_found", text, notes)
    return ToolOutput(
        ProposeResult(**head, candidates=candidates, meant=meant),
        masks={one.object_id: mask_of(one) for one in kept},
    )


def _object(
    context: ToolContext, record: ImageRecord, arguments: ProposeObjectsArguments, one: Candidate
) -> ObjectRecord:
    """A candidate as the workspace keeps it; round 2 can go on from what it was judged by."""
    name = arguments.expression or arguments.phrase
    return ObjectRecord(
        image_id=record.image_id,
        name=name,
        box=one.box,
        location=context.model.stated(record.image, name, one.box),
        points=one.points,
        drawn=one.drawn if one.drawn.logits is not None else None,
        mask=one.drawn.mask,
    )


def _line(one: ProposedObject) -> str:
    """A candidate in one line."""
    parts = [object_line(one)]
    if one.confidence is not None:
        parts.append(f"confidence {one.confidence:.2f}")
    if one.is_meant is not None:
        parts.append(f"is meant {one.is_meant:.2f}")
    return ", ".join(parts)


def _next_step(meant: list[str], judged: bool) -> str:
    """What the model takes to be meant, and what to do where it was not asked or says none."""
    if meant:
        return f"The model takes {', '.join(meant)} to be meant."
    none = "The model takes none of them to be meant. " * judged
    return f"{none}Next: view_objects with these object_ids, or is_point_inside_object."


PROPOSE_OBJECTS = ToolSpec(
    "propose_objects",
    "Find every candidate for a short noun phrase, each with a mask and an object_id. Use it when "
    "several things look alike or segment_object picks the wrong one: look at the candidates with "
    "view_objects and choose, or give the full expression and the model judges each of them. "
    "Earlier objects are kept.",
    ProposeObjectsArguments,
    ProposeResult,
    propose_objects,
    has_coordinates=True,
)
