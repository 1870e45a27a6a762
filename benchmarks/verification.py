"""Does verification tell right boxes from wrong ones? And does re-ranking by it find more?

    python -m benchmarks.verification --seed 951 --scenes 20

Of each scene two expressions about one thing and one about nothing that is there. Right boxes: the
true one, and one of IoU .7 to .9 with it. Wrong ones: another object's, one of IoU .1 to .4, and
any object's for the expression about nothing. Reported is the area under the ROC curve of each way
of verifying, and of the IoU with the model's own first box; then the share of expressions whose box
has an IoU of at least .5, for the first box and for the surest of it and its alternates. Intervals
are 95 % by bootstrap over pictures.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track
from scipy.stats import rankdata

from sam4mllm_tool.geometry import box_iou, clip_box
from sam4mllm_tool.pipeline.model import Sam4MLLM, load
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import WORLDS
from sam4mllm_tool.types import Box, RgbImage

MEASURED = ("small", "small-overlap", "small-look-alike")
SPREADS = (0.1, 0.2, 0.3, 0.5)
ALTERNATES = 5


@dataclass(frozen=True)
class Judged:
    """A box to verify, and what each way of verifying says.

    Attributes:
        picture: world and number of the scene.
        box: what kind of box it is.
        scores: by way.
    """

    picture: str
    box: str
    right: bool
    scores: dict[str, float]


@dataclass(frozen=True)
class Ranked:
    """Whether the first box, the surest one, and the best one are right, for one expression."""

    picture: str
    first: bool
    surest: bool
    best: bool


def measure(
    model: Sam4MLLM, world: str, index: int, seed: int
) -> tuple[list[Judged], list[Ranked]]:
    """All boxes of one scene."""
    scene = render_scene(WORLDS[world], "test", index, seed)
    rng = random.Random(f"{world}/{seed}/{index}")
    texts = expressions(scene, rng)
    rng.shuffle(texts)
    one = [text for text in texts if len(text.targets) == 1][:2]
    none = [text for text in texts if not text.targets][:1]
    image, picture = RgbImage.from_pil(scene.image), f"{world}/{index}"
    judged: list[Judged] = []
    ranked: list[Ranked] = []
    for text in [*one, *none]:
        target = text.targets[0] if text.targets else None
        boxes = list(_boxes(scene, target, rng))
        offered: list[Box] = []
        if target is not None:
            first = model.locate(image, text.text, "1", alternates=ALTERNATES).objects[0]
            offered = [first.box, *(other.box for other in first.alternates)]
        ways, beliefs = _ways(model, image, text.text, [box for _, _, box in boxes], offered)
        for number, (kind, right, _) in enumerate(boxes):
            scores = {name: some[number] for name, some in ways.items()}
            judged.append(Judged(picture, kind, right, scores))
        if target is not None:
            true = Box(*scene.objects[target].box)
            are_right = [box_iou(box, true) >= 0.5 for box in offered]
            surest = beliefs.index(max(beliefs))  # the first of equals
            ranked.append(Ranked(picture, are_right[0], are_right[surest], any(are_right)))
    return judged, ranked


def _boxes(scene: Scene, target: int | None, rng: random.Random) -> Iterator[tuple[str, bool, Box]]:
    """Kind, whether it is right, and the box."""
    every = [Box(*thing.box) for thing in scene.objects]
    if target is None:
        yield "of an object, nothing meant", False, rng.choice(every)
        return
    true = every[target]
    yield "true", True, true
    apart = [box for n, box in enumerate(every) if n != target and box_iou(box, true) < 0.4]
    if apart:
        yield "of another object", False, rng.choice(apart)
    for kind, right, low, high in (("loose", True, 0.7, 0.9), ("missed", False, 0.1, 0.4)):
        moved = _moved(true, low, high, scene.image.size, rng)
        if moved is not None:
            yield kind, right, moved


def _moved(
    box: Box, low: float, high: float, size: tuple[int, int], rng: random.Random
) -> Box | None:
    """The box with its edges moved until its IoU is in the range."""
    for _ in range(300):
        spread, sides = rng.choice(SPREADS), (box.width, box.height) * 2
        edges = (e + rng.uniform(-spread, spread) * s for e, s in zip(box, sides, strict=True))
        moved = clip_box(Box(*edges), *size)
        if min(moved.width, moved.height) >= 4 and low <= box_iou(moved, box) <= high:
            return moved
    return None


def _ways(
    model: Sam4MLLM, image: RgbImage, text: str, boxes: Sequence[Box], offered: Sequence[Box]
) -> tuple[dict[str, list[float]], list[float]]:
    """What each way says of the boxes, and the model's belief in those it offers itself."""
    asked, drawn = (
        replace(model, settings=replace(model.settings, verification=way))
        for way in ("question", "posterior")
    )
    answers = asked.verify(image, text, boxes)
    beliefs = [one.p_yes for one in drawn.verify(image, text, [*boxes, *offered])]
    objects = model.locate(image, text).objects
    ways = {
        "question": [a.p_yes / max(a.p_yes + a.p_no, 1e-9) for a in answers],
        "posterior": beliefs[: len(boxes)],
        "IoU with the first box": [
            max((box_iou(one.box, box) for one in objects), default=0.0) for box in boxes
        ],
    }
    return ways, beliefs[len(boxes) :]


