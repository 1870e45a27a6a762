"""Synthetic scenes as a referring data set, for the dialogues."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

from sam4mllm_tool.datasets.record import ReferringExample
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import World
from sam4mllm_tool.types import Box, Mask, TargetCount


def scene_examples(
    world: World, split: str, seed: int, count: int, first: int = 0
) -> Iterator[ReferringExample]:
    """The expressions of ``count`` scenes of a split, one record per expression.

    A single target is asked with ``1``, several with ``1+``, none with ``0+``.
    """
    counts = {0: TargetCount.ZERO_OR_MORE, 1: TargetCount.ONE}
    for index in range(first, first + count):
        scene = render_scene(world, split, index, seed)
        stream = io.BytesIO()
        scene.image.save(stream, "PNG", compress_level=1)
        masks = [Mask(thing.mask).to_rle() for thing in scene.objects]
        for number, found in enumerate(expressions(scene, random.Random(f"{seed}/{index}"))):
            yield ReferringExample(
                dataset=f"scenes-{world.name}",
                split=split,
                example_id=f"{index}:{number}",
                image_id=f"{world.name}-{index}",
                image=stream.getvalue(),
                expressions=(found.text,),
                masks=tuple(masks[target] for target in found.targets),
                boxes=tuple(Box(*scene.objects[target].box) for target in found.targets),
                count=counts.get(len(found.targets), TargetCount.ONE_OR_MORE),
                kind=found.kind,
                neighbours=tuple(m for n, m in enumerate(masks) if n not in found.targets),
            )
