"""The measured part of a small SAM's model card: tables, and a picture of typical cases.

::

    python -m recipes.embedded_sam.card sam4mllm_tool/embedded/sam --seed 0

measures the checkpoint, writes `evaluation.json` and `cases.png` beside it, and replaces the text
between the two marks in its `README.md`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sam4mllm_tool.evaluation.sam import (
    MIN_PIXELS,
    SamReport,
    Score,
    bars,
    best,
    evaluate_sam,
    time_segmenter,
)
from sam4mllm_tool.evaluation.sam_prompts import Bools, conditions, true_prompts
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import SAM_WORLD
from sam4mllm_tool.segmenter.segment_anything import SegmentAnythingSegmenter
from sam4mllm_tool.types import Mask, PointLabel, RgbImage

MARKS = ("<!-- measured -->", "<!-- /measured -->")
CASES = 6  # of each of best, median, worst
TILE = 128  # pixels
SCENES = 60


def tables(report: SamReport) -> str:
    """The report as Markdown: mIoU by prompt and subset, rounds, calibration, time, bars."""
    trained, held_out = report.trained_categories, report.held_out_categories
    subsets = list(trained)
    lines = [
        f"mIoU with 95% intervals (bootstrap over scenes); seed {report.seed}, test split.",
        "",
        "| prompt | " + " | ".join(subsets) + " | held-out categories |",
        "|---" * (len(subsets) + 2) + "|",
        "| objects | "
        + " | ".join(str(trained[subset]["box"].objects) for subset in subsets)
        + f" | {held_out['all']['box'].objects} |",
    ]
    for name in conditions():
        cells = [_plain(trained[subset][name]) for subset in subsets[1:]]
        row = [_with_interval(trained["all"][name]), *cells, _with_interval(held_out["all"][name])]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(row) + " |")
    rounds = " → ".join(_plain(one) for one in report.rounds)
    quality = report.calibration
    lines += [
        "",
        f"Interactive rounds (box, then one point from the error region and the mask fed back): "
        f"{rounds}.",
        "",
        f"Predicted IoU: mean absolute error {quality['mean_absolute_error']:.3f}, bias "
        f"{quality['bias']:+.3f}, correlation {quality['correlation']:.2f}.",
        "",
        f"{report.threads} CPU thread(s): {report.encode_ms:.0f} ms per picture, "
        f"{report.decode_ms:.1f} ms per prompt.",
        "",
        "| measure | figure | target | reached |",
        "|---|---|---|---|",
    ]
    for name, entry in bars(report).items():
        reached = "yes" if entry["reached"] else "no"
        lines.append(f"| {name} | {entry['value']:.3f} | {entry['bar']:g} | {reached} |")
    return "\n".join(lines)


def case_sheet(segmenter: Segmenter, seed: int) -> Image.Image:
    """Best, median and worst box-and-10-points cases of the first test scenes, a row each.

    A case shows the picture with box and points above, the mask over the dimmed picture below:
    green where it is right, red where it is too much, blue where it is missing.
    """
    cases = []
    for index in range(SCENES):
        scene = render_scene(SAM_WORLD, "test", index, seed)
        image = RgbImage.from_pil(scene.image)
        rng = np.random.default_rng((seed, index))
        for thing in scene.objects:
            if thing.area >= MIN_PIXELS:
                prompt = true_prompts(thing, rng)["box_10_points"]
                drawn = best(segmenter.predict(image, [prompt])[0]).mask
                iou = mask_iou(drawn, Mask(thing.mask))
                cases.append((iou, scene.image, prompt, drawn.pixels, thing.mask))
    cases.sort(key=lambda case: -case[0])
    middle = len(cases) // 2 - CASES // 2
    rows = (cases[:CASES], cases[middle : middle + CASES], cases[-CASES:])
    sheet = Image.new("RGB", (CASES * TILE, 3 * (2 * TILE + 14)), "white")
    for row, chosen in enumerate(rows):
        for column, (iou, picture, prompt, answer, truth) in enumerate(chosen):
            x, y = column * TILE, row * (2 * TILE + 14)
            sheet.paste(_prompted(picture, prompt).resize((TILE, TILE)), (x, y + 14))
            judged = _judged(picture, answer, truth).resize((TILE, TILE))
            sheet.paste(judged, (x, y + 14 + TILE))
            text = f"{('best', 'median', 'worst')[row]}: IoU {iou:.2f}"
            ImageDraw.Draw(sheet).text((x + 2, y), text, "black", ImageFont.load_default(11))
    return sheet.quantize(128, dither=Image.Dither.NONE)


def _prompted(picture: Image.Image, prompt: SegmentPrompt) -> Image.Image:
    shown = picture.copy()
    draw = ImageDraw.Draw(shown)
    if prompt.box is not None:
        draw.rectangle(tuple(prompt.box), outline="yellow", width=2)
    for point in prompt.points:
        fill = "lime" if point.label is PointLabel.FOREGROUND else "red"
        draw.ellipse([point.x - 4, point.y - 4, point.x + 4, point.y + 4], fill, "black")
    return shown


def _judged(picture: Image.Image, found: Bools, truth: Bools) -> Image.Image:
    pixels = np.asarray(picture, dtype=float) * 0.4
    for region, colour in (
        (found & truth, (0, 200, 0)),
        (found & ~truth, (230, 0, 0)),
        (truth & ~found, (40, 80, 255)),
    ):
        pixels[region] = 0.4 * pixels[region] + 0.6 * np.array(colour)
    return Image.fromarray(pixels.astype(np.uint8))


def _plain(score: Score) -> str:
    return f"{score.mean:.3f}"


def _with_interval(score: Score) -> str:
    return f"{score.mean:.3f} ({score.low:.3f}–{score.high:.3f})"


def write_card(directory: Path, seed: int, objects: int) -> SamReport:
    """Measure the checkpoint in `directory` and bring its card up to date."""
    torch.set_num_threads(1)  # a second one waits for the first on a busy machine
    segmenter = SegmentAnythingSegmenter.from_pretrained(directory, device="cpu")
    report = evaluate_sam(segmenter, seed=seed, objects=objects)
    torch.set_num_threads(2)  # which the bars of the times speak of
    fresh = SegmentAnythingSegmenter.from_pretrained(directory, device="cpu")  # nothing kept yet
    report.encode_ms, report.decode_ms = time_segmenter(fresh, seed)
    report.threads = 2
    (directory / "evaluation.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
    case_sheet(segmenter, seed).save(directory / "cases.png", optimize=True)
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    measured = f"{MARKS[0]}\n{tables(report)}\n{MARKS[1]}"
    card.write_text(before + measured + after, encoding="utf-8")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure a small SAM and update its card.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objects", type=int, default=500)
    arguments = parser.parse_args()
    write_card(arguments.directory, arguments.seed, arguments.objects)
