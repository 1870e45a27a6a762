"""What happened in a run, as data: written as JSON, replayed without the MLLM, drawn as a page.

Recording is done by wrappers around the two backends, so the flow itself knows nothing of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from sam4mllm_tool import display
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.formats import describe_numbers
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.masks.interop import LabelledMask
from sam4mllm_tool.protocols import (
    CheckpointNotes,
    Dialogue,
    MaskCandidate,
    Mllm,
    Proposal,
    Proposer,
    Question,
    Reply,
    Segmenter,
    SegmentPrompt,
    YesNoWords,
    answer_each,
    sample_replies,
)
from sam4mllm_tool.types import Box, Mask, RgbImage, YesNo

T = TypeVar("T")


class Exchange(BaseModel):
    """One question to the MLLM and what came back."""

    kind: Literal["generate", "alternates", "sample", "yes_no"]
    image: str = Field(description="digest of the picture that was asked about")
    dialogue: list[tuple[str, str]] = Field(description="(role, text) turns, the question last")
    count: int = Field(1, description="answers or replies asked for")
    replies: list[tuple[str, float | None, int]] = Field(
        default=[], description="(text, log-probability, free tokens) of each reply"
    )
    answers: list[YesNo] = Field(default=[], description="p_yes and p_no of each point")
    seconds: float = 0.0


class MaskCall(BaseModel):
    """One call of the segmenter: its prompts and the predicted IoU of each candidate mask."""

    prompts: list[dict[str, Any]]
    predicted_ious: list[list[float]]
    seconds: float


class ProposalCall(BaseModel):
    """One phrase put to the proposer: boxes in pixels, masks as COCO RLE."""

    image: str = Field(description="digest of the picture that was asked about")
    phrase: str
    limit: int
    proposals: list[dict[str, Any]]
    seconds: float


class Trace(BaseModel):
    """A whole run. ``objects`` hold masks as COCO RLE; coordinates are pixels."""

    version: Literal[1] = 1
    expression: str
    count: str
    strategy: str
    status: str = "not_found"
    image: dict[str, Any]
    models: dict[str, str]
    settings: dict[str, Any] = {}
    exchanges: list[Exchange] = []
    mask_calls: list[MaskCall] = []
    proposal_calls: list[ProposalCall] = []
    objects: list[dict[str, Any]] = []
    timings: dict[str, float] = {}
    notes: list[str] = []

    @property
    def questions(self) -> int:
        """How many questions the MLLM was asked."""
        return len(self.exchanges)

    def save(self, path: str | Path, image: RgbImage | None = None) -> Path:
        """Write as the path's extension says: ``.json`` (:meth:`load` reads it back equal) or
        ``.html``, a self-contained page.

        Args:
            path: the file to write.
            image: the picture that was asked about; only the page shows it.

        Raises:
            InputError: another extension, or a page without its picture.
        """
        target = Path(path)
        match target.suffix.lower():
            case ".json":
                text = self.model_dump_json(indent=1)
            case ".html" if image is not None:
                from sam4mllm_tool.drawing.html import trace_page

                text = trace_page(self.page_data(), image)
            case ".html":
                raise InputError("the page needs the picture", hint="Call save(path, image).")
            case _:
                raise InputError(
                    f"{target.name} is neither .json nor .html", hint="Name a .json or .html file."
                )
        target.write_text(text, encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace written by :meth:`save`.

        Raises:
            InputError: the file is missing or is not a trace.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is not a trace: {error}", hint="Give a file written by --trace or save()."
            ) from error

    def to_masks(self) -> list[LabelledMask]:
        """The masks with the expression as their name, for :mod:`sam4mllm_tool.masks.interop`."""
        return [
            LabelledMask(
                self.expression, Mask.from_rle(one["mask"]), one["score"], one["object_id"]
            )
            for one in self.objects
        ]

    def html(self, image: RgbImage | None = None) -> str:
        """A notebook's view of the run; without the picture, masks stand on plain grey."""
        from sam4mllm_tool.drawing.notebook import result_html, small_picture

        size = self.image["width"], self.image["height"]
        return result_html(
            self.expression,
            f"{len(self.objects)} found" if self.objects else "not found",
            small_picture(image, size, self.objects),
            self.objects,
            dialogue=self.conversation(),
            numbers=self.numbers,
            notes=self.notes,
        )

    def show(self, image: RgbImage | None = None) -> None:
        """In a notebook as the cell's output, else its picture in the desktop's viewer.

        Args:
            image: the picture that was asked about; without it, masks stand on plain grey.
        """
        from sam4mllm_tool.drawing.notebook import small_picture

        size = self.image["width"], self.image["height"]
        display.show(self, small_picture(image, size, self.objects))

    def _repr_html_(self) -> str:
        return self.html()

    @property
    def numbers(self) -> str:
        """What the coordinates in the dialogue are, for people who read it."""
        return describe_numbers(self.settings.get("format", ""))

    def page_data(self) -> dict[str, Any]:
        """The plain dictionary that :func:`sam4mllm_tool.drawing.overlay.trace_page` draws."""
        data = self.model_dump(mode="json", exclude={"exchanges", "mask_calls", "proposal_calls"})
        data["dialogue"] = self.conversation()
        data["numbers"] = self.numbers
        data["events"] = [
            {"kind": "mask", "detail": call.model_dump(mode="json")} for call in self.mask_calls
        ]
        return data

    def conversation(self) -> list[dict[str, str]]:
        """The turns of all dialogues, each once, as ``{"role", "text"}``."""
        found: list[dict[str, str]] = []
        seen: set[tuple[tuple[str, str], ...]] = set()
        for exchange in self.exchanges:
            turns = [*exchange.dialogue, ("assistant", _answer_text(exchange))]
            for end in range(1, len(turns) + 1):
                start = tuple((role, text.strip()) for role, text in turns[:end])
                if start not in seen:
                    seen.add(start)
                    role, text = turns[end - 1]
                    found.append({"role": role, "text": text.strip()})
        return found


