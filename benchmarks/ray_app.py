"""What ``benchmarks.replicas`` serves, asks and measures: the application on Ray Serve, questions,
the CPU time of Ray's processes.
"""

from __future__ import annotations

import base64
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

import psutil
import ray
from ray import serve
from sam4mllm_integrations.mcp_ray import NAME, ServeSettings, deploy, front

from benchmarks.load_server import PATIENCE, area, picture, stand_ins, token
from sam4mllm_tool.cluster.deployments import model_deployment

MODELS = ("Mllm", "Segmenter")


@dataclass(frozen=True)
class Question:
    """What a client asks about its picture, and what the answer must be.

    Attributes:
        image: the picture as a data URI.
        areas: pixels of the masks that a single process draws.
    """

    image: str
    expression: str
    areas: tuple[int, ...]


def block_questions(clients: int) -> list[Question]:
    """Every client's block; the stand-ins know them all."""
    return [
        Question(picture(number), f"block {number}", (area(number),)) for number in range(clients)
    ]


def scene_questions(clients: int) -> list[Question]:
    """A scene for every client, with what the embedded models answer in this process."""
    from sam4mllm_tool.evaluation.scenes import scene_cases
    from sam4mllm_tool.pipeline.model import load

    model, found = load(), []
    seen: set[str] = set()
    for case in scene_cases(7, 40 * clients)():
        if case.image in seen:
            continue
        image = case.open_image()
        objects = model.segment(image, case.expression).objects
        if not objects:
            continue
        seen.add(case.image)
        buffer = BytesIO()
        image.pil.save(buffer, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        found.append(Question(uri, case.expression, tuple(one.mask.area for one in objects)))
        if len(found) == clients:
            break
    return found


# -- what is served ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """An application that can be deployed again with other numbers of replicas.

    Attributes:
        settings: of the tool servers.
        mllm, segmenter: load one of the models.
    """

    settings: ServeSettings
    mllm: Callable[[], Any]
    segmenter: Callable[[], Any]

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.settings.port}/mcp"

    def deploy(self, replicas: int) -> None:
        """Deploy it, or change the number of replicas of what is deployed."""
        cpus = self.settings.cpus
        options: dict[str, Any] = {"replicas": replicas, "cpus": cpus, "gpus": 0, "calls": 8}
        deploy(
            front(
                self.settings,
                model_deployment("Mllm", self.mllm, **options),
                model_deployment("Segmenter", self.segmenter, **options),
            ),
            self.settings,
        )

    def remove(self) -> None:
        """End all its processes; replicas that stay keep their pictures."""
        serve.delete(NAME)

    def give_each_a_core(self) -> None:
        """The first MLLM and the first segmenter share one core, the second ones the next, ….

        Without this a single replica of each would use two cores.
        """
        cores = sorted(os.sched_getaffinity(0))
        for name in MODELS:
            for number, process in enumerate(processes(name)):
                for thread in process.threads():
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(thread.id, {cores[number % len(cores)]})


def served(folder: Path, port: int, clients: int, think: float | None, replicas: int = 2) -> Served:
    """The application for so many clients and at most so many replicas.

    With ``think``, of stand-ins.
    """
    from sam4mllm_tool.mllm import load_mllm
    from sam4mllm_tool.segmenter import load_segmenter

    tokens = folder / "tokens"
    tokens.write_text("".join(f"client-{n} {token(n)}\n" for n in range(clients)))
    settings = ServeSettings(
        port=port,
        cpus=0.1,
        deadline=2 * PATIENCE,
        tokens=tokens,
        state=folder / "state",
        model_calls=4 * replicas,  # enough that hardly ever all of them are at one replica
    )
    if think is None:
        return Served(settings, load_mllm, load_segmenter)
    return Served(
        settings,
        partial(_part, "mllm", clients, think),
        partial(_part, "segmenter", clients, think),
    )


def _part(name: str, clients: int, think: float) -> Any:
    return getattr(stand_ins(clients, think, in_turn=True), name)


def processes(deployment: str) -> list[psutil.Process]:
    """The replicas of a deployment on this machine, of the cluster that is joined."""
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            title = "".join(process.cmdline()[:1])
            if title.startswith(f"ray::ServeReplica:{NAME}:{deployment}"):
                parent = process.parent()
                if parent and address in parent.cmdline():
                    found.append(process)
    return found


def cpu_seconds() -> dict[tuple[str, int], float]:
    """What each process of the joined cluster on this machine has used so far, and this process.

    By name and process id. Replicas are named after their deployment.
    """
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    used = {("clients", os.getpid()): sum(psutil.Process().cpu_times()[:2])}
    for raylet in psutil.process_iter():
        with suppress(psutil.Error):
            if address not in raylet.cmdline():
                continue
            for process in (raylet, *raylet.children(recursive=True)):
                with suppress(psutil.Error):
                    title = Path((process.cmdline() or [process.name()])[0]).name
                    name = title.split(".")[0].split(":")[-1]
                    used[name, process.pid] = sum(process.cpu_times()[:2])
    return used


def cpu_between(
    before: dict[tuple[str, int], float], after: dict[tuple[str, int], float]
) -> dict[str, float]:
    """Seconds by name, the largest first, of the processes that were there at both times."""
    used: defaultdict[str, float] = defaultdict(float)
    for one in before.keys() & after.keys():
        used[one[0]] += after[one] - before[one]
    return dict(sorted(used.items(), key=itemgetter(1), reverse=True))


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Standard output for the report alone: what Ray's processes write goes to standard error."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as ours:
        os.dup2(2, 1)
        try:
            yield ours
        finally:
            sys.stdout.flush()
            os.dup2(ours.fileno(), 1)
