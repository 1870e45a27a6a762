"""A run's page: the numbers, and its worst, median and best cases as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam4mllm_tool.display import data_uri
from sam4mllm_tool.drawing.html import as_hex, render
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.report import BY_KIND, Document, metric_cell, metric_number
from sam4mllm_tool.evaluation.run import Line
from sam4mllm_tool.types import Mask, RgbImage

# Okabe and Ito's palette: right, missed, too much.
HIT, MISSED, EXTRA = (0, 158, 115), (0, 114, 178), (213, 94, 0)
WHITE = (255, 255, 255)
STRIPES = 8, 3
"""Period and width in pixels of the stripes over wrong pixels."""
MAX_SIDE = 420


def choose_lines(lines: Sequence[Line], each: int = 4) -> dict[str, list[Line]]:
    """The worst, median and best cases of the first strategy; no picture is shown twice."""
    ranked = sorted(lines, key=lambda line: (line.judged.outcome.iou, line.case))
    pictures = {line.judged.outcome.image for line in lines}
    each = max(1, min(each, len(pictures) // 3))
    middle = sorted(range(len(ranked)), key=lambda place: abs(place - len(ranked) // 2))
    shown: set[str] = set()
    worst = _of_new_pictures(ranked, each, shown)
    best = _of_new_pictures(ranked[::-1], each, shown)
    median = _of_new_pictures([ranked[place] for place in middle], each, shown)
    return {"worst": worst, "median": median, "best": best}


def _of_new_pictures(lines: Sequence[Line], number: int, shown: set[str]) -> list[Line]:
    """The first lines whose pictures are not in ``shown``, which they then are."""
    taken: list[Line] = []
    for line in lines:
        picture = line.judged.outcome.image
        if len(taken) < number and picture not in shown:
            shown.add(picture)
            taken.append(line)
    return taken


def compared(image: RgbImage, truth: Sequence[Mask], predicted: Sequence[Mask]) -> Image.Image:
    """The picture with what is right outlined, what is missed striped like ``/`` and what is too
    much striped like ``\\``; same size as the image.

    Right pixels keep their colours; stripes tell the two errors apart without colours.
    """
    pixels = image.array.copy()
    shape = pixels.shape[:2]
    said, true = (np.logical_or.reduce([m.pixels for m in masks], axis=0)
                  if masks else np.zeros(shape, bool) for masks in (predicted, truth))  # fmt: skip
    rows, columns = np.indices(shape)
    period, width = STRIPES
    for wrong, across, colour in (
        (true & ~said, rows + columns, MISSED),
        (said & ~true, rows - columns, EXTRA),
    ):
        pixels[wrong & (across % period < width)] = colour
        pixels[wrong & (across % period == width)] = WHITE  # seen on a ground of their colour too
        pixels[_rim(wrong)] = colour
    right = said & true
    outline = _rim(right)
    pixels[_rim(right & ~outline)] = WHITE  # seen on every ground, also on green
    pixels[outline] = HIT
    return Image.fromarray(pixels)


def _rim(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The outermost pixels of a region."""
    from scipy.ndimage import binary_erosion

    return inside & ~binary_erosion(inside)


def report_page(report: Document, lines: Sequence[Line], cases: Iterable[Case]) -> str:
    """One self-contained HTML page.

    Args:
        lines: of all strategies; pictures are shown of the first.
        cases: the run's cases anew; only those shown are opened.
    """
    first = [line for line in lines if line.strategy == next(iter(report["strategies"]))]
    chosen = choose_lines(first)
    wanted = {line.case for group in chosen.values() for line in group}
    found = {case.case: case for case in cases if case.case in wanted}
    groups = {name: [_shown(line, found[line.case]) for line in group]
              for name, group in chosen.items()}  # fmt: skip
    return render(
        "report.html.j2",
        report=report,
        groups=groups,
        metrics=[m for m in METRICS if any(s[m] is not None for s in
                                           report["strategies"].values())],
        kind_metrics=[m for m in BY_KIND if any(one[m] is not None for one in
                                                report["by_kind"].values())],
        cell=metric_cell,
        number=metric_number,
        colours={"right": as_hex(HIT), "missed": as_hex(MISSED), "extra": as_hex(EXTRA)},
    )  # fmt: skip


def _shown(line: Line, case: Case) -> dict[str, Any]:
    outcome = line.judged.outcome
    predicted = [Mask.from_rle(rle) for rle in line.judged.masks]
    picture = _small_comparison(case.open_image(), case.truth(), predicted)
    return {
        "expression": line.judged.expression,
        "case": outcome.case,
        "iou": outcome.iou,
        "note": line.judged.error or ("" if outcome.has_target else "no target"),
        "picture": data_uri(picture, "JPEG", MAX_SIDE),
    }


def _small_comparison(
    image: RgbImage, truth: Sequence[Mask], predicted: Sequence[Mask]
) -> Image.Image:
    """:func:`compared` at no more than ``MAX_SIDE`` pixels, drawn at that size."""
    small = image.pil.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return compared(
        RgbImage.from_pil(small),
        [mask.resized(small.size) for mask in truth],
        [mask.resized(small.size) for mask in predicted],
    )