def area_under_curve(right: Sequence[bool], scores: Sequence[float]) -> float:
    """Probability that a right box scores higher than a wrong one; equals count as half."""
    is_right, ranks = np.array(right), rankdata(scores)
    n, m = int(is_right.sum()), int((~is_right).sum())
    return float((ranks[is_right].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def with_interval(
    rows: Sequence[Judged] | Sequence[Ranked], metric: Callable[[list], float], draws: int = 500
) -> tuple[float, float, float]:
    """The metric, and the 95 % interval of a bootstrap over pictures."""
    by_picture: dict[str, list] = {}
    for row in rows:
        by_picture.setdefault(row.picture, []).append(row)
    pictures, rng = list(by_picture.values()), np.random.default_rng(0)
    drawn = [
        metric([row for n in rng.integers(0, len(pictures), len(pictures)) for row in pictures[n]])
        for _ in range(draws)
    ]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return metric(list(rows)), float(low), float(high)


def report(judged: Sequence[Judged], ranked: Sequence[Ranked]) -> dict[str, dict[str, list[float]]]:
    """World → row → value and interval; "all" pools the worlds."""
    rows: dict[str, dict[str, list[float]]] = {}
    for world in ("all", *MEASURED):
        some = [one for one in judged if world == "all" or one.picture.startswith(f"{world}/")]
        asked = [one for one in ranked if world == "all" or one.picture.startswith(f"{world}/")]
        if not some or not asked:
            continue
        rows[world] = {"boxes": [float(len(some))], "expressions": [float(len(asked))]}
        for way in some[0].scores:
            rows[world][f"AUC, {way}"] = [*with_interval(some, partial(_auc, way=way))]
        for name, part in (("first", _share("first")), ("surest", _share("surest")),
                           ("best of all", _share("best")), ("surest − first", _gain)):  # fmt: skip
            rows[world][f"Acc@0.5, {name}"] = [*with_interval(asked, part)]
    return rows


def _auc(rows: list[Judged], way: str) -> float:
    return area_under_curve([r.right for r in rows], [r.scores[way] for r in rows])


def _share(name: str) -> Callable[[list[Ranked]], float]:
    return lambda rows: float(np.mean([getattr(row, name) for row in rows]))


def _gain(rows: list[Ranked]) -> float:
    return float(np.mean([row.surest - row.first for row in rows]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=951)
    parser.add_argument("--scenes", type=int, default=20, help="of each world")
    parser.add_argument("--mllm", default="embedded")
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    options = parser.parse_args()
    model = load(options.mllm)
    judged: list[Judged] = []
    ranked: list[Ranked] = []
    for index in track(range(options.scenes)):
        for world in MEASURED:
            some, asked = measure(model, world, index, options.seed)
            judged, ranked = judged + some, ranked + asked
        rows = report(judged, ranked)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))
    for world, row in rows.items():
        print(world)
        for name, values in row.items():
            print(f"  {name}: " + " … ".join(f"{value:.3f}" for value in values))


if __name__ == "__main__":
    main()
