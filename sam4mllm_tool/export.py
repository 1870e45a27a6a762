"""Masks as files and as other libraries' values: PNG, COCO JSON, polygons, overlays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam4mllm_tool.access import ImagePolicy, safe_output_path
from sam4mllm_tool.errors import AccessDenied
from sam4mllm_tool.polygons import mask_to_polygons
from sam4mllm_tool.render import overlay_masks
from sam4mllm_tool.types import Mask
from sam4mllm_tool.workspace import ImageRecord, ObjectRecord


def coco_document(
    record: ImageRecord, objects: Sequence[ObjectRecord], *, polygons: bool = False
) -> dict[str, Any]:
    """A COCO JSON document of one image: a category a name, an annotation a mask.

    Both forms are exact; see :mod:`sam4mllm_tool.polygons` for masks with holes.
    """
    names = list(dict.fromkeys(one.name for one in objects))
    annotations = []
    for number, one in enumerate(objects, 1):
        mask = one.mask or Mask(np.zeros((record.image.height, record.image.width), bool))
        box = mask.box
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": names.index(one.name) + 1,
                "segmentation": mask_to_polygons(mask) if polygons else mask.to_rle(),
                "area": mask.area,
                "bbox": [box.x_min, box.y_min, box.width, box.height] if box else [0, 0, 0, 0],
                "iscrowd": 0,
                "object_id": one.object_id,
            }
        )
    name = Path(record.source).name if record.source else record.image_id
    return {
        "images": [
            {
                "id": 1,
                "file_name": name,
                "width": record.image.width,
                "height": record.image.height,
            }
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
        "annotations": annotations,
    }


def save_files(
    record: ImageRecord,
    objects: Sequence[ObjectRecord],
    folder: str | Path,
    formats: Sequence[str],
    policy: ImagePolicy,
) -> list[Path]:
    """Write the objects' masks; returns the paths. Existing files of the same name are replaced.

    Raises:
        AccessDenied: the folder may not be written to.
    """
    files = []

    def target(name: str) -> Path:
        path = safe_output_path(folder, name, policy)
        files.append(path)
        return path

    try:
        if "png" in formats:
            for one in objects:
                if one.mask is not None:
                    one.mask.to_pil().save(target(f"{record.image_id}_{one.object_id}.png"))
        for kind in ("coco_rle", "coco_polygons"):
            if kind in formats:
                document = coco_document(record, objects, polygons=kind == "coco_polygons")
                path = target(f"{record.image_id}_{kind}.json")
                path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        if "overlay" in formats:
            masks = {n: one.mask for n, one in enumerate(objects, 1) if one.mask is not None}
            overlay_masks(record.image, masks).save(target(f"{record.image_id}_overlay.png"))
    except OSError as error:
        raise AccessDenied(
            f"cannot write to {folder}: {error.strerror or error}",
            hint="Choose a folder with free space that you may write to.",
        ) from error
    return files
