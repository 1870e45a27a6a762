"""What the driver of a batch costs per picture, and where more workers stop helping.

``python -m benchmarks.batches --json``. The work of :func:`sam4mllm_tool.annotate.annotate` is real
(plan, journal, COCO document); the models are not: each of ``--workers`` threads sleeps
``--seconds`` per picture and returns an entry like those of a real run (three objects with RLE
masks). Seconds of CPU are the process's own, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam4mllm_tool.annotate import Job, annotate
from sam4mllm_tool.cluster.batches import PICTURES_PER_BLOCK
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.masks.coco import coco_annotation
from sam4mllm_tool.types import Mask, TargetCount

TEXTS = ["the dog", "the cat", "the tree"]


@dataclass(frozen=True)
class Sleepers:
    """Workers that take as long as models, and find the same three objects in every picture.

    Attributes:
        number: how many pictures they are at together.
        seconds: per picture.
        together: entries that come, and are written, at a time.
    """

    number: int
    seconds: float
    together: int = 1
    names: tuple[str, str] = ("sleeping", "sleeping")

    def annotate(
        self, jobs: Sequence[Job], count: TargetCount, policy: ImagePolicy | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Entries in the order of the jobs, ``together`` at a time."""
        found = _objects()

        def work(job: Job) -> dict[str, Any]:
            time.sleep(self.seconds)
            return {"picture": job.name, "size": [1024, 768], "found": found, "failures": {}}

        with ThreadPoolExecutor(self.number) as pool:
            done: list[dict[str, Any]] = []
            for begin in range(0, len(jobs), 64 * self.number):  # so that memory is bounded
                for entry in pool.map(work, jobs[begin : begin + 64 * self.number]):
                    done.append(entry)
                    if len(done) == self.together:
                        yield done
                        done = []
            yield done


def _objects() -> list[tuple[str, dict[str, Any]]]:
    """Three discs with uneven edges, as an annotation of a 1024×768 picture."""
    rows, columns = np.mgrid[:768, :1024]
    angle = np.arctan2(rows - 384, columns - 512)
    distance = np.hypot(rows - 384, columns - 512)
    found = []
    for number, text in enumerate(TEXTS, 1):
        edge = 80 * number + 9 * np.sin(13 * angle) + 4 * np.sin(41 * angle)
        found.append((text, coco_annotation(Mask(distance < edge), score=0.9)))
    return found


def measure(pictures: int, workers: int, seconds: float, together: int) -> dict[str, Any]:
    """One run: pictures per second, and what the driver took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (json.dumps({"picture": f"{n:08}.jpg", "expressions": TEXTS})
                 for n in range(pictures))  # fmt: skip
        (folder / "list.jsonl").write_text("\n".join(lines))
        out = folder / "coco.json"
        before, cpu, wall = _rss(), time.process_time(), time.perf_counter()
        annotate(Sleepers(workers, seconds, together), folder / "list.jsonl", None, out)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        journal = out.with_name("coco.json.journal.jsonl")
        return {
            "pictures": pictures,
            "workers": workers,
            "seconds_per_picture": seconds,
            "written_together": together,
            "pictures_per_second": round(pictures / wall, 1),
            "of_ideal": round(pictures / wall * seconds / workers, 3) if seconds else None,
            "driver_cpu_ms_per_picture": round(1000 * cpu / pictures, 3),
            "driver_kb_per_picture": round((_rss() - before) / pictures, 2),
            "journal_kb_per_picture": round(journal.stat().st_size / pictures / 1024, 2),
            "document_kb_per_picture": round(out.stat().st_size / pictures / 1024, 2),
        }


def fsync_ms(times: int = 100) -> float:
    """Milliseconds until a journal's line is on this machine's disk, median."""
    spent = []
    with tempfile.TemporaryFile() as file:
        for _ in range(times):
            begun = time.perf_counter()
            file.write(b"x" * 3000)
            file.flush()
            os.fsync(file.fileno())
            spent.append(time.perf_counter() - begun)
    return round(1000 * float(np.median(spent)), 3)


def _rss() -> float:
    """The most memory this process has had, in KB (Linux)."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--per-worker", type=int, default=40, help="pictures for each worker")
    parser.add_argument("--pictures", type=int, default=20_000, help="for the driver alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    report = {
        "fsync_ms": fsync_ms(),
        "driver_alone": [measure(args.pictures, 1, 0.0, n) for n in (1, PICTURES_PER_BLOCK)],
        "simulated": [
            measure(args.per_worker * n, n, args.seconds, PICTURES_PER_BLOCK) for n in args.workers
        ],
    }
    print(json.dumps(report, indent=1) if args.json else report)


if __name__ == "__main__":
    main()
