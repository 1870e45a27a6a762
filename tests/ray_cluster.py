"""A Ray cluster of this machine for the tests, which leaves no process behind."""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

_SECONDS = 240
_MARK = "SAM4MLLM_TEST_CLUSTER"  # in the environment of all of a cluster's processes
_SLOW = {
    # On a busy machine Ray's own helpers take longer to start than it waits for them.
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "240",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
# "ray start" for a machine that is busy with other tests. Ray gives its helpers 15 seconds to tell
# which ports they chose, and the node 30 to appear. Here the ports are chosen for them, and the
# node is waited for. When the process of the tests is gone, however it ended, so is the cluster.
_PATIENT_START = """
import os
import signal
import threading
import time
from ray import _raylet as names
from ray._private import services
from ray._private.node import Node
from ray.scripts.scripts import main

start_raylet, get_node = Node.start_raylet, services.get_node

def start_with_known_ports(node, *args, **kwargs):
    chosen = node._ray_params
    for name, port in (
        (names.METRICS_AGENT_PORT_NAME, chosen.metrics_agent_port),
        (names.METRICS_EXPORT_PORT_NAME, chosen.metrics_export_port),
        (names.DASHBOARD_AGENT_LISTEN_PORT_NAME, chosen.dashboard_agent_listen_port),
        (names.RUNTIME_ENV_AGENT_PORT_NAME, chosen.runtime_env_agent_port),
    ):
        names.persist_port(node._session_dir, node._node_id, name, port)
    return start_raylet(node, *args, **kwargs)

def get_node_at_last(*args, **kwargs):
    until = time.monotonic() + 200
    while True:
        try:
            return get_node(*args, **kwargs)
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)

def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
Node.start_raylet, services.get_node = start_with_known_ports, get_node_at_last
# Two processes that no test needs; one of them would listen on a port that is always the same.
Node.start_ray_client_server = Node.start_api_server = lambda node, **options: None
main()
"""


@contextmanager
def started(log_folder: Path) -> Iterator[int]:
    """Start a cluster, join it, start Serve; the port on which Serve listens.

    ``ray start`` rather than ``ray.init``: it can be given more time, see above.
    """
    import ray
    from ray import serve

    gcs, *agents, http = free_ports(6)
    names = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "runtime-env-agent",
        "metrics-export",
    )
    command = [
        *(sys.executable, "-c", _PATIENT_START, "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.1", "--port", str(gcs), "--num-cpus", "2"),
        *("--include-dashboard", "false", "--disable-usage-stats"),
        *("--object-store-memory", str(100 * 1024**2)),
        *("--min-worker-port", "0", "--max-worker-port", "0"),  # any that are free
        *("--no-monitor", "--include-log-monitor", "false"),  # nothing grows, nobody reads along
    ]
    for name, port in zip(names, agents, strict=True):
        command += [f"--{name}-port", str(port)]
    with ExitStack() as ending:
        # Names of sockets are short: pytest's own folders are too deep for them.
        folder = ending.enter_context(tempfile.TemporaryDirectory(prefix="ray"))
        log = ending.enter_context((log_folder / "ray.log").open("wb"))
        head = subprocess.Popen(
            [*command, "--temp-dir", folder],
            env=os.environ | _SLOW | {_MARK: folder},
            stdout=log,
            stderr=log,
        )
        ending.callback(end, folder)
        _wait_for(gcs, head)
        ending.callback(ray.shutdown)
        _join(f"127.0.0.1:{gcs}", head)
        serve.start(http_options={"host": "127.0.0.1", "port": http})
        yield http


def end(folder: str) -> None:
    """End all processes of the cluster with that folder.

    None in an orderly way: Serve and Ray would each take half a minute.
    """
    until = time.monotonic() + 60
    while alive := members(folder):
        assert time.monotonic() < until, f"left behind: {alive}"
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, 1)


def members(folder: str) -> list[psutil.Process]:
    """The processes of the cluster with that folder, those without a parent too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            running = process.status() != psutil.STATUS_ZOMBIE
            if running and process.environ().get(_MARK) == folder:
                found.append(process)
    return found


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on.

    They lie below those that Linux gives out, so that no other process gets one of them meanwhile.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise OSError("no free ports")


def _wait_for(port: int, head: subprocess.Popen) -> None:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        assert head.poll() is None, "ray start has ended; see ray.log"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise TimeoutError("the Ray cluster did not start")


def _join(address: str, head: subprocess.Popen) -> None:
    import ray

    until = time.monotonic() + _SECONDS
    while True:
        try:
            ray.init(address, logging_level="warning", log_to_driver=False)
            return
        except Exception:  # the node is not there yet
            if time.monotonic() > until or head.poll() is not None:
                raise
            time.sleep(1)
