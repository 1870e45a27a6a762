"""``sam4mllm-tool mcp``: the tools as an MCP server."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam4mllm_tool.cli.common import (
    AdapterOption,
    DeviceOption,
    FormatOption,
    MaxBytesOption,
    MaxPixelsOption,
    MllmOption,
    ProposerOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    load_models,
    not_installed,
)
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.images.access import ImagePolicy

if TYPE_CHECKING:
    from sam4mllm_tool.tools.registry import ToolSpec


class Transport(StrEnum):
    """How clients connect."""

    STDIO = "stdio"
    HTTP = "http"


class CoordinatesOption(StrEnum):
    """Unit of the tools' coordinates."""

    PIXELS = "pixels"
    RELATIVE_1000 = "relative_1000"


def mcp(
    transport: Annotated[Transport, typer.Option(help="stdio, or streamable HTTP.")] = (
        Transport.STDIO
    ),
    host: Annotated[
        str, typer.Option(help="HTTP only; a token is required except on loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP only.")] = 8765,
    token: Annotated[
        str | None, typer.Option(envvar="SAM4MLLM_TOKEN", help="Bearer token clients must send.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            envvar="SAM4MLLM_TOKENS",
            help="File with one line 'USER TOKEN' per user; handles belong to the user's token.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="HTTP only: additional host name, such as a proxy's; repeatable."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="HTTP only: web page that may send requests (https://…); repeatable."),
    ] = None,
    max_body: Annotated[
        int | None,
        typer.Option(
            help="HTTP only: maximum request size in bytes; by default the largest picture fits."
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Maximum seconds per call, waiting included.")
    ] = 120.0,
    max_clients: Annotated[
        int, typer.Option(help="Maximum number of clients that hold handles.")
    ] = 1000,
    state: Annotated[
        Path | None, typer.Option(help="Folder that keeps handles across restarts.")
    ] = None,
    memory: Annotated[
        float, typer.Option(help="GiB of pictures and masks kept for all clients.")
    ] = 4.0,
    allow_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder that may be read; repeatable.")
    ] = None,
    output_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that save_objects may write to; repeatable. None by default."),
    ] = None,
    tools: Annotated[
        str | None,
        typer.Option(
            help="Tools to serve, separated by commas: names of built-in tools, and "
            "module:ATTRIBUTE for a ToolSpec of your own. All built-in ones by default."
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option(help="Leave out tools that write files.")] = False,
    network: Annotated[bool, typer.Option(help="Let tools open http(s) URLs.")] = False,
    max_pixels: MaxPixelsOption = ImagePolicy.max_pixels,
    max_bytes: MaxBytesOption = ImagePolicy.max_bytes,
    coordinates: Annotated[CoordinatesOption, typer.Option(help="Unit of coordinates.")] = (
        CoordinatesOption.PIXELS
    ),
    log: Annotated[
        bool, typer.Option(help="Write a JSON line for each call to standard error.")
    ] = False,
    links: Annotated[
        bool, typer.Option(help="Link results to their masks; some clients cannot take links.")
    ] = True,
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    proposer: ProposerOption = "mllm",
    device: DeviceOption = "auto",
) -> None:
    """Serve the tools to MCP clients (needs the extra 'mcp')."""
    try:
        from sam4mllm_integrations import mcp_server
    except ImportError as error:
        raise not_installed("the MCP server", "mcp") from error

    if log:
        mcp_server.log_calls()
    mcp_server.serve(
        lambda: load_models(
            mllm,
            adapter,
            format,
            sam,
            sam_decoder,
            device,
            sam_dtype=sam_dtype,
            proposer=proposer,
            quiet=True,
        ),
        transport=transport.value,
        http=mcp_server.HttpSettings(
            host=host,
            port=port,
            credentials=mcp_server.Credentials(
                token, mcp_server.read_tokens(tokens) if tokens else {}
            ),
            allowed_hosts=allowed_host or (),
            allowed_origins=allowed_origin or (),
            max_body=max_body,
        ),
        state=state,
        limits=mcp_server.Limits(
            clients=max_clients, memory_bytes=int(memory * 1024**3), call_seconds=deadline
        ),
        allow_dirs=tuple(allow_dir or ()),
        policy=ImagePolicy(
            output_dirs=tuple(output_dir or ()),
            allow_network=network,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
        ),
        coordinates=coordinates.value,
        mask_links=links,
        tools=None if tools is None else named_tools(tools),
        read_only=read_only,
    )


def named_tools(text: str) -> list[ToolSpec | str]:
    """Tools from a list separated by commas; ``module:ATTRIBUTE`` is imported.

    Raises:
        InputError: there is no such module, or its attribute is no tool.
    """
    return [_named_tool(name.strip()) for name in text.split(",") if name.strip()]


def _named_tool(name: str) -> ToolSpec | str:
    from sam4mllm_tool.tools.registry import ToolSpec

    module, colon, attribute = name.partition(":")
    if not colon:
        return name
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the tool {name!r} cannot be imported: {error}",
            hint="Write module:ATTRIBUTE, and see that the module is on PYTHONPATH.",
        ) from error
    if not isinstance(found, ToolSpec):
        raise InputError(f"{name} is a {type(found).__name__}", hint="It must be a ToolSpec.")
    return found
