"""Data sets in the hub's common layout: parquet files per split, with the pictures inside.

Read are the columns of the widely used copies: RefCOCO, + and g with ``question_id, image, answer
(the expressions), segmentation (one flat polygon), bbox (x, y, width, height), iscrowd,
file_name``, and ReasonSeg with ``image, text, mask, image_id``. Rows are read in small batches.

These copies are not the original files: one polygon per object is kept where COCO has several, so
figures differ slightly from those on the original files.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample, Rle, need_extra
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.masks.coco import segmentation_to_rle
from sam4mllm_tool.types import Box, Mask

BATCH = 16


def parquet_files(data: Path, split: str) -> list[Path]:
    """The split's files, in order; empty if the data set is not in this layout."""
    patterns = (f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}/*.parquet")
    return next((found for p in patterns if (found := sorted(data.glob(p)))), [])


def examples(
    files: list[Path], dataset: str, split: str, protocol: Protocol = OURS
) -> Iterator[ReferringExample]:
    """The rows in order, one record each; a row whose picture is broken gives one with a ``fault``.

    Raises:
        DatasetError: a column is missing, or a cell is not as described above.
    """
    if protocol.size != "own" or protocol.sentence == "raw" or protocol.crowds != "keep":
        raise DatasetError(
            f"the hub's copy of {dataset} cannot be evaluated by protocol {protocol.name}",
            hint="It lacks raw sentences and whole polygons: use the original files.",
        )
    parquet = need_extra("pyarrow.parquet")
    number = 0
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
            for row in batch.to_pylist():
                try:
                    yield _record(row, dataset, split, number, protocol)
                except OSError as error:
                    fault = DatasetError(f"{file}, row {number}: the picture is broken: {error}")
                    yield ReferringExample.unreadable(dataset, split, f"row {number}", fault)
                except (KeyError, TypeError, ValueError) as error:
                    raise DatasetError(
                        f"{file}, row {number} is not in the known layout: {error!r}",
                        hint="Use the original files, or a copy with the columns in the docs.",
                    ) from error
                number += 1


def _record(
    row: dict[str, Any], dataset: str, split: str, number: int, protocol: Protocol
) -> ReferringExample:
    picture: bytes = row["image"]["bytes"]
    with Image.open(BytesIO(picture)) as opened:
        width, height = opened.size
    if "mask" in row:
        mask = Mask(np.array(row["mask"], dtype=bool))
        rle, box = mask.to_rle(), mask.box
        texts = row["text"]
    else:
        rle = _flat_rle(row["segmentation"], width, height)
        x, y, box_width, box_height = row["bbox"]
        box = Box(x, y, x + box_width, y + box_height)
        texts = row["answer"]
    expressions = (texts,) if isinstance(texts, str) else tuple(texts)
    if protocol.sentence == "lower":
        expressions = tuple(text.strip().lower() for text in expressions)
    image_id = row.get("image_id") or row.get("file_name") or number
    return ReferringExample(
        dataset=dataset,
        split=split,
        example_id=str(row.get("question_id") or number),
        image_id=_without_annotation(str(image_id)),
        image=picture,
        expressions=expressions,
        masks=(rle,) if box else (),
        boxes=(box,) if box else (),
        exif=protocol.exif,
        decides=protocol.no_target == "statement",
    )


def _flat_rle(numbers: list[float], width: int, height: int) -> Rle:
    """One polygon, or run lengths (which fill the picture exactly)."""
    if sum(numbers) == width * height and all(n == int(n) for n in numbers):
        return segmentation_to_rle(
            {"size": [height, width], "counts": [int(n) for n in numbers]}, width, height
        )
    return segmentation_to_rle([numbers], width, height)


def _without_annotation(file_name: str) -> str:
    """``COCO_train2014_000000581857_16.jpg`` names picture 581857 and annotation 16."""
    parts = file_name.removesuffix(".jpg").split("_")
    return "_".join(parts[:3]) if len(parts) == 4 and parts[0] == "COCO" else file_name
