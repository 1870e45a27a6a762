"""Connecting to a Ray cluster, or starting one on this machine, with typed errors."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from sam4mllm_tool.errors import ClusterError

_ANSWER_SECONDS = 10.0
_PRIVATE = {
    # Nobody reads the metrics of a cluster of our own, and its processes rarely change. By default
    # Ray exports and checks ten times per second: an idle server used 146 ms of CPU time per second
    # instead of 110.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_LOG_TO_STDERR": "0",  # its log files have the same lines
}


@contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Connect to a Ray cluster within the ``with`` block; an existing connection is used and kept.

    Args:
        address: ``HOST:PORT`` or ``ray://HOST:PORT`` of a running cluster, ``"auto"`` for the one
            on this machine; ``None`` starts one on this machine, which ends with the block.

    Raises:
        ClusterError: there is no cluster at the address, or none can be started.
    """
    if ray.is_initialized():
        yield
        return
    # Without this variable Ray sends usage statistics over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ |= {name: os.environ.get(name, value) for name, value in _PRIVATE.items()}
    try:
        if address not in (None, "auto", "local"):
            _check_answers(address)
        ray.init(address or "local", include_dashboard=False if address is None else None,
                 logging_level=logging.WARNING, log_to_driver=False)  # fmt: skip
    except Exception as error:  # Ray's own errors, gRPC's and the operating system's
        raise ClusterError(
            f"there is no Ray cluster at {address}" if address else "Ray cannot start here",
            hint=f"{_first_line(error)} Start one with 'ray start --head', check the address, and "
            "set RAY_AUTH_MODE=token where the cluster asks for a token.",
            retryable=bool(address),
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(cpus: float, gpus: float) -> None:
    """Raise an error if the cluster is too small, instead of waiting for ever.

    Args:
        cpus, gpus: total needed. For an autoscaling cluster, its present size counts.

    Raises:
        ClusterError: it has too few.
    """
    available = ray.cluster_resources()
    for what, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > available.get(what, 0) + 1e-6:
            raise ClusterError(
                f"{needed:g} {what}s are needed and the cluster has {available.get(what, 0):g}",
                hint=f"Ask for fewer replicas or fewer {what}s per replica, or add machines.",
                retryable=True,
            )


def _check_answers(address: str) -> None:
    """Fail early if nothing answers at the address: Ray itself tries for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS):
        pass


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
