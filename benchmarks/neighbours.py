"""Does round 2 tell the thing asked about from its neighbours? Points well inside, true boxes.

    python -m benchmarks.neighbours --world small-overlap --seed 900
    python -m benchmarks.neighbours --world small-overlap --seed 900 --alone

The true box is stated as round 1's reply, so that a wrong box is not counted against the points;
a 3 × 3 grid over it is asked about, and those of its points are judged that lie at least 4 px
inside some object. ``--alone`` asks about each point in a question of its own, as a probe of a
single point does. "Yes and no" is the probability that these two words have together, on average.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

import numpy as np
from rich.progress import track
from scipy.ndimage import distance_transform_edt

from sam4mllm_tool.pipeline.model import Sam4MLLM, load
from sam4mllm_tool.pipeline.points import grid_points
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import WORLDS
from sam4mllm_tool.types import Box, RgbImage

DEPTH = 4
"""Pixels from its outline from which a point lies well inside an object."""
Answers = dict[str, list[bool]]


def ask(model: Sam4MLLM, scene: Scene, alone: bool, answers: Answers, shares: list[float]) -> None:
    """Round 2 about each object of a scene; whether the answers are right, by what lies there."""
    image = RgbImage.from_pil(scene.image)
    depths = np.stack(
        [distance_transform_edt(np.pad(o.mask, 1))[1:-1, 1:-1] for o in scene.objects]
    )
    texts = expressions(scene, random.Random(1))
    for number, thing in enumerate(scene.objects):
        named = [e.text for e in texts if e.targets == (number,)]
        if not named:
            continue
        box = Box(*thing.box)
        points = grid_points(box, 9)
        location = model.stated(image, named[0], box)
        lists = [[point] for point in points] if alone else [points]
        found = [one for some in lists for one in model.check_points(image, location, box, some)]
        for point, answer in zip(points, found, strict=True):
            here = depths[:, int(point.y), int(point.x)]
            if here.max() < DEPTH:
                continue
            on = int(here.argmax()) == number
            assert answer.p_yes is not None and answer.p_no is not None
            shares.append(answer.p_yes + answer.p_no)
            answers["target" if on else "other object"].append((answer.p_yes > answer.p_no) == on)


def main() -> None:
    """Print the share of right answers on the target and on other objects."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="small-overlap", choices=sorted(WORLDS))
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--scenes", type=int, default=110)
    parser.add_argument("--mllm", default="embedded")
    parser.add_argument("--alone", action="store_true", help="one question per point")
    options = parser.parse_args()
    model, answers, shares = load(options.mllm), defaultdict[str, list[bool]](list), list[float]()
    for index in track(range(options.scenes), options.world):
        scene = render_scene(WORLDS[options.world], "test", index, options.seed)
        ask(model, scene, options.alone, answers, shares)
    for place, right in sorted(answers.items()):
        print(f"{place}: {np.mean(right):.3f} of {len(right)}")
    print(f"yes and no: {np.mean(shares):.3f}")


if __name__ == "__main__":
    main()
