"""A run's page: the numbers, and its worst, median and best cases as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.report import BY_KIND, Document, metric_cell, metric_number
from sam4mllm_tool.evaluation.run import Line
from sam4mllm_tool.types import Mask, RgbImage

# Okabe and Ito's palette: right, missed, too much.
HIT, MISSED, EXTRA = (0, 158, 115), (0, 114, 178), (213, 94, 0)
MAX_SIDE = 420
_TEMPLATES = Path(__file__).parents[1] / "drawing" / "templates"


def choose_lines(lines: Sequence[Line], each: int = 4) -> dict[str, list[Line]]:
    """The worst, median and best cases of the first strategy; none twice."""
    ranked = sorted(lines, key=lambda line: (line.judged.outcome.iou, line.case))
    each = max(1, min(each, len(ranked) // 3))
    worst, rest = ranked[:each], ranked[each:]
    best, rest = rest[::-1][:each], rest[:-each]
    middle = max(0, (len(rest) - each) // 2)
    return {"worst": worst, "median": rest[middle : middle + each], "best": best}


def compared(image: RgbImage, truth: Sequence[Mask], predicted: Sequence[Mask]) -> Image.Image:
    """The picture with right, missed and superfluous pixels tinted; same size as the image."""
    pixels = image.array.astype(np.float32)
    shape = image.array.shape[:2]
    found, true = (np.logical_or.reduce([m.pixels for m in masks], axis=0)
                  if masks else np.zeros(shape, bool) for masks in (predicted, truth))  # fmt: skip
    for where, colour in ((found & true, HIT), (true & ~found, MISSED), (found & ~true, EXTRA)):
        pixels[where] = 0.45 * pixels[where] + 0.55 * np.array(colour, np.float32)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


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
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        groups=groups,
        metrics=[m for m in METRICS if any(s[m] is not None for s in
                                           report["strategies"].values())],
        kind_metrics=BY_KIND,
        cell=metric_cell,
        number=metric_number,
        colours={"right": _hex(HIT), "missed": _hex(MISSED), "too much": _hex(EXTRA)},
    )  # fmt: skip


def _shown(line: Line, case: Case) -> dict[str, Any]:
    image, outcome = case.open_image(), line.judged.outcome
    predicted = [Mask.from_rle(rle) for rle in line.judged.masks]
    picture = compared(image, case.truth(), predicted)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "expression": line.judged.expression,
        "case": outcome.case,
        "iou": outcome.iou,
        "note": line.judged.error or ("" if outcome.has_target else "no target"),
        "picture": f"data:image/jpeg;base64,{encoded}",
    }


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
