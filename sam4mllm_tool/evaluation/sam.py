"""How well a segmenter of the SAM kind draws objects from true boxes and points.

`sam4mllm-tool eval sam --seed N --json` calls `evaluate_sam` with the embedded small SAM; any other
`Segmenter` is measured the same way. Scenes come from the test split: of the world the small SAM
was trained on, and of the held-out one, whose categories and sprites no training has seen.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap

from sam4mllm_tool.evaluation.sam_prompts import conditions, error_point, true_prompts
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.protocols import MaskCandidate, Segmenter, SegmentPrompt
from sam4mllm_tool.scenes.render import SceneObject, render_scene
from sam4mllm_tool.scenes.world import HELD_OUT_WORLD, SAM_WORLD, World
from sam4mllm_tool.types import Mask, RgbImage

MIN_PIXELS = 100  # objects that show less are not counted
ROUNDS = 4  # interactive rounds, each with one more point from the error region
RESAMPLES = 1000
SUBSETS = ("all", "occluded", "nested", "concave", "thin", "hard")


@dataclass(frozen=True)
class Score:
    """A mean with its 95% confidence interval (bootstrap over scenes) and number of objects."""

    mean: float
    low: float
    high: float
    objects: int


@dataclass(frozen=True)
class Measured:
    """One object: which scene, which subsets, and IoU by condition and by interactive round."""

    scene: int
    subsets: frozenset[str]
    iou: dict[str, float]
    rounds: tuple[float, ...]
    predicted: tuple[tuple[float, float], ...]


@dataclass
class SamReport:
    """Everything `eval sam` measures.

    Attributes:
        trained_categories: mIoU by subset and condition, on categories seen in training.
        held_out_categories: the same on held-out categories and sprites.
        rounds: mIoU after each interactive round: box, then one error point more each.
        calibration: of the predicted IoU: mean absolute error, bias, correlation.
        encode_ms, decode_ms: median time to embed a picture, and to answer one prompt.
        threads: CPU threads they were measured with.
    """

    segmenter: str
    seed: int
    trained_categories: dict[str, dict[str, Score]] = field(default_factory=dict)
    held_out_categories: dict[str, dict[str, Score]] = field(default_factory=dict)
    rounds: list[Score] = field(default_factory=list)
    calibration: dict[str, float] = field(default_factory=dict)
    encode_ms: float = 0.0
    decode_ms: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, with the targets and whether they are reached."""
        return asdict(self) | {"bars": bars(self)}


def evaluate_sam(
    segmenter: Segmenter, *, seed: int = 0, objects: int = 500, world: World = SAM_WORLD
) -> SamReport:
    """Measure a segmenter on at least `objects` objects of trained and of held-out categories.

    The latter are those of `HELD_OUT_WORLD`, composed as in `world`.
    """
    held_out_world = replace(
        HELD_OUT_WORLD, objects=world.objects, size=world.size, min_visible=world.min_visible
    )
    trained = measure_world(segmenter, world, seed, objects)
    held_out = measure_world(segmenter, held_out_world, seed, objects)
    report = SamReport(segmenter.name, seed)
    report.trained_categories = summarise(trained)
    report.held_out_categories = summarise(held_out)
    report.rounds = [
        score([(one.scene, one.rounds[number]) for one in trained]) for number in range(ROUNDS)
    ]
    report.calibration = calibration([pair for one in trained for pair in one.predicted])
    report.encode_ms, report.decode_ms = time_segmenter(segmenter, seed)
    return report


def measure_world(segmenter: Segmenter, world: World, seed: int, objects: int) -> list[Measured]:
    """Measure every object of as many test scenes as are needed for `objects` objects."""
    measured: list[Measured] = []
    index = 0
    while len(measured) < objects:
        scene = render_scene(world, "test", index, seed)
        image = RgbImage.from_pil(scene.image)
        rng = np.random.default_rng((seed, index))
        for thing in scene.objects:
            if thing.area >= MIN_PIXELS:
                measured.append(measure_object(segmenter, image, thing, index, rng))
        index += 1
    return measured


def measure_object(
    segmenter: Segmenter, image: RgbImage, thing: SceneObject, scene: int, rng: np.random.Generator
) -> Measured:
    """Answer every kind of prompt for one object, then play the interactive rounds."""
    prompts = true_prompts(thing, rng)
    answers = segmenter.predict(image, list(prompts.values()))
    chosen = [best(candidates) for candidates in answers]
    iou = {
        name: mask_iou(candidate.mask, Mask(thing.mask))
        for name, candidate in zip(prompts, chosen, strict=True)
    }
    predicted = tuple(
        (candidate.predicted_iou, value)
        for candidate, value in zip(chosen, iou.values(), strict=True)
    )
    rounds = interact(segmenter, image, thing, prompts["box"])
    return Measured(scene, subsets(thing), iou, rounds, predicted)


