"""Where a command's models run: in this process, or in Ray's worker processes."""

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
CpusOption = Annotated[float, typer.Option(min=0, help="Ray: CPUs reserved per process.")]
GpusOption = Annotated[
    float, typer.Option(min=0, help="Ray: GPUs reserved per process, such as 0.5.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray: address of a running cluster, HOST:PORT or 'auto'. By default the command "
        "starts one on this machine and stops it at the end."
    ),
]


def require_ray() -> None:
    """Check that Ray is installed.

    Raises:
        InputError: Ray is not installed.
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
