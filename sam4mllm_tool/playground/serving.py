"""Running the playground until it is interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import uvicorn

from sam4mllm_tool.catalogue import FOR_PHOTOGRAPHS
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.isolation import warm_up
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.playground.app import LIMITS, Playground, playground_app
from sam4mllm_tool.playground.gallery import gallery
from sam4mllm_tool.playground.gate import Address
from sam4mllm_tool.playground.view import About
from sam4mllm_tool.playground.watching import WatchedModel
from sam4mllm_tool.tools.toolbox import Toolbox

_CONNECTIONS = 256


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A bound socket, and the address with the actual port.

    Raises:
        InputError: the address is in use or cannot be bound.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address.host, address.port))
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on {address.host}:{address.port}: {error.strerror}",
            hint="Choose another --port; 0 selects a free one.",
        ) from error
    return bound, replace(address, port=bound.getsockname()[1])


def playground_server(
    model: Sam4MLLM,
    address: Address,
    *,
    loading: str = "load()",
    folder: Path | None = None,
    policy: ImagePolicy | None = None,
) -> uvicorn.Server:
    """The server, ready to run on a socket of :func:`listen`.

    Args:
        model: the models.
        address: where it listens.
        loading: Python expression that loads the same models, for the scripts to copy.
        folder: folder whose pictures are offered in addition to the shipped scenes.
        policy: limits on pictures and network access. Files are read from ``folder`` only, nothing
            is written, and pictures are decoded in worker processes.

    Raises:
        InputError: the folder holds no pictures.
    """
    allowed = (folder,) if folder else ()
    policy = replace(policy or ImagePolicy(), allowed_dirs=allowed, output_dirs=(), isolated=True)
    caution = model.mllm.notes.caution or ""
    about = About(
        mllm=model.mllm.name,
        segmenter=model.segmenter.name,
        loading=loading,
        caution=caution,
        command=f"sam4mllm-tool playground {FOR_PHOTOGRAPHS}" if caution else "",
    )
    toolbox = Toolbox(WatchedModel.over(model), read_only=True)
    playground = Playground(toolbox, about, gallery(folder, policy), policy, LIMITS)
    return uvicorn.Server(
        uvicorn.Config(
            playground_app(playground, address),
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=3,
            log_level="warning",
        )
    )


def serve(
    load: Callable[[], Sam4MLLM],
    address: Address,
    announce: Callable[[str], None],
    *,
    loading: str,
    folder: Path | None,
    policy: ImagePolicy,
) -> None:
    """Load the models, announce the address, and serve until interrupted.

    Raises:
        InputError: the address cannot be bound, or the folder holds no pictures.
        BackendError: the models cannot be loaded.
    """
    bound, address = listen(address)  # fails before the models are loaded
    with bound:
        server = playground_server(load(), address, loading=loading, folder=folder, policy=policy)
        warm_up()
        announce(address.url)
        server.run(sockets=[bound])
