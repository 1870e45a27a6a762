"""Candidates for a phrase: proposed, drawn, and judged by the MLLM.

A text-prompted segmenter finds every instance of a phrase, and a multimodal LLM tells which of
them is meant: the way of SAM 3 Agent (arXiv 2511.16719). Here the MLLM judges by the dialogue's
own questions about points, and what was proposed before stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sam4mllm_tool.concurrency import stage
from sam4mllm_tool.geometry import different_boxes, union_box
from sam4mllm_tool.images.loading import ImageLike, to_rgb_image
from sam4mllm_tool.masks.relations import share_inside
from sam4mllm_tool.pipeline.faults import checked_proposals, typed_faults
from sam4mllm_tool.pipeline.points import inner_points
from sam4mllm_tool.pipeline.results import ScoredBox
from sam4mllm_tool.pipeline.steps import DialogueSteps
from sam4mllm_tool.pipeline.validation import check_expression
from sam4mllm_tool.protocols import MaskCandidate, Proposal, SegmentPrompt
from sam4mllm_tool.types import Box, Mask, Point, PromptPoint, RgbImage, TargetCount

ACCEPTED = 0.5
"""Share of yes from which a candidate is what the expression describes."""
_SAME_MASK = 0.7
"""Share of one mask within another from which they are the same thing."""
_POINTS_EACH = 3

_DETERMINER = re.compile(r"^(?:the|an?|all|every|each|both|any)\s+", re.IGNORECASE)
_RELATION = re.compile(
    r"\s+(?:(?:to|on|at|in) the )?(?:left|right|top|bottom|front|back) of\b.*"
    r"|\s+(?:above|below|under|over|behind|beside|near|between|with|without|on|in|at|from|by|inside"
    r"|outside|next to|closest|nearest|that|which|who|whose)\b.*",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Candidate:
    """A proposal with its mask, and what the MLLM said about it.

    Attributes:
        drawn: the proposer's own mask, or the segmenter's for the box (and the answered points).
        points: the points that the MLLM was asked about; none if it was asked by one mark.
        share: of yes against no, 0 to 1, or of the MLLM's own answers that agree; ``None`` if it
            was not asked.
    """

    proposal: Proposal
    drawn: MaskCandidate
    points: tuple[PromptPoint, ...] = ()
    share: float | None = None

    @property
    def box(self) -> Box:
        """The proposed box."""
        return self.proposal.box


def noun_phrase(expression: str) -> str:
    """An expression without its article and without what follows the first relation.

    Text-prompted detectors are trained on short noun phrases: "the red apple left of the dog" is
    proposed as "red apple", and the MLLM, which reads all of it, tells which one is meant.
    """
    short = _DETERMINER.sub("", _RELATION.sub("", expression.strip())).strip()
    return short or expression.strip()


def propose(
    steps: DialogueSteps, image: ImageLike, phrase: str, limit: int | None = None
) -> list[Candidate]:
    """Candidates for a phrase with masks, the likeliest first; none is a result.

    Args:
        steps: their proposer is asked, or their MLLM: its boxes and the alternates of the first.
        image: anything that :func:`~sam4mllm_tool.load_image` reads.
        phrase: what to find every instance of.
        limit: how many at most; by default as the settings say.

    Raises:
        ExpressionError: empty or overlong phrase.
        ImageError, AccessDenied: the image cannot be read.
        DialogueError: the MLLM's reply could not be read.
        BackendError: a model, device or endpoint failed.
    """
    image, most = to_rgb_image(image), limit or steps.settings.proposals
    if steps.proposer is None:
        found = _answered(steps, image, phrase, most)
    else:
        stage("propose")
        text = check_expression(phrase)
        with typed_faults(steps.proposer.name):
            found = list(checked_proposals(steps.proposer.propose(image, text, most), image))
    masks = _masks(steps, image, found, [()] * len(found))
    return [Candidate(*pair) for pair in zip(found, masks, strict=True)]


def judge(
    steps: DialogueSteps, image: ImageLike, expression: str, candidates: Sequence[Candidate]
) -> list[Candidate]:
    """The candidates as judged by the MLLM, the surest first: by share of yes times confidence.

    It is asked about the innermost points of each mask: named by coordinates, several a candidate,
    which also guide its mask; or, for a family that reads marks better, by one numbered mark for
    each candidate on one picture. Where boxes are verified by the MLLM's own answers, the share is
    that of :meth:`DialogueSteps.verify` instead, and confidence decides between equals only.

    Raises:
        As :meth:`DialogueSteps.check_points` and :meth:`DialogueSteps.verify`.
    """
    image = to_rgb_image(image)
    if not candidates:
        return []
    if steps.verification == "posterior":
        verified = steps.verify(image, expression, [one.box for one in candidates])
        judged = [
            replace(one, share=answer.p_yes)
            for one, answer in zip(candidates, verified, strict=True)
        ]
        return sorted(judged, key=lambda one: (one.share, _confidence(one)), reverse=True)
    if (steps.settings.point_asking or steps.speech.point_asking) == "marks":
        answers = _ask_by_marks(steps, image, expression, candidates)
        judged = [
            replace(one, share=_share(some)) for one, some in zip(candidates, answers, strict=True)
        ]
    else:
        answers = _ask_by_points(steps, image, expression, candidates)
        masks = _masks(steps, image, [one.proposal for one in candidates], answers)
        judged = [
            replace(one, drawn=drawn, points=some, share=_share(some))
            for one, drawn, some in zip(candidates, masks, answers, strict=True)
        ]
    return sorted(judged, key=_belief, reverse=True)


def accept(judged: Sequence[Candidate], count: TargetCount) -> list[Candidate]:
    """Those that are what the expression describes, each thing once.

    Args:
        judged: the surest first.
        count: with ``ONE`` it is the surest, with ``ONE_OR_MORE`` at least that.
    """
    sure = [one for one in judged if (one.share or 0.0) >= ACCEPTED]
    if count is not TargetCount.ZERO_OR_MORE:
        sure = sure or list(judged[:1])
    kept: list[Candidate] = []
    for one in sure[:1] if count is TargetCount.ONE else sure:
        if not any(_same(one.drawn.mask, other.drawn.mask) for other in kept):
            kept.append(one)
    return kept


def guided(
    steps: DialogueSteps, image: ImageLike, expression: str, chosen: Sequence[Candidate]
) -> list[Candidate]:
    """The chosen ones with round 2's points in their masks, where they were judged by their boxes.

    A proposer's own mask stays as it is.
    """
    image = to_rgb_image(image)
    bare = [n for n, one in enumerate(chosen) if one.proposal.mask is None]
    if steps.verification != "posterior" or not bare:
        return list(chosen)
    boxes = [chosen[n].box for n in bare]
    location = steps.stated(image, expression, *boxes)
    answers = steps.check_points_of_each(image, location, boxes)
    masks = _masks(steps, image, [chosen[n].proposal for n in bare], answers)
    found = list(chosen)
    for n, some, drawn in zip(bare, answers, masks, strict=True):
        found[n] = replace(found[n], points=some, drawn=drawn)
    return found


def _belief(one: Candidate) -> float:
    return (one.share or 0.0) * _confidence(one)


def _confidence(one: Candidate) -> float:
    confidence = one.proposal.confidence
    return 1.0 if confidence is None else confidence


def _same(a: Mask, b: Mask) -> bool:
    """Whether two candidates of one phrase are the same thing, or one is a part of the other."""
    return max(share_inside(a, b), share_inside(b, a)) > _SAME_MASK


def _answered(steps: DialogueSteps, image: RgbImage, phrase: str, limit: int) -> list[Proposal]:
    """What the MLLM answers to the phrase, and what it nearly answered."""
    location = steps.locate(image, phrase, alternates=limit)
    found: list[ScoredBox] = list(location.objects)
    if location.objects:
        found += location.objects[0].alternates
    kept = different_boxes([one.box for one in found], limit)
    return [Proposal(found[n].box, found[n].likelihood) for n in kept]


def _masks(
    steps: DialogueSteps,
    image: RgbImage,
    proposals: Sequence[Proposal],
    points: Sequence[tuple[PromptPoint, ...]],
) -> list[MaskCandidate]:
    """The proposer's own masks; those it does not give are drawn, in one call."""
    pairs = zip(proposals, points, strict=True)
    prompts = [SegmentPrompt(one.box, some) for one, some in pairs if one.mask is None]
    drawn = iter(steps.draw(image, prompts) if prompts else ())
    return [
        next(drawn) if one.mask is None else MaskCandidate(one.mask, None, one.confidence or 0.0)
        for one in proposals
    ]


