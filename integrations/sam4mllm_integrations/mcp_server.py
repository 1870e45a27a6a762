"""MCP server: the tools over stdio or streamable HTTP, for any MCP client.

sam4mllm-tool mcp --allow-dir ~/pictures
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.tools.coordinates import Coordinates
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.state import StateStore

try:
    from sam4mllm_integrations.mcp_credentials import Credentials, read_tokens
    from sam4mllm_integrations.mcp_http import HttpSettings
    from sam4mllm_integrations.mcp_serving import serve_http, serve_stdio
    from sam4mllm_integrations.mcp_tools import ToolServer
    from sam4mllm_integrations.mcp_watch import log_calls
    from sam4mllm_integrations.mcp_work import Limits
except ImportError as error:
    raise ImportError('the MCP server needs: pip install "sam4mllm-tool[mcp]"') from error

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline.model import Sam4MLLM

__all__ = [
    "Credentials",
    "HttpSettings",
    "Limits",
    "ToolServer",
    "log_calls",
    "read_tokens",
    "serve",
]


def serve(
    load: Callable[[], Sam4MLLM],
    *,
    transport: str = "stdio",
    http: HttpSettings | None = None,
    allow_dirs: Sequence[Path] = (),
    policy: ImagePolicy | None = None,
    coordinates: Coordinates = "pixels",
    mask_links: bool = True,
    tools: Sequence[ToolSpec | str] | None = None,
    read_only: bool = False,
    limits: Limits | None = None,
    state: Path | None = None,
) -> None:
    """Serve until interrupted; SIGTERM lets running calls end first.

    Args:
        load: loads the models, e.g. :meth:`sam4mllm_tool.Sam4MLLM.from_pretrained`.
        transport: ``"stdio"`` or ``"http"`` (streamable HTTP at ``/mcp``).
        http: where HTTP listens and who may connect; anything but loopback needs a token.
        allow_dirs, policy, coordinates, mask_links, tools, read_only, limits: see
            :class:`ToolServer`.
        state: folder for what shall survive the process, see :class:`ToolServer`.

    Raises:
        InputError: an unknown transport, or an open address without a token.
    """
    store = StateStore(state) if state else None
    server = ToolServer(
        load,
        tuple(allow_dirs),
        policy or ImagePolicy(),
        coordinates,
        mask_links=mask_links,
        tools=tools,
        read_only=read_only,
        limits=limits or Limits(),
        state=store,
    )
    if transport == "stdio":
        anyio.run(serve_stdio, server)
    elif transport == "http":
        http = http or HttpSettings()
        if store:  # cookies from before a restart stay good
            key = store.secret("cookie_key")
            http = replace(http, credentials=replace(http.credentials, cookie_key=key))
        serve_http(server, http)
    else:
        raise InputError(f"unknown transport {transport!r}", hint="Use 'stdio' or 'http'.")
