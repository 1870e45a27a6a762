"""Does this box show what the expression describes? Read from the MLLM's own answers.

An MLLM that was not taught the question "does this region show …?" answers it at random, although
it knows where things are. Its answers to "where is it?", drawn as often as it would give them, are
its belief about where the thing is: the share of them that agree with a box is the probability that
the box is right. The method is ours; agreement among sampled answers as a measure of belief is
that of self-consistency (Wang et al., arXiv 2203.11171), and choosing the box that most of them
agree with is minimum Bayes risk decoding (Kumar and Byrne, HLT-NAACL 2004).
"""

from __future__ import annotations

from collections.abc import Sequence

from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.types import Box, YesNo

ANSWERS = 32
"""Answers drawn for one expression; all boxes to verify are compared with the same ones."""
AGREEING = 0.5
"""IoU from which an answer and a box mean the same thing, as for a right box in evaluation."""


def posterior(answers: Sequence[Sequence[Box]], boxes: Sequence[Box]) -> list[YesNo]:
    """For each box, the share of the answers that agree with it, and the rest.

    Args:
        answers: drawn at temperature 1, at least one; each the boxes of all that the expression
            means, none if nothing.
        boxes: pixels, as the answers.
    """
    found = []
    for box in boxes:
        agreeing = sum(any(box_iou(one, box) >= AGREEING for one in some) for some in answers)
        share = agreeing / len(answers)
        found.append(YesNo(share, 1 - share))
    return found
