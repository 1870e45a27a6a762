"""Grounding DINO: boxes for a phrase (arXiv 2303.05499); MM Grounding DINO works the same way."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from sam4mllm_tool.proposer.base import Detected, TransformersProposer
from sam4mllm_tool.types import RgbImage


class GroundingDinoProposer(TransformersProposer):
    """Boxes; a candidate's score is that of the phrase's best matching token."""

    threshold = 0.25
    model_class, processor_class = AutoModelForZeroShotObjectDetection, AutoProcessor

    @property
    def _max_tokens(self) -> int:
        return int(self._model.config.max_text_len)

    def _inputs(self, image: RgbImage, phrase: str) -> dict[str, Any]:
        # The model was trained on lower case; a full stop ends a phrase.
        text = " ".join(phrase.lower().replace(".", " ").split()) + "."
        return dict(self._processor(images=image.pil, text=text, return_tensors="pt"))

    def _numbers(self, output: Any) -> list[Tensor]:
        return [output.logits, output.pred_boxes]

    def _detected(self, output: Any, inputs: dict[str, Any], size: tuple[int, int]) -> Detected:
        (detected,) = self._processor.post_process_grounded_object_detection(
            output, inputs["input_ids"], threshold=self._threshold, target_sizes=[size]
        )
        return Detected(detected["scores"], detected["boxes"])
