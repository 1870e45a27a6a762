"""Whether memory stays bounded: many tool calls on many pictures, on the embedded models.

Run ``python -m benchmarks.endurance [--calls 2000] [--images 200]``; it prints the resident memory
as it goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import psutil

from sam4mllm_tool import Sam4MLLM, Toolbox, Workspace
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD

MEGABYTE = 1024**2


def run(calls: int, images: int, workspace_bytes: int) -> list[float]:
    """Resident memory in MB, twenty times along the way."""
    pictures = [render_scene(SMALL_WORLD, "test", index).image for index in range(images)]
    toolbox = Toolbox(Sam4MLLM.from_pretrained(), Workspace(max_bytes=workspace_bytes))
    process = psutil.Process()
    resident = []
    for number in range(calls):
        image = toolbox.workspace.open_image(pictures[number % images]).image_id
        arguments = {"image": image, "expression": "the dog", "count": "1", "strategy": "box_only"}
        toolbox.call("segment_object", arguments)
        if (number + 1) % max(1, calls // 20) == 0:
            resident.append(process.memory_info().rss / MEGABYTE)
            print(f"{number + 1:6d} calls: {resident[-1]:7.0f} MB", flush=True)
    return resident


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2_000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workspace-mb", type=int, default=64)
    args = parser.parse_args(argv)
    resident = run(args.calls, args.images, args.workspace_mb * MEGABYTE)
    half = len(resident) // 2
    print(f"growth in the second half: {resident[-1] - resident[half]:.0f} MB")


if __name__ == "__main__":
    main()