def interact(
    segmenter: Segmenter, image: RgbImage, thing: SceneObject, prompt: SegmentPrompt
) -> tuple[float, ...]:
    """IoU by round: the prompt alone, then each time with an error point and the former mask."""
    values: list[float] = []
    for _ in range(ROUNDS):
        (candidates,) = segmenter.predict(image, [prompt])
        answer = best(candidates)
        values.append(mask_iou(answer.mask, Mask(thing.mask)))
        point = error_point(answer.mask.pixels, thing.mask)
        if point is not None:
            prompt = SegmentPrompt(prompt.box, (*prompt.points, point), answer.logits)
    return tuple(values)


def best(candidates: Sequence[MaskCandidate]) -> MaskCandidate:
    """The candidate that the segmenter itself scores highest."""
    return max(candidates, key=lambda candidate: candidate.predicted_iou)


def subsets(thing: SceneObject) -> frozenset[str]:
    """Which subsets an object belongs to; `hard` is occluded, nested or concave."""
    flags = {name: getattr(thing, name) for name in ("occluded", "nested", "concave", "thin")}
    hard = flags["occluded"] or flags["nested"] or flags["concave"]
    return frozenset(["all", *(name for name, flag in flags.items() if flag), *["hard"] * hard])


def summarise(measured: Sequence[Measured]) -> dict[str, dict[str, Score]]:
    """Scores by subset and condition; subsets without objects are left out."""
    summary = {}
    for subset in SUBSETS:
        members = [one for one in measured if subset in one.subsets]
        if members:
            summary[subset] = {
                name: score([(one.scene, one.iou[name]) for one in members])
                for name in conditions()
            }
    return summary


def score(values: Iterable[tuple[int, float]]) -> Score:
    """Mean and 95% interval of (scene, value) pairs; whole scenes are resampled."""
    by_scene: dict[int, list[float]] = defaultdict(list)
    for scene, value in values:
        by_scene[scene].append(value)
    sums = np.array([sum(found) for found in by_scene.values()])
    counts = np.array([len(found) for found in by_scene.values()])
    mean = _ratio(sums, counts)
    if len(sums) < 2:
        return Score(float(mean), float(mean), float(mean), int(counts.sum()))
    low, high = bootstrap(
        (sums, counts), _ratio, paired=True, vectorized=True, n_resamples=RESAMPLES,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Score(float(mean), float(low), float(high), int(counts.sum()))


def _ratio(sums: NDArray[Any], counts: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    return np.asarray(sums.sum(axis=axis) / counts.sum(axis=axis))


def calibration(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How the predicted IoU agrees with the real one, over (predicted, real) pairs."""
    predicted, real = np.array(pairs).T
    constant = predicted.std() == 0 or real.std() == 0
    return {
        "mean_absolute_error": float(np.abs(predicted - real).mean()),
        "bias": float((predicted - real).mean()),
        "correlation": 0.0 if constant else float(np.corrcoef(predicted, real)[0, 1]),
        "prompts": float(len(pairs)),
    }


def time_segmenter(segmenter: Segmenter, seed: int, pictures: int = 12) -> tuple[float, float]:
    """Median milliseconds to embed a fresh picture, and to answer one box-and-points prompt."""
    encode, decode = [], []
    for index in range(pictures):
        scene = render_scene(SAM_WORLD, "val", index, seed)
        image = RgbImage.from_pil(scene.image)
        thing = scene.objects[0]
        prompt = true_prompts(thing, np.random.default_rng(index))["box_10_points"]
        start = time.perf_counter()
        segmenter.embed(image)
        middle = time.perf_counter()
        segmenter.predict(image, [prompt])
        encode.append(middle - start)
        decode.append(time.perf_counter() - middle)
    return 1000 * float(np.median(encode)), 1000 * float(np.median(decode))


def bars(report: SamReport) -> dict[str, dict[str, float | bool]]:
    """The targets set for the small SAM: each figure, its bar, and whether it is reached."""
    trained, held_out = report.trained_categories, report.held_out_categories
    everything, hard = trained["all"], trained["hard"]
    steps = [after.mean - before.mean for before, after in pairwise(report.rounds)]
    at_least = {
        "box only": (everything["box"].mean, 0.82),
        "box and 10 points": (everything["box_10_points"].mean, 0.87),
        "gain of 10 points on hard objects": (
            hard["box_10_points"].mean - hard["box"].mean,
            0.06,
        ),
        "one point without box": (everything["one_point"].mean, 0.65),
        "smallest gain of a round": (min(steps), 0.0),
    }
    at_most = {
        "loss on held-out categories": (
            everything["box"].mean - held_out["all"]["box"].mean,
            0.04,
        ),
        "loss by 10% wrong labels": (
            everything["box_10_points"].mean - everything["box_10_points_wrong_labels"].mean,
            0.03,
        ),
        "encode ms": (report.encode_ms, 200.0),
        "decode ms": (report.decode_ms, 25.0),
    }
    reached = {
        name: {"value": value, "bar": bar, "reached": value >= bar}
        for name, (value, bar) in at_least.items()
    }
    return reached | {
        name: {"value": value, "bar": bar, "reached": value <= bar}
        for name, (value, bar) in at_most.items()
    }
