"""Checks of what comes out: boxes and points on drawn scenes, SAM on a planted blob."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sam4mllm_tool.checkup.findings import Finding, graded
from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD
from sam4mllm_tool.types import Box, Mask, Point, RgbImage

SEED = 77_000
SIDE = 336  # pixels; what LLaVA sees, and enough for every family


@dataclass(frozen=True)
class DrawnCase:
    """A scene, plain words for one thing in it, and where that is."""

    image: RgbImage
    expression: str
    mask: Mask

    @property
    def box(self) -> Box:
        """The thing's tight box."""
        assert self.mask.box is not None
        return self.mask.box


def drawn_cases(count: int) -> Iterator[DrawnCase]:
    """Scenes with something that a colour and a name single out ("the red star")."""
    index = 0
    while count:
        scene = render_scene(SMALL_WORLD, "test", index, SEED, size=(SIDE, SIDE))
        index += 1
        plain = [
            one for one in expressions(scene, random.Random(index))
            if one.kind in ("colour", "category") and len(one.targets) == 1
        ]  # fmt: skip
        if plain:
            mask = Mask(scene.objects[plain[0].targets[0]].mask)
            yield DrawnCase(RgbImage.from_pil(scene.image), plain[0].text, mask)
            count -= 1


def dialogue_findings(model: Sam4MLLM, count: int = 20) -> Iterator[Finding]:
    """Replies that parse, boxes that are right, points that are answered right."""
    begun = time.perf_counter()
    read, found, right, points = 0, 0, 0, 0
    for case in drawn_cases(count):
        try:
            location = model.locate(case.image, case.expression)
            read += 1
        except DialogueError:
            continue
        found += any(box_iou(one.box, case.box) >= 0.5 for one in location.objects)
        stated = model.stated(case.image, case.expression, case.box)
        inside, outside = _two_points(case)
        answers = model.check_points(case.image, stated, case.box, [inside, outside])
        right += sum((a.p_yes or 0) > (a.p_no or 0) for a in answers[:1])
        right += sum((a.p_no or 0) > (a.p_yes or 0) for a in answers[1:])
        points += len(answers)
    seconds = (time.perf_counter() - begun) / count
    yield graded(
        "replies can be read", read / count, good=0.95, bad=0.6,
        detail=f"{read} of {count}, {seconds:.1f} s per scene",
        advice="Try another --format, and see that the chat template is the checkpoint's own.",
    )  # fmt: skip
    yield graded(
        "boxes of drawn things", found / count, good=0.6, bad=0.25,
        detail=f"{found} of {count} right (IoU of at least 0.5) for words like 'the red star'",
        advice="A vision-language model can do these: check --format (whose coordinates?), the "
        "template and the adapter.",
    )  # fmt: skip
    share = right / max(points, 1)
    reversed_advice = "Answers are reversed: yes and no are swapped in format or tokenizer."
    yield graded(
        "points on and off them", share, good=0.75, bad=0.55,
        detail=f"{right} of {points} answered right",
        advice=reversed_advice if share < 0.35 else "Points are guessed: use --strategy box_only, "
        "or a checkpoint trained on this dialogue.",
    )  # fmt: skip


def _two_points(case: DrawnCase) -> tuple[Point, Point]:
    """A point deep inside the thing, and one of its box (or beside it) that is off it."""
    from scipy.ndimage import distance_transform_edt

    def deepest(pixels: np.ndarray) -> Point:
        row, column = np.unravel_index(int(distance_transform_edt(pixels).argmax()), pixels.shape)
        return Point(float(column) + 0.5, float(row) + 0.5)

    return deepest(np.pad(case.mask.pixels, 1)[1:-1, 1:-1]), deepest(~case.mask.pixels)


def segmenter_findings(segmenter: Segmenter) -> Iterator[Finding]:
    """An ellipse on plain ground, away from the diagonal: from its box, and from one point."""
    picture = Image.new("RGB", (400, 260), (40, 60, 90))
    ImageDraw.Draw(picture).ellipse((210, 30, 340, 130), fill=(230, 160, 40))
    image = RgbImage.from_pil(picture)
    truth = Mask(image.array[..., 0] > 128)
    begun = time.perf_counter()
    (from_box,) = segmenter.predict(image, [SegmentPrompt(truth.box)])
    seconds = time.perf_counter() - begun
    best = max(from_box, key=lambda candidate: candidate.predicted_iou)
    overlap = mask_iou(best.mask, truth)
    yield graded(
        "SAM draws a planted ellipse", overlap, good=0.85, bad=0.6,
        detail=f"IoU {overlap:.2f} from its box, {seconds:.1f} s",
        advice="The segmenter's weights do not belong to its architecture, or its dtype is too "
        "coarse: check --sam and --sam-decoder.",
    )  # fmt: skip
    values = [candidate.predicted_iou for candidate in from_box]
    sane = all(np.isfinite(v) and -0.5 <= v <= 1.5 for v in values)
    if not sane:
        yield Finding("SAM's own estimates", "fail", f"predicted IoUs {values}", "Check --sam.")
