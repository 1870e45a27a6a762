"""A folder of pictures, an expression, one COCO file for them all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from sam4mllm_tool import DialogueError, ImageError, ImagePolicy, Sam4MLLM, Toolbox, Workspace
from sam4mllm_tool.masks.files import masks_to_coco
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD
from sam4mllm_tool.tools.workspace import labelled_masks

PICTURES = 4


def segment_folder(folder: Path, expression: str) -> dict[str, Any]:
    """Mask what ``expression`` means in every picture; pictures that cannot be read are skipped."""
    toolbox = Toolbox(Sam4MLLM.from_pretrained, Workspace(ImagePolicy(allowed_dirs=(folder,))))
    merged: dict[str, Any] = {"images": [], "categories": [], "annotations": []}
    for number, path in enumerate(sorted(folder.iterdir()), 1):
        arguments = {"image": str(path), "expression": expression, "count": "1"}
        try:
            result = toolbox.call("segment_object", arguments).result
        except (ImageError, DialogueError) as error:
            print(f"{path.name}: skipped, {error}")
            continue
        record = toolbox.workspace.image(result.image_id)
        document = masks_to_coco(
            labelled_masks(toolbox.workspace.objects(result.image_id)),
            record.image,
            record.file_name,
        )
        merged["images"] += [{**document["images"][0], "id": number}]
        merged["categories"] = document["categories"]
        first = len(merged["annotations"]) + 1
        merged["annotations"] += [
            {**one, "id": first + n, "image_id": number}
            for n, one in enumerate(document["annotations"])
        ]
        print(f"{path.name}: {len(document['annotations'])} masks")
    return merged


def main() -> None:
    """Make a folder, mask it, read the result with pycocotools."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        for index in range(PICTURES):
            render_scene(SMALL_WORLD, "test", index).image.save(folder / f"scene{index}.png")
        (folder / "notes.txt").write_text("not a picture")

        file = Path(name) / "masks.json"
        file.write_text(json.dumps(segment_folder(folder, "the biggest thing")))
        coco = COCO(file)

    assert len(coco.imgs) == PICTURES
    assert [len(coco.imgToAnns[number]) for number in sorted(coco.imgs)] == [1] * PICTURES
    for annotation in coco.anns.values():
        assert coco.annToMask(annotation).sum() == annotation["area"]


if __name__ == "__main__":
    main()
