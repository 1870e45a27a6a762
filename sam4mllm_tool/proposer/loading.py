"""Detecting the family of a proposer's checkpoint, and loading it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from sam4mllm_tool.catalogue import nearest_checkpoint
from sam4mllm_tool.devices import choose_device
from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.pretrained import load_whole, loading
from sam4mllm_tool.proposer.base import TransformersProposer
from sam4mllm_tool.proposer.grounding_dino import GroundingDinoProposer
from sam4mllm_tool.proposer.owlv2 import Owlv2Proposer
from sam4mllm_tool.proposer.sam3 import Sam3Proposer

FAMILIES: dict[str, type[TransformersProposer]] = {
    "sam3": Sam3Proposer,
    "sam3_video": Sam3Proposer,
    "grounding-dino": GroundingDinoProposer,
    "mm-grounding-dino": GroundingDinoProposer,
    "owlv2": Owlv2Proposer,
    "owlvit": Owlv2Proposer,
}
"""Proposer classes by the configuration's ``model_type``."""

_HINT = f"Give 'mllm', or a transformers checkpoint of {', '.join(FAMILIES)}."


def load(name: str, *, device: str, threshold: float | None) -> TransformersProposer:
    """See :func:`~sam4mllm_tool.proposer.load_proposer`."""
    target = choose_device(device)
    hint = f"{'' if Path(name).is_dir() else nearest_checkpoint(name)}{_HINT}"
    with loading("proposer", name, hint):
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if kind not in FAMILIES:
            raise CheckpointError(
                f"{name!r} has the model type {kind!r}, which is no proposer", hint=_HINT
            )
        family = FAMILIES[kind]
        model = load_whole(family.model_class, name, target)
        processor = family.processor_class.from_pretrained(name, trust_remote_code=False)
    return family(model, processor, name=name.rstrip("/").split("/")[-1], threshold=threshold)
