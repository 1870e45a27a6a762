"""``sam4mllm-tool mcp``: the tools as an MCP server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import (
    AdapterOption,
    DeviceOption,
    FormatOption,
    MllmOption,
    SamOption,
)


class Transport(StrEnum):
    """How clients connect."""

    STDIO = "stdio"
    HTTP = "http"


class CoordinatesOption(StrEnum):
    """What the tools' numbers mean."""

    PIXELS = "pixels"
    RELATIVE_1000 = "relative_1000"


def mcp(
    transport: Annotated[Transport, typer.Option(help="stdio, or streamable HTTP.")] = (
        Transport.STDIO
    ),
    host: Annotated[str, typer.Option(help="HTTP only; off loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP only.")] = 8765,
    token: Annotated[
        str | None, typer.Option(envvar="SAM4MLLM_TOKEN", help="Bearer token clients must send.")
    ] = None,
    allow_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder that may be read and written; repeatable.")
    ] = None,
    network: Annotated[bool, typer.Option(help="Let tools open http(s) URLs.")] = False,
    coordinates: Annotated[CoordinatesOption, typer.Option(help="What numbers mean.")] = (
        CoordinatesOption.PIXELS
    ),
    links: Annotated[
        bool, typer.Option(help="Link results to their masks; some clients cannot take links.")
    ] = True,
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    device: DeviceOption = "auto",
) -> None:
    """Serve the tools to MCP clients (needs the extra 'mcp')."""
    from sam4mllm_integrations.mcp_server import serve

    from sam4mllm_tool.images.access import ImagePolicy
    from sam4mllm_tool.pipeline.model import Sam4MLLM

    def load_models() -> Sam4MLLM:
        from sam4mllm_tool.pipeline.model import load

        return load(mllm, adapter=adapter, format=format, segmenter=sam, device=device)

    serve(
        load_models,
        transport=transport.value,
        host=host,
        port=port,
        token=token,
        allow_dirs=tuple(allow_dir or ()),
        policy=ImagePolicy(allow_network=network),
        coordinates=coordinates.value,
        mask_links=links,
    )
