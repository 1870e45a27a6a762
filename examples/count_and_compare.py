"""Count and compare: "are there more apples left of the dog than right of it?"

The masks answer the question; no LLM has to count.
"""

from __future__ import annotations

from sam4mllm_tool import Sam4MLLM, Toolbox
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD
from sam4mllm_tool.tools.builtin.compare_objects import ComparisonResult

SCENE = 812  # a dog between two apples


def true_answer(scene: Scene) -> tuple[int, int]:
    """(left, right), by the generator's own objects."""
    (dog,) = [thing for thing in scene.objects if thing.name == "dog"]
    apples = [thing for thing in scene.objects if thing.name == "apple"]
    left = sum(apple.centre[0] < dog.centre[0] for apple in apples)
    return left, len(apples) - left


def main() -> None:
    """Segment, compare, count."""
    scene = render_scene(SMALL_WORLD, "test", SCENE)
    toolbox = Toolbox(Sam4MLLM.from_pretrained)
    image = toolbox.workspace.open_image(scene.image).image_id

    dog = toolbox.call("segment_object", {"image": image, "expression": "the dog", "count": "1"})
    apples = toolbox.call(
        "segment_object", {"image": image, "expression": "all the apples", "count": "1+"}
    )
    (dog_id,) = dog.masks
    left = right = 0
    for apple_id in apples.masks:
        result = toolbox.call("compare_objects", {"object_ids": [apple_id, dog_id]}).result
        assert isinstance(result, ComparisonResult)
        (pair,) = result.pairs
        print(f"{apple_id} is {' and '.join(pair.position) or 'where'} the dog is")
        left += "left_of" in pair.position
        right += "right_of" in pair.position

    more = "yes" if left > right else "no"
    print(f"{left} left of the dog, {right} right of it: {more}")
    assert (left, right) == true_answer(scene)


if __name__ == "__main__":
    main()