def _answer_text(exchange: Exchange) -> str:
    if exchange.kind == "yes_no":
        return "".join("Yes" if a.p_yes >= a.p_no else "No" for a in exchange.answers)
    if exchange.kind == "sample":
        times = Counter(text for text, *_ in exchange.replies)
        return "\n".join(f"{text} ({n} of {times.total()})" for text, n in times.most_common())
    return "\n".join(text for text, *_ in exchange.replies).strip()


class Recorder:
    """Collects the exchanges, mask calls and stage times of one run."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.mask_calls: list[MaskCall] = []
        self.proposal_calls: list[ProposalCall] = []
        self.timings: dict[str, float] = {}

    def timed(self, name: str, call: Callable[[], T]) -> tuple[T, float]:
        """Run ``call``, add its seconds to stage ``name``."""
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        self.timings[name] = self.timings.get(name, 0.0) + seconds
        return result, seconds


class RecordingMllm:
    """An MLLM that notes what passes through it."""

    def __init__(self, mllm: Mllm, recorder: Recorder) -> None:
        self._mllm, self._recorder = mllm, recorder
        self.name, self.format_name = mllm.name, mllm.format_name
        self.notes = mllm.notes

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """As the wrapped MLLM, noted as stage *locate*."""
        reply, seconds = self._recorder.timed(
            "locate",
            lambda: self._mllm.generate(
                image, dialogue, grammar=grammar, max_new_tokens=max_new_tokens
            ),
        )
        self._note("generate", image, dialogue, 1, seconds, replies=[reply])
        return reply

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """As the wrapped MLLM, noted as stage *locate*."""
        replies, seconds = self._recorder.timed(
            "locate",
            lambda: self._mllm.alternates(image, dialogue, grammar=grammar, count=count),
        )
        self._note("alternates", image, dialogue, count, seconds, replies=replies)
        return replies

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """As the wrapped MLLM, noted as stage *verify*."""
        replies, seconds = self._recorder.timed(
            "verify",
            lambda: sample_replies(self._mllm, image, dialogue, grammar=grammar, count=count),
        )
        self._note("sample", image, dialogue, count, seconds, replies=replies)
        return replies

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """As the wrapped MLLM, noted as stage *points*."""
        answers, seconds = self._recorder.timed(
            "points",
            lambda: self._mllm.answer_yes_no(image, dialogue, words=words, count=count),
        )
        self._note("yes_no", image, dialogue, count, seconds, answers=answers)
        return answers

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """As the wrapped MLLM, noted as stage *points*, the seconds in equal shares."""
        answers, seconds = self._recorder.timed(
            "points", lambda: answer_each(self._mllm, questions, words=words)
        )
        for one, some in zip(questions, answers, strict=True):
            share = seconds / len(questions)
            self._note("yes_no", one.image, one.dialogue, one.count, share, answers=some)
        return answers

    def _note(
        self,
        kind: Literal["generate", "alternates", "sample", "yes_no"],
        image: RgbImage,
        dialogue: Dialogue,
        count: int,
        seconds: float,
        replies: Sequence[Reply] = (),
        answers: Sequence[YesNo] = (),
    ) -> None:
        self._recorder.exchanges.append(
            Exchange(
                kind=kind,
                image=image.digest,
                dialogue=[(turn.role, turn.text) for turn in dialogue],
                count=count,
                replies=[(reply.text, reply.log_probability, reply.tokens) for reply in replies],
                answers=list(answers),
                seconds=seconds,
            )
        )


class RecordingSegmenter:
    """A segmenter that notes what passes through it."""

    def __init__(self, segmenter: Segmenter, recorder: Recorder) -> None:
        self._segmenter, self._recorder = segmenter, recorder
        self.name = segmenter.name

    def embed(self, image: RgbImage) -> None:
        """As the wrapped segmenter, noted as stage *image embedding*."""
        self._recorder.timed("image embedding", lambda: self._segmenter.embed(image))

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """As the wrapped segmenter, noted as stage *mask*."""
        masks, seconds = self._recorder.timed(
            "mask", lambda: self._segmenter.predict(image, prompts)
        )
        self._recorder.mask_calls.append(
            MaskCall(
                prompts=[_prompt_data(prompt) for prompt in prompts],
                predicted_ious=[[float(m.predicted_iou) for m in some] for some in masks],
                seconds=seconds,
            )
        )
        return masks

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """As the wrapped segmenter."""
        return self._segmenter.logits_at_image_size(image, logits)


class RecordingProposer:
    """A proposer that notes what passes through it."""

    def __init__(self, proposer: Proposer, recorder: Recorder) -> None:
        self._proposer, self._recorder = proposer, recorder
        self.name = proposer.name

    def propose(self, image: RgbImage, phrase: str, limit: int) -> list[Proposal]:
        """As the wrapped proposer, noted as stage *propose*."""
        found, seconds = self._recorder.timed(
            "propose", lambda: self._proposer.propose(image, phrase, limit)
        )
        self._recorder.proposal_calls.append(
            ProposalCall(
                image=image.digest,
                phrase=phrase,
                limit=limit,
                proposals=[_proposal_data(one) for one in found],
                seconds=seconds,
            )
        )
        return found


def _proposal_data(one: Proposal) -> dict[str, Any]:
    mask = None if one.mask is None else one.mask.to_rle()
    return {"box": list(one.box), "confidence": one.confidence, "mask": mask}


def _prompt_data(prompt: SegmentPrompt) -> dict[str, Any]:
    return {
        "box": list(prompt.box) if prompt.box else None,
        "points": [{"x": p.x, "y": p.y, "label": p.label.value} for p in prompt.points],
        "former_mask": prompt.mask_logits is not None,
    }


class ReplayMllm:
    """Answers from a trace: the same question on the same picture gets the recorded reply."""

    def __init__(self, trace: Trace, format_name: str, notes: CheckpointNotes) -> None:
        self.name = trace.models.get("mllm", "replay")
        self.format_name = format_name
        self.notes = notes
        self._exchanges = {
            (e.kind, e.image, tuple(e.dialogue), e.count): e for e in trace.exchanges
        }

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """The recorded reply."""
        return Reply(*self._find("generate", image, dialogue, 1).replies[0])

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The recorded replies."""
        found = self._find("alternates", image, dialogue, count)
        return [Reply(*reply) for reply in found.replies]

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The recorded replies."""
        found = self._find("sample", image, dialogue, count)
        return [Reply(*reply) for reply in found.replies]

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """The recorded probabilities."""
        return list(self._find("yes_no", image, dialogue, count).answers)

    def _find(self, kind: str, image: RgbImage, dialogue: Dialogue, count: int) -> Exchange:
        turns = tuple((turn.role, turn.text) for turn in dialogue)
        found = self._exchanges.get((kind, image.digest, turns, count))  # type: ignore[arg-type]
        if found is None:
            raise _not_recorded()
        return found


class ReplayProposer:
    """Proposes from a trace: the same phrase on the same picture gets the recorded candidates."""

    def __init__(self, trace: Trace) -> None:
        self.name = trace.models.get("proposer", "replay")
        self._calls = {(c.image, c.phrase, c.limit): c for c in trace.proposal_calls}

    def propose(self, image: RgbImage, phrase: str, limit: int) -> list[Proposal]:
        """The recorded candidates."""
        found = self._calls.get((image.digest, phrase, limit))
        if found is None:
            raise _not_recorded()
        return [
            Proposal(
                Box(*one["box"]),
                one["confidence"],
                None if one["mask"] is None else Mask.from_rle(one["mask"]),
            )
            for one in found.proposals
        ]


def _not_recorded() -> InputError:
    return InputError(
        "the trace does not hold this question",
        hint="Replay with the picture, settings and masks model of the recorded run.",
    )
