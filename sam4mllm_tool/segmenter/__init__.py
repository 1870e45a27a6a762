"""Segmenters: SAM and its relatives behind one protocol."""

from __future__ import annotations

from pathlib import Path

from sam4mllm_tool import embedded
from sam4mllm_tool.catalogue import is_hub_id, nearest_checkpoint
from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.protocols import Segmenter

__all__ = ["load_segmenter"]


def load_segmenter(
    name_or_path: str | Path = embedded.NAME,
    *,
    device: str = "auto",
    dtype: str = "auto",
    decoder: str | Path | None = None,
) -> Segmenter:
    """The segmenter of that checkpoint; its kind is recognised from the file's content.

    Args:
        name_or_path: ``"embedded"``, a checkpoint file (``.pt``, ``.pth``, ``.safetensors``) of
            segment_anything's ViT-B/L/H or of EfficientViT-SAM, the directory of a small SAM, or
            a directory or hub id of a transformers SAM family.
        device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device.
        dtype: of the image encoder, where nearly all time and memory go: ``"auto"`` and
            ``"float32"`` give the published masks, ``"bfloat16"`` nearly the same ones in half
            the memory (docs/checkpoints.md has the measured difference). Prompts and masks are
            always computed in float32: bfloat16 resolves a coordinate to about 3 px in 1024.
        decoder: file of fine-tuned weights laid over a checkpoint of segment_anything or
            EfficientViT-SAM, such as SAM4MLLM's mask decoder.

    Raises:
        CheckpointError: missing, corrupt or of the wrong kind; an unknown dtype, or float16, in
            which SAM's encoders overflow.
        DeviceOutOfMemory: the device is too small for it.
    """
    if name_or_path == embedded.NAME:
        name_or_path = embedded.SAM
    path = Path(name_or_path).expanduser()
    if path.is_file() or path.suffix in {".pth", ".pt", ".safetensors"} or _is_small(path):
        from sam4mllm_tool.segmenter.segment_anything import SegmentAnythingSegmenter

        return SegmentAnythingSegmenter.from_pretrained(
            path, decoder=decoder, device=device, dtype=dtype
        )
    if not path.is_dir() and not is_hub_id(str(name_or_path)):
        raise CheckpointError(
            f"no segmenter at {str(name_or_path)!r}",
            hint=f"{nearest_checkpoint(str(name_or_path))}Give a checkpoint file, a directory or a "
            "hub id.",
        )
    if decoder is not None:
        raise CheckpointError(
            f"{str(name_or_path)!r} is a transformers checkpoint, which takes no separate decoder",
            hint="Leave the decoder out, or use a checkpoint file, for example EfficientViT-SAM's.",
        )
    from sam4mllm_tool.segmenter.transformers_sam import TransformersSegmenter

    return TransformersSegmenter.from_pretrained(str(name_or_path), device=device, dtype=dtype)


def _is_small(directory: Path) -> bool:
    from sam4mllm_tool.segmenter.checkpoints import SMALL_SAM, model_type_of

    return model_type_of(directory) == SMALL_SAM
