"""Where a command's models run: in this process, or in others by Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from sam4mllm_tool.cli.common import not_installed

if TYPE_CHECKING:
    from sam4mllm_tool.cluster.batches import Workers
    from sam4mllm_tool.pipeline.model import Sam4MLLM


class Engine(StrEnum):
    """Where the models run."""

    LOCAL = "local"
    RAY = "ray"


EngineOption = Annotated[
    Engine, typer.Option(help="local: this process; ray: a Ray cluster (extra 'ray').")
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Ray: processes with the models.")]
CpusOption = Annotated[float, typer.Option(min=0, help="Ray: CPUs set aside for each process.")]
GpusOption = Annotated[float, typer.Option(min=0, help="Ray: GPUs for each; 0.5 is possible.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray: a running cluster, HOST:PORT or 'auto'. By default one is started on this "
        "machine and ended with the command."
    ),
]


def require_ray() -> None:
    """Refuse to go on without Ray.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise not_installed("Ray", "ray") from error


@contextmanager
def pool(
    load: Callable[[], Sam4MLLM], number: int, cpus: float, gpus: float, address: str | None
) -> Iterator[Workers]:
    """Processes with the models on a Ray cluster, within the ``with`` block.

    Raises:
        InputError: Ray is not installed.
        ClusterError: there is no cluster, or it is too small.
    """
    require_ray()
    from sam4mllm_tool.cluster.batches import Workers
    from sam4mllm_tool.cluster.connect import check_resources, cluster

    with cluster(address):
        check_resources(cpus * number, gpus * number)
        yield Workers(load, number, cpus, gpus)
