"""Auxiliary losses on early decoder states, at the points that a text names.

An answer gives only one bit of training signal, through all layers. So training adds two losses on
the state of a point's y token: after two layers it must tell what lies at the point (the questions
of stage 1), and after three layers whether this is the object in question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.embedded_mllm.packing import Looks
from recipes.embedded_mllm.vision import DenseHeads, Questions, dense_loss, question_weights

SEEN, DECIDED = 2, 3
"""Numbers of layers after which a point's state tells what lies there, and if it is the target."""


class EarlyHeads(nn.Module):
    """Linear read-outs of the states of points; for training only."""

    weights: Tensor

    def __init__(self, width: int, questions: Questions) -> None:
        super().__init__()
        self.seen = DenseHeads(width, questions)
        self.verdict = nn.Linear(width, 1)
        weights = question_weights(questions)
        weights[questions.groups["cells"]] = 0.0
        self.register_buffer("weights", weights, persistent=False)

    def forward(
        self, states: Sequence[Tensor], looks: Looks, answers: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of what lies at the points, and of whether it is the object in question.

        Args:
            states: of the decoder, before the first layer and after each: B x L x width.
            looks: the points.
            answers, boxes: what lies there, as :func:`~recipes.embedded_mllm.vision.point_answers`.
        """
        if not len(looks.rows):
            return torch.zeros(()), torch.zeros(())
        seen, decided = (
            normalised(states[layer][looks.rows, looks.places].float()) for layer in (SEEN, DECIDED)
        )
        looked, _ = dense_loss(self.seen, seen[None], answers[None], boxes[None], self.weights)
        asked = looks.answers >= 0
        logits = self.verdict(decided[asked])[:, 0]
        truth = looks.answers[asked].float()
        return looked, functional.binary_cross_entropy_with_logits(logits, truth)


def normalised(states: Tensor) -> Tensor:
    """States (..., width) after an RMS norm with weights of one."""
    return functional.rms_norm(states, states.shape[-1:])
