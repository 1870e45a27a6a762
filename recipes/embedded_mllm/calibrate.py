"""Fits and writes ``box_calibration``: from a box's likelihood to its probability of being right.

    python -m recipes.embedded_mllm.calibrate \\
        --notes sam4mllm_tool/embedded/mllm/sam4mllm.json

A logistic function of the log-likelihood (Platt scaling) is fitted on the first box and its
alternates, and measured on pictures of another seed: expected calibration error over ten bins of
equal width (Guo et al., 2017).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.optimize import minimize

from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.pipeline.model import Sam4MLLM, load
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import WORLDS
from sam4mllm_tool.types import Box, RgbImage

FIT_SEED, TEST_SEED = 9_001, 9_002
ALTERNATES = 2

Judged = NDArray[np.float64]
"""Rows of (log-likelihood, 1 if the box is right else 0)."""


def judged_boxes(model: Sam4MLLM, worlds: Sequence[str], seed: int, scenes: int) -> Judged:
    """First boxes and alternates for expressions with exactly one target."""
    rows: list[tuple[float, float]] = []
    for world in worlds:
        for index in track(range(scenes), f"{world}, seed {seed}"):
            rows += _of_scene(model, world, seed, index)
    return np.array(rows)


def _of_scene(model: Sam4MLLM, world: str, seed: int, index: int) -> Iterator[tuple[float, float]]:
    scene = render_scene(WORLDS[world], "test", index, seed)
    image = RgbImage.from_pil(scene.image)
    single = [
        e for e in expressions(scene, random.Random(f"{seed}/{index}")) if len(e.targets) == 1
    ]
    for expression in single[:2]:
        truth = Box(*scene.objects[expression.targets[0]].box)
        found = model.locate(image, expression.text, alternates=ALTERNATES).objects
        for box in (*found[:1], *(found[0].alternates if found else ())):
            assert box.likelihood is not None
            yield float(np.log(box.likelihood)), float(box_iou(box.box, truth) >= 0.5)


def fit(rows: Judged) -> tuple[float, float]:
    """Slope and intercept of least logistic loss."""
    x, y = rows.T

    def loss(parameters: NDArray[np.float64]) -> float:
        z = parameters[0] * x + parameters[1]
        return float(np.mean(np.logaddexp(0, z) - y * z))

    slope, intercept = minimize(loss, np.array([1.0, 0.0])).x
    return round(float(slope), 4), round(float(intercept), 4)


def calibration_error(rows: Judged, parameters: tuple[float, float], bins: int = 10) -> float:
    """Mean gap between probability and fraction of right boxes, weighted by the bins' sizes."""
    x, y = rows.T
    p = 1 / (1 + np.exp(-(parameters[0] * x + parameters[1])))
    places = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [
        (places == b).mean() * abs(p[places == b].mean() - y[places == b].mean())
        for b in range(bins)
        if (places == b).any()
    ]
    return float(sum(gaps))


def main(
    notes: Annotated[Path, typer.Option(help="sam4mllm.json that the parameters are written to.")],
    scenes: Annotated[int, typer.Option(help="Scenes per world and seed.")] = 150,
) -> None:
    """Fit on one seed, measure on another, write the parameters."""
    model, worlds = load(), ("small", "small-overlap", "small-look-alike")
    parameters = fit(judged_boxes(model, worlds, FIT_SEED, scenes))
    test = judged_boxes(model, worlds, TEST_SEED, scenes)
    console = Console()
    console.print(
        f"slope, intercept: {parameters}; {len(test)} boxes, {test[:, 1].mean():.3f} right"
    )
    console.print(f"expected calibration error on seed {TEST_SEED}: "
                  f"{calibration_error(test, parameters):.3f}")  # fmt: skip
    stated = json.loads(notes.read_text()) | {"box_calibration": parameters}
    notes.write_text(json.dumps(stated, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
