"""Does it help if confident points can overrule SAM's own choice among its three masks?

Run ``python -m benchmarks.mask_choice [--seed N] [--limit M] [--sam …] [--json]``. For objects of
held-out scenes, PQPP's box and answered points are given to SAM once; both rules choose among the
same three masks, so the comparison is paired. ``oracle`` is the best of the three.
"""

from __future__ import annotations

import argparse
import json
import random

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.pipeline.model import Sam4MLLM, load
from sam4mllm_tool.pipeline.steps import choose_mask
from sam4mllm_tool.protocols import MaskCandidate, SegmentPrompt
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD
from sam4mllm_tool.types import Mask, RgbImage, TargetCount

RULES = ("predicted_iou", "agreement", "oracle")


def ious(model: Sam4MLLM, scene: Scene, rng: random.Random) -> dict[str, float] | None:
    """IoU under each rule for one single-target expression of the scene."""
    singles = [e for e in expressions(scene, rng) if len(e.targets) == 1]
    if not singles:
        return None
    asked = rng.choice(singles)
    truth = Mask(scene.objects[asked.targets[0]].mask)
    image = RgbImage.from_pil(scene.image)
    location = model.locate(image, asked.text, TargetCount.ONE)
    box = location.objects[0].box
    points = model.check_points(image, location, box)
    candidates = model.segmenter.predict(image, [SegmentPrompt(box, points)])[0]
    chosen: dict[str, MaskCandidate] = {
        "predicted_iou": choose_mask(candidates, points, "predicted_iou"),
        "agreement": choose_mask(candidates, points, "agreement"),
        "oracle": max(candidates, key=lambda c: mask_iou(c.mask, truth)),
    }
    return {rule: mask_iou(found.mask, truth) for rule, found in chosen.items()}


def measure(model: Sam4MLLM, seed: int, limit: int, quiet: bool) -> dict[str, object]:
    """mIoU per rule, and the paired difference with its 95 % bootstrap interval."""
    rng = random.Random(seed)
    rows = []
    for index in track(range(limit), "asking", disable=quiet):
        found = ious(model, render_scene(SMALL_WORLD, "test", index, seed), rng)
        rows += [] if found is None else [[found[rule] for rule in RULES]]
    table = np.array(rows)
    gain = table[:, 1] - table[:, 0]
    draws = np.random.default_rng(seed).choice(gain, (2000, len(gain))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {
        "expressions": len(table),
        "mIoU": {rule: round(float(table[:, n].mean()), 4) for n, rule in enumerate(RULES)},
        "gain": round(float(gain.mean()), 4),
        "gain_95": [round(float(low), 4), round(float(high), 4)],
        "choices_that_differ": round(float((gain != 0).mean()), 4),
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--sam", default="embedded")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(load(segmenter=options.sam), options.seed, options.limit, options.json)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    table = Table(title="Choosing among SAM's masks")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in report.items():
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
