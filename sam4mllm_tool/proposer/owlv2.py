"""OWLv2: boxes for a phrase (arXiv 2306.09683); OWL-ViT (arXiv 2205.06230) works the same way."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from sam4mllm_tool.proposer.base import Detected, TransformersProposer
from sam4mllm_tool.types import RgbImage


class Owlv2Proposer(TransformersProposer):
    """Boxes; a candidate's score is how well the region's embedding matches the phrase's."""

    threshold = 0.1
    model_class, processor_class = AutoModelForZeroShotObjectDetection, AutoProcessor

    @property
    def _max_tokens(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)

    def _inputs(self, image: RgbImage, phrase: str) -> dict[str, Any]:
        return dict(self._processor(images=image.pil, text=[[phrase]], return_tensors="pt"))

    def _numbers(self, output: Any) -> list[Tensor]:
        return [output.logits, output.pred_boxes]

    def _detected(self, output: Any, inputs: dict[str, Any], size: tuple[int, int]) -> Detected:
        (detected,) = self._processor.post_process_grounded_object_detection(
            output, threshold=self._threshold, target_sizes=[size]
        )
        return Detected(detected["scores"], detected["boxes"])
