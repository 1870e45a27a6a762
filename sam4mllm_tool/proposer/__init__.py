"""Proposers: models that find every instance of a phrase, behind one protocol."""

from __future__ import annotations

from pathlib import Path

from sam4mllm_tool.protocols import Proposer

__all__ = ["NAME", "load_proposer"]

NAME = "mllm"
"""Name of the default proposer: the MLLM's own boxes, without another model."""


def load_proposer(
    name_or_path: str | Path = NAME, *, device: str = "auto", threshold: float | None = None
) -> Proposer | None:
    """Load a proposer; the checkpoint's configuration tells its model family.

    Args:
        name_or_path: ``"mllm"``, or a directory or hub id of a transformers checkpoint of SAM 3,
            Grounding DINO or OWLv2 (and OWL-ViT, MM Grounding DINO).
        device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device. The model runs in float32.
        threshold: minimum confidence of a candidate; by default the value that transformers has
            for the family.

    Returns:
        ``None`` for ``"mllm"``: the candidates are then the MLLM's box and its alternates.

    Raises:
        CheckpointError: missing, corrupt or of the wrong kind.
        DeviceOutOfMemory: the device is too small for it.
    """
    if name_or_path == NAME:
        return None
    from sam4mllm_tool.proposer.loading import load

    return load(str(name_or_path), device=device, threshold=threshold)
