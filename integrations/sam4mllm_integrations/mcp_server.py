"""MCP server: the tools over stdio or streamable HTTP, for any MCP client.

sam4mllm-tool mcp --allow-dir ~/pictures
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.tools.coordinates import Coordinates
from sam4mllm_tool.tools.registry import ToolSpec

try:
    from mcp.server.stdio import stdio_server

    from sam4mllm_integrations.mcp_http import http_app
    from sam4mllm_integrations.mcp_tools import ToolServer
except ImportError as error:
    raise ImportError('the MCP server needs: pip install "sam4mllm-tool[mcp]"') from error

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline.model import Sam4MLLM

__all__ = ["ToolServer", "serve", "serve_stdio"]


async def serve_stdio(tools: ToolServer) -> None:
    """Serve one client over stdin and stdout until it leaves."""
    async with stdio_server() as (reading, writing):
        await tools.server.run(reading, writing, tools.server.create_initialization_options())


def serve(
    load: Callable[[], Sam4MLLM],
    *,
    transport: str = "stdio",
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    allow_dirs: Sequence[Path] = (),
    policy: ImagePolicy | None = None,
    coordinates: Coordinates = "pixels",
    mask_links: bool = True,
    tools: Sequence[ToolSpec | str] | None = None,
    read_only: bool = False,
) -> None:
    """Serve until interrupted.

    Args:
        load: loads the models, e.g. :meth:`sam4mllm_tool.Sam4MLLM.from_pretrained`.
        transport: ``"stdio"`` or ``"http"`` (streamable HTTP at ``/mcp``).
        host, port: where HTTP listens; anything but loopback needs a token.
        token: bearer token that HTTP clients must send.
        allow_dirs, policy, coordinates, mask_links, tools, read_only: see :class:`ToolServer`.

    Raises:
        InputError: an unknown transport, or an open address without a token.
    """
    server = ToolServer(
        load,
        tuple(allow_dirs),
        policy or ImagePolicy(),
        coordinates,
        mask_links=mask_links,
        tools=tools,
        read_only=read_only,
    )
    if transport == "stdio":
        asyncio.run(serve_stdio(server))
    elif transport == "http":
        import uvicorn

        app = http_app(server, host=host, token=token)
        uvicorn.run(app, host=host, port=port, log_level="warning")
    else:
        raise InputError(f"unknown transport {transport!r}", hint="Use 'stdio' or 'http'.")
