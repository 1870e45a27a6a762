"""Random dialogues about random pictures, for holding the engine to its oracle."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from random_models import expression

from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.reading import Spot
from sam4mllm_tool.protocols import Dialogue, Mllm, Turn
from sam4mllm_tool.types import Box, Point, RgbImage, TargetCount, YesNo

FORM = Sam4MllmFormat(max_boxes=3)


def ask_box(text: str, image: RgbImage, count: TargetCount = TargetCount.ONE) -> Dialogue:
    """System prompt and round 1."""
    question = FORM.ask_boxes(text, count, image.size)
    return (Turn("system", FORM.system_prompt or ""), Turn("user", question))


def ask_points(opening: Dialogue, reply: str, image: RgbImage, points: int, seed: int) -> Dialogue:
    """Round 2 about random points."""
    rng = random.Random(seed)
    spread = [
        Point(rng.uniform(0, image.width), rng.uniform(0, image.height)) for _ in range(points)
    ]
    question = FORM.ask_points("it", Box(1, 1, image.width, image.height), spread, image.size)
    return (*opening, Turn("assistant", reply), Turn("user", question))


def answers(mllm: Mllm, image: RgbImage, dialogue: Dialogue, count: int) -> list[YesNo]:
    """Round 2's answers."""
    return mllm.answer_yes_no(image, dialogue, words=FORM.yes_no, count=count)


def open_dialogue(mllm: LocalMllm, image: RgbImage, dialogue: Dialogue) -> Spot:
    """Where the engine would begin to read."""
    return mllm.engine.open(image.digest, *mllm._encoded(image, dialogue))


def largest_gap(some: Sequence[YesNo], others: Sequence[YesNo]) -> float:
    """Largest difference between two lists of answers' probabilities."""
    return max(
        abs(a - b) for one, other in zip(some, others, strict=True)
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip


def check_same(some: Sequence[YesNo], others: Sequence[YesNo]) -> None:
    """Same answers, probabilities within 1e-4, and small ones within 0.5% as well."""
    assert largest_gap(some, others) < 1e-4
    for one, other in zip(some, others, strict=True):
        assert (one.p_yes > one.p_no) == (other.p_yes > other.p_no)
        for ours, theirs in zip(one, other, strict=True):
            assert abs(math.log(ours + 1e-12) - math.log(theirs + 1e-12)) < 5e-3


def compare(mllm: Mllm, oracle: Mllm, image: RgbImage, seed: int, points: int = 8) -> None:
    """Hold one whole dialogue to the oracle."""
    rng = random.Random(seed)
    count = rng.choice(list(TargetCount))
    opening = ask_box(expression(rng), image, count)
    grammar = FORM.box_grammar(count)
    said = mllm.generate(image, opening, grammar=grammar)
    truth = oracle.generate(image, opening, grammar=grammar)
    assert said.text == truth.text
    assert said.tokens == truth.tokens
    assert said.log_probability is not None and truth.log_probability is not None
    assert abs(said.log_probability - truth.log_probability) < 1e-3
    question = ask_points(opening, said.text, image, points, seed)
    check_same(answers(mllm, image, question, points), answers(oracle, image, question, points))
