"""The cost of our own code: importing, listing the tools, and a tool call beyond the model's time.

Run ``python -m benchmarks.overhead [--json]``. The models are instant stand-ins, so that only our
own code is measured: arguments, handles, files, results. Targets: import under 0.2 s and without
torch, a tool call under 3 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.protocols import MaskCandidate, SegmentPrompt
from sam4mllm_tool.testing import ScriptedMllm
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import Mask, RgbImage, YesNo

SIZE = (640, 480)


class InstantSegmenter:
    """Gives the same ready-made masks to every prompt."""

    name = "instant"

    def __init__(self) -> None:
        pixels = np.zeros((SIZE[1], SIZE[0]), bool)
        pixels[100:300, 200:500] = True
        logits = np.zeros((256, 256), np.float32)
        self._masks = tuple(MaskCandidate(Mask(pixels), logits, q) for q in (0.7, 0.9, 0.6))

    def embed(self, image: RgbImage) -> None:
        """Nothing to do."""

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """The ready-made masks."""
        return [self._masks for _ in prompts]

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """As they are."""
        return logits


def instant_model() -> Sam4MLLM:
    """A pipeline whose models answer at once."""
    endless = [YesNo(0.9, 0.1)] * 9
    return Sam4MLLM(
        ScriptedMllm(["\n[300,200,800,650]"] * 10_000, [endless] * 10_000), InstantSegmenter()
    )


def median_ms(call: Callable[[], object], repeats: int = 200) -> float:
    """Median milliseconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def import_seconds(repeats: int = 7) -> float:
    """Median seconds of ``import sam4mllm_tool`` beyond an empty interpreter's."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    pairs = [(run("import sam4mllm_tool"), run("pass")) for _ in range(repeats)]
    return statistics.median(full - empty for full, empty in pairs)


def measure() -> dict[str, float]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        noise = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
        Image.fromarray(noise).save(path)
        model = instant_model()
        box = Toolbox(model)
        image = box.workspace.open_image(path).image
        ask = {"image": str(path), "expression": "the red block", "count": "1"}
        segment = median_ms(lambda: box.call("segment_object", ask))
        alone = median_ms(lambda: model.segment(image, "the red block"))
        points = {"object_id": "obj_1", "points": [{"x": 1 + n, "y": 5} for n in range(9)]}
        return {
            "import_seconds": round(import_seconds(), 4),
            "list_tools_ms": round(median_ms(box.specs), 4),
            "segment_object_ms": round(segment, 3),
            "segment_object_overhead_ms": round(segment - alone, 3),
            "pipeline_with_trace_ms": round(alone, 3),
            "is_point_inside_object_ms": round(
                median_ms(lambda: box.call("is_point_inside_object", points)), 3
            ),
        }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    table = Table(title="Our own cost")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:g}")
    Console().print(table)


if __name__ == "__main__":
    main()
