"""Refine a mask with points: give SAM the point it got most wrong, and look again.

An agent would find such points with ``is_point_inside_object`` or by looking at the overlay; here
the truth is known, because the picture is a generated scene.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt

from sam4mllm_tool import Mask, Sam4MLLM, Toolbox
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD

ROUNDS = 4


def worst_point(mask: Mask, truth: Mask) -> dict[str, object]:
    """The middle of the largest mistake, with its true label."""
    wrong = mask.pixels != truth.pixels
    depth = distance_transform_edt(np.pad(wrong, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    label = "foreground" if truth.pixels[row, column] else "background"
    return {"x": float(column) + 0.5, "y": float(row) + 0.5, "label": label}


def main() -> None:
    """Draw from a rough box, then refine."""
    scene = render_scene(SMALL_WORLD, "test", 12, seed=1)  # an umbrella, hard to draw at once
    target = scene.objects[0]
    truth = Mask(target.mask)
    toolbox = Toolbox(Sam4MLLM.from_pretrained)
    image = toolbox.workspace.open_image(scene.image).image_id

    # A box that is too large on every side, as a hasty agent would give it.
    left, top, right, bottom = target.box
    box = [max(0, left - 25), max(0, top - 25), min(scene.image.width, right + 25),
           min(scene.image.height, bottom + 25)]  # fmt: skip
    output = toolbox.call("segment_with_prompts", {"image": image, "box": box})
    handles, qualities = [], []
    for number in range(ROUNDS + 1):
        ((object_id, mask),) = output.masks.items()
        handles.append(object_id)
        qualities.append(mask_iou(mask, truth))
        print(f"{object_id}: IoU with the truth {qualities[-1]:.3f}")
        if number < ROUNDS:
            output = toolbox.call(
                "segment_with_prompts",
                {"object_id": object_id, "points": [worst_point(mask, truth)]},
            )

    assert len(set(handles)) == ROUNDS + 1  # every step is kept …
    first = toolbox.workspace.object(handles[0]).mask
    assert first is not None
    assert mask_iou(first, truth) == qualities[0]  # … unchanged
    assert max(qualities[1:]) > qualities[0]
    print(f"points improved the mask by {max(qualities) - qualities[0]:.3f}")


if __name__ == "__main__":
    main()
