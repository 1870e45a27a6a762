"""A model's quality while it is trained: held-out expressions through the real pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.judge import judge
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.places import PLACES
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.protocols import Segmenter

SHOWN = (
    "box_acc50", "point_accuracy", *(f"points_on_{place}" for place in PLACES), "cIoU", "n_acc",
    "t_acc",
)  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """Expressions of pictures outside the training data, and the segmenter for their masks."""

    cases: Sequence[Case]
    segmenter: Segmenter

    def measure(self, model: Any, processor: Any, format_name: str) -> dict[str, float]:
        """Each metric of `SHOWN` that is defined on the cases, for the model as it is now.

        The model is left in the mode (training or not) it was in. A model held in 16 bits has
        trained layers in 32 bits, whose inputs are cast.
        """
        training = model.training
        halved = any(weight.dtype == torch.bfloat16 for weight in model.parameters())
        cast = torch.autocast(model.device.type, torch.bfloat16, enabled=halved)
        model.eval()
        try:
            mllm = LocalMllm(model, processor, name="in training", format_name=format_name)
            pipeline = Sam4MLLM(mllm, self.segmenter)
            with cast:
                outcomes = [judge(pipeline, case, case.open_image()).outcome for case in self.cases]
        finally:
            model.train(training)
        found = {name: METRICS[name](outcomes) for name in SHOWN}
        return {name: value for name, value in found.items() if math.isfinite(value)}
