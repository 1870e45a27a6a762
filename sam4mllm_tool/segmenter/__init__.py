"""Segmenters: SAM and its relatives behind one protocol."""

from __future__ import annotations

from pathlib import Path

from sam4mllm_tool import embedded
from sam4mllm_tool.protocols import Segmenter

__all__ = ["load_segmenter"]


def load_segmenter(
    name_or_path: str | Path = embedded.NAME, *, device: str = "auto", dtype: str = "float32"
) -> Segmenter:
    """The segmenter of that checkpoint.

    Args:
        name_or_path: ``"embedded"``, a segment_anything checkpoint file (``.pth``,
            ``.safetensors``), the directory of a small SAM, or a directory or hub id of a
            transformers SAM family.
        device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device.
        dtype: of the transformers families; segment_anything runs in float32.

    Raises:
        CheckpointError: missing, corrupt or of the wrong kind.
        DeviceOutOfMemory: the device is too small for it.
    """
    if name_or_path == embedded.NAME:
        name_or_path = embedded.SAM
    path = Path(name_or_path).expanduser()
    if path.is_file() or path.suffix in {".pth", ".pt", ".safetensors"} or _is_small(path):
        from sam4mllm_tool.segmenter.segment_anything import SegmentAnythingSegmenter

        return SegmentAnythingSegmenter.from_pretrained(path, device=device)
    from sam4mllm_tool.segmenter.transformers_sam import TransformersSegmenter

    return TransformersSegmenter.from_pretrained(str(name_or_path), device=device, dtype=dtype)


def _is_small(directory: Path) -> bool:
    from sam4mllm_tool.segmenter.checkpoints import SMALL_SAM, model_type_of

    return model_type_of(directory) == SMALL_SAM
