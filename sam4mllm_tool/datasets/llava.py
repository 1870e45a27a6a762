"""LLaVA's instruction files: questions and answers about pictures, without masks.

Layout (Liu et al., NeurIPS 2023, ``llava_instruct_150k.json``, ``llava_v1_5_mix665k.json``): a JSON
list of ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, …]}``, read as a
stream. ``image`` is a path below the file's folder, or below ``images/`` beside it; records without
one are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam4mllm_tool.datasets.coco import stream_items
from sam4mllm_tool.datasets.vqa import VqaExample
from sam4mllm_tool.errors import DatasetError

IMAGE_MARK = "<image>"


def examples(file: Path, split: str = "train") -> Iterator[VqaExample]:
    """The records that have a picture, in the file's order.

    Raises:
        DatasetError: no such file, or not of that form.
    """
    if not file.is_file():
        raise DatasetError(f"vqa: {file} is no file", hint="Give a LLaVA instruction file.")
    for record in stream_items(file, "item"):
        try:
            if "image" in record:
                image = _below(file.parent, record["image"])
                yield VqaExample(str(record["id"]), image, _pairs(record))
        except (KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{file} is no LLaVA instruction file: {error!r}",
                hint='It should be a JSON list of {"id", "image", "conversations"}.',
            ) from error


def _below(folder: Path, name: str) -> Path:
    inner = folder / "images" / name
    return inner if inner.exists() else folder / name


def _pairs(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    texts = [str(turn["value"]).replace(IMAGE_MARK, "").strip() for turn in record["conversations"]]
    return tuple(zip(texts[::2], texts[1::2], strict=False))
