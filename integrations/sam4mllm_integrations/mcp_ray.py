"""The MCP server on Ray Serve: tool servers in front, the models' replicas behind them.

sam4mllm-tool serve --engine ray --replicas 2

A Serve config file names ``sam4mllm_integrations.mcp_ray:app``; its ``args`` are the fields of
:class:`ServeSettings`. A tool server loads no models: it holds the clients' sessions and
workspaces and asks the replicas (:mod:`sam4mllm_tool.cluster.replicas`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from sam4mllm_integrations.mcp_credentials import Credentials, read_tokens
from sam4mllm_integrations.mcp_http import HttpSettings, check_reach, http_app
from sam4mllm_integrations.mcp_tools import ToolServer
from sam4mllm_integrations.mcp_work import Limits
from sam4mllm_tool import errors
from sam4mllm_tool.cluster.connect import check_resources, cluster
from sam4mllm_tool.cluster.deployments import model_deployment
from sam4mllm_tool.cluster.replicas import RemoteMllm, RemoteSegmenter, Replicas
from sam4mllm_tool.errors import ClusterError
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.mllm import is_address, load_mllm
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.tools.coordinates import Coordinates
from sam4mllm_tool.tools.state import StateStore

NAME = "sam4mllm"
_SERVER_CPUS = 0.1
_LOCAL_CALLS, _ENDPOINT_CALLS = 8, 64


class ServeSettings(BaseModel):
    """What is served, and by how many processes. All fields fit into a Serve config file.

    Attributes:
        mllm, adapter, format, sam, sam_decoder, sam_dtype, device: as on the command line.
        replicas: number of processes with the MLLM, each with ``cpus`` and ``gpus`` of the cluster.
        sam_replicas: number of processes with the segmenter; as many as ``replicas`` by default.
        servers: number of tool servers. More than one require ``state``, and clients that send a
            user's token or use MCP 2026-07-28 or later: a session of an older client belongs to
            one process.
        cpus, gpus, sam_gpus: per replica; fractions of a GPU are possible.
        host, port: HTTP address on each machine; any address except loopback requires a token.
        token: bearer token of all clients; by default the environment variable SAM4MLLM_TOKEN.
        tokens: file with the users' tokens.
        allowed_hosts, allowed_origins, state: as for :class:`~.mcp_server.HttpSettings` and
            :class:`~.mcp_server.ToolServer`. The state folder is on a local disk, and all
            tool servers that share it run on that machine.
        allow_dirs, output_dirs, network, coordinates, links, tools, read_only: what the tools may
            do, as on the command line of ``mcp``.
        model_calls: concurrent tool calls per server that use the models; by default twice the
            number of replicas. With autoscaling, give twice the maximum number.
        deadline, max_clients, memory: as on the command line of ``mcp``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mllm: str = "embedded"
    adapter: str | None = None
    format: str | None = None
    sam: str = "embedded"
    sam_decoder: str | None = None
    sam_dtype: str = "auto"
    device: str = "auto"
    replicas: int = Field(default=1, ge=1)
    sam_replicas: int | None = Field(default=None, ge=1)
    servers: int = Field(default=1, ge=1)
    cpus: float = Field(default=0.5, ge=0)
    gpus: float = Field(default=0, ge=0)
    sam_gpus: float = Field(default=0, ge=0)
    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None
    tokens: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    state: Path | None = None
    allow_dirs: tuple[Path, ...] = ()
    output_dirs: tuple[Path, ...] = ()
    network: bool = False
    coordinates: Coordinates = "pixels"
    links: bool = True
    tools: tuple[str, ...] | None = None
    read_only: bool = False
    deadline: float = 120.0
    max_clients: int = 1000
    model_calls: int | None = Field(default=None, ge=1)
    memory: float = 4.0

    @model_validator(mode="after")
    def _shared(self) -> ServeSettings:
        if self.servers > 1 and self.state is None:
            raise ValueError("several servers need a state folder, in which they share the handles")
        return self

    @property
    def segmenters(self) -> int:
        """Number of the segmenter's replicas."""
        return self.sam_replicas or self.replicas

    @property
    def credentials(self) -> Credentials:
        """The tokens that the servers accept."""
        token = self.token or os.environ.get("SAM4MLLM_TOKEN") or None
        return Credentials(token, read_tokens(self.tokens) if self.tokens else {})

    @property
    def calls(self) -> int:
        """Concurrent calls per replica of the MLLM."""
        return _ENDPOINT_CALLS if is_address(self.mllm) else _LOCAL_CALLS


