"""How much do masks change when a segmenter's image encoder runs in bfloat16?

Run ``python -m benchmarks.sam_precision [--sam …] [--decoder …] [--device …] [--limit N]``.
Objects of held-out scenes are drawn from true boxes and points, with the encoder in float32 and in
bfloat16. ``same`` is the IoU of the two masks, the others the IoU of each with the truth.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sam4mllm_tool.evaluation.sam_prompts import true_prompts
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.pipeline.steps import choose_mask
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import SAM_WORLD
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.types import Mask, RgbImage

CONDITIONS = ("box", "box_5_points", "jittered_box", "one_point")
MIN_PIXELS = 100  # objects that show less are not counted


def masks(
    segmenter: Segmenter, scene: Scene, prompts: list[SegmentPrompt]
) -> tuple[list[Mask], float]:
    """The chosen mask of each prompt, and the seconds that the image embedding took."""
    image = RgbImage.from_pil(scene.image)
    start = time.perf_counter()
    segmenter.embed(image)
    seconds = time.perf_counter() - start
    found = segmenter.predict(image, prompts)
    chosen = [choose_mask(some, p.points) for some, p in zip(found, prompts, strict=True)]
    return [one.mask for one in chosen], seconds


def measure(exact: Segmenter, rough: Segmenter, seed: int, limit: int) -> dict[str, Any]:
    """IoUs by condition over ``limit`` scenes, and the median time of an embedding."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONDITIONS}
    times: list[tuple[float, float]] = []
    for index in track(range(limit), description="scenes", transient=True):
        scene = render_scene(SAM_WORLD, "test", index, seed)
        rng = np.random.default_rng((seed, index))
        things = [thing for thing in scene.objects if thing.mask.sum() >= MIN_PIXELS]
        asked = [(name, thing, true_prompts(thing, rng)[name]) for thing in things
                 for name in CONDITIONS]  # fmt: skip
        prompts = [prompt for _, _, prompt in asked]
        (ones, slow), (others, fast) = (masks(s, scene, prompts) for s in (exact, rough))
        times.append((slow, fast))
        for (name, thing, _), one, other in zip(asked, ones, others, strict=True):
            truth = Mask(thing.mask)
            ious = mask_iou(one, other), mask_iou(one, truth), mask_iou(other, truth)
            found[name].append(ious)
    report: dict[str, Any] = {"embedding_seconds": np.median(times, axis=0).tolist()}
    for name, rows in found.items():
        values = np.array(rows)
        report[name] = {
            "objects": len(values),
            "same": float(values[:, 0].mean()),
            "same_worst_percent": float(np.quantile(values[:, 0], 0.01)),
            "float32": float(values[:, 1].mean()),
            "bfloat16": float(values[:, 2].mean()),
        }
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sam", default="embedded")
    parser.add_argument("--decoder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    exact, rough = (
        load_segmenter(options.sam, decoder=options.decoder, device=options.device, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    report = measure(exact, rough, options.seed, options.limit)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    slow, fast = (1000 * seconds for seconds in report.pop("embedding_seconds"))
    table = Table(title=f"embedding {slow:.0f} ms in float32, {fast:.0f} ms in bfloat16")
    for column in ("prompt", "objects", "same", "worst 1%", "float32", "bfloat16"):
        table.add_column(column)
    for name, row in report.items():
        count, *ious = row.values()
        table.add_row(name, str(count), *(f"{iou:.4f}" for iou in ious))
    Console().print(table)


if __name__ == "__main__":
    main()