def _ask_by_points(
    steps: DialogueSteps, image: RgbImage, expression: str, candidates: Sequence[Candidate]
) -> list[tuple[PromptPoint, ...]]:
    """Several points of each candidate, each candidate's box in a dialogue of its own."""
    answers = []
    for one in candidates:
        places = _places(one, _POINTS_EACH)
        location = steps.stated(image, expression, one.box)
        answers.append(steps.check_points(image, location, one.box, places))
    return answers


def _ask_by_marks(
    steps: DialogueSteps, image: RgbImage, expression: str, candidates: Sequence[Candidate]
) -> list[tuple[PromptPoint, ...]]:
    """One point of each candidate, all on one picture with numbered marks."""
    places = [_places(one, 1)[0] for one in candidates]
    around = union_box(one.box for one in candidates)
    location = steps.stated(image, expression, around)
    return [(point,) for point in steps.check_points(image, location, around, places)]


def _places(one: Candidate, count: int) -> list[Point]:
    """Innermost points of a candidate's mask, or the centre of its box if that is empty."""
    return inner_points(one.drawn.mask.pixels.astype(int), count) or [Point(*one.box.centre)]


def _share(answers: Sequence[PromptPoint]) -> float:
    """Share of yes against no over all answers."""
    yes = sum(answer.p_yes or 0.0 for answer in answers)
    return yes / max(yes + sum(answer.p_no or 0.0 for answer in answers), 1e-9)