@serve.ingress()
class ToolFront:
    """A tool server in its own process."""

    def __init__(
        self, settings: ServeSettings, mllm: DeploymentHandle, segmenter: DeploymentHandle
    ) -> None:
        self._settings = settings
        self._handles = mllm, segmenter

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Serve's proxies pass requests to."""
        settings = self._settings
        limits = Limits(
            clients=settings.max_clients,
            memory_bytes=int(settings.memory * 1024**3),
            # A tool call uses one replica at a time: more calls than replicas keep all busy.
            model_calls=settings.model_calls or 2 * max(settings.replicas, settings.segmenters),
            call_seconds=settings.deadline,
        )
        store = StateStore(settings.state) if settings.state else None
        tools = ToolServer(
            self._load,
            settings.allow_dirs,
            ImagePolicy(output_dirs=settings.output_dirs, allow_network=settings.network),
            settings.coordinates,
            mask_links=settings.links,
            tools=settings.tools,
            read_only=settings.read_only,
            limits=limits,
            state=store,
        )
        credentials = settings.credentials
        if store:  # cookies are valid at every server, and after a restart
            credentials = replace(credentials, cookie_key=store.secret("cookie_key"))
        app = http_app(
            tools,
            HttpSettings(
                settings.host,
                settings.port,
                credentials,
                settings.allowed_hosts,
                settings.allowed_origins,
            ),
        )
        return _with_threads(app, limits.model_calls + limits.other_calls)

    def _load(self) -> Sam4MLLM:
        mllm, segmenter = map(Replicas, self._handles)
        remote_mllm = RemoteMllm(mllm)
        format = self._settings.format
        return Sam4MLLM(
            remote_mllm,
            RemoteSegmenter(segmenter),
            format=get_format(format) if format else remote_mllm.own_format,
        )


def _with_threads(app: Any, threads: int) -> Any:
    """The application, with ``threads`` worker threads in addition to anyio's default."""
    added = False

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        nonlocal added
        if not added:
            anyio.to_thread.current_default_thread_limiter().total_tokens += threads
            added = True
        await app(scope, receive, send)

    return asgi


def app(settings: ServeSettings) -> serve.Application:
    """The application, as a Serve config file or :func:`serve_ray` deploys it."""
    where: dict[str, Any] = {} if is_address(settings.mllm) else {"device": settings.device}
    mllm = model_deployment(
        "Mllm",
        partial(load_mllm, settings.mllm, adapter=settings.adapter, **where),
        replicas=settings.replicas,
        cpus=settings.cpus,
        gpus=settings.gpus,
        calls=settings.calls,
    )
    segmenter = model_deployment(
        "Segmenter",
        partial(
            load_segmenter,
            settings.sam,
            decoder=settings.sam_decoder,
            dtype=settings.sam_dtype,
            device=settings.device,
        ),
        replicas=settings.segmenters,
        cpus=settings.cpus,
        gpus=settings.sam_gpus,
        calls=_LOCAL_CALLS,
    )
    return front(settings, mllm, segmenter)


def front(
    settings: ServeSettings, mllm: serve.Application, segmenter: serve.Application
) -> serve.Application:
    """Tool servers over deployments of an MLLM and a segmenter.

    Raises:
        InputError: other machines can reach the address, and no token is set.
    """
    check_reach(settings.host, settings.credentials)
    # The token may come from the environment, which other machines do not share.
    settings = settings.model_copy(update={"token": settings.credentials.token})
    deployment: Any = serve.deployment(
        ToolFront,
        name="Tools",
        num_replicas=settings.servers,
        ray_actor_options={"num_cpus": _SERVER_CPUS},
        max_ongoing_requests=HttpSettings.connections,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=Limits.drain_seconds,
    )
    bound: serve.Application = deployment.bind(settings, mllm, segmenter)
    return bound


def serve_ray(
    settings: ServeSettings,
    address: str | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: what is served.
        address: address of a running cluster, see :func:`sam4mllm_tool.cluster.connect.cluster`.
        on_ready: called when the servers accept requests.

    Raises:
        InputError: other machines can reach the address, and no token is set.
        ClusterError: there is no cluster, it is too small, or the models cannot be loaded.
    """
    ended = threading.Event()
    with cluster(address):
        try:
            deploy(app(settings), settings)
            for number in (signal.SIGINT, signal.SIGTERM):  # replaces Ray's handlers
                signal.signal(number, lambda *_: ended.set())
            on_ready()
            ended.wait()
        finally:
            _remove()


def deploy(application: serve.Application, settings: ServeSettings) -> None:
    """Deploy on the connected cluster, and wait until the servers accept requests.

    Raises:
        ClusterError: the cluster is too small, or the models cannot be loaded.
    """
    check_resources(
        cpus=settings.cpus * (settings.replicas + settings.segmenters)
        + _SERVER_CPUS * settings.servers,
        gpus=settings.gpus * settings.replicas + settings.sam_gpus * settings.segmenters,
    )
    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except (RuntimeError, RayError) as error:
        reason = _reason() or str(error).strip().splitlines()[-1]
        _remove()
        raise ClusterError(
            f"the application cannot be started: {reason}",
            hint="'sam4mllm-tool check' tests the models in one process.",
        ) from error


def _reason() -> str:
    """The error with which the first deployment failed: the last line of a traceback."""
    application = serve.status().applications.get(NAME)
    for deployment in application.deployments.values() if application else ():
        if deployment.status.name == "DEPLOY_FAILED" and deployment.message:
            return deployment.message.strip().splitlines()[-1].removeprefix(f"{errors.__name__}.")
    return ""


def _remove() -> None:
    with suppress(TimeoutError):  # a replica that still loads its weights ends later
        serve.delete(NAME)
