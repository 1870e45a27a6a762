"""SAM 3's concept prompts: a noun phrase → a mask for each instance (arXiv 2511.16719)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Sam3Model, Sam3Processor

from sam4mllm_tool.proposer.base import Detected, TransformersProposer
from sam4mllm_tool.types import RgbImage


class Sam3Proposer(TransformersProposer):
    """Boxes with masks; the score includes how likely the phrase occurs in the picture at all."""

    threshold = 0.3
    model_class, processor_class = Sam3Model, Sam3Processor

    @property
    def _max_tokens(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)

    def _inputs(self, image: RgbImage, phrase: str) -> dict[str, Any]:
        inputs = self._processor(images=image.pil, text=phrase, return_tensors="pt")
        return {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}

    def _numbers(self, output: Any) -> list[Tensor]:
        presence = [] if output.presence_logits is None else [output.presence_logits]
        return [output.pred_logits, output.pred_boxes, output.pred_masks, *presence]

    def _detected(self, output: Any, inputs: dict[str, Any], size: tuple[int, int]) -> Detected:
        (detected,) = self._processor.post_process_instance_segmentation(
            output, threshold=self._threshold, target_sizes=[size]
        )
        return Detected(detected["scores"], detected["boxes"], detected["masks"])
