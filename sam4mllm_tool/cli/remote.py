"""``--server``: use the models of a running MCP server instead of loading models."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from sam4mllm_tool.cli.common import not_installed
from sam4mllm_tool.errors import InputError

if TYPE_CHECKING:
    from sam4mllm_integrations.mcp_remote import RemoteTools

ServerOption = Annotated[
    str | None,
    typer.Option(
        help="URL of a running 'sam4mllm-tool mcp --transport http': its models are used and none "
        "are loaded here. Needs the extra 'mcp'."
    ),
]
TokenOption = Annotated[
    str | None, typer.Option(envvar="SAM4MLLM_TOKEN", help="Bearer token for --server.")
]

_LOCAL_ONLY = (
    "mllm",
    "adapter",
    "format",
    "sam",
    "sam_decoder",
    "sam_dtype",
    "proposer",
    "device",
    "candidates",
)


def remote_tools(
    context: typer.Context, server: str | None, token: str | None
) -> RemoteTools | None:
    """The tools of the server; ``None`` without a server, since models are then loaded here.

    Raises:
        InputError: an option is given that only applies to models loaded here, the URL is wrong,
            or the MCP client is not installed.
    """
    if not server:
        return None
    for name in _LOCAL_ONLY:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"--{name.replace('_', '-')} cannot be combined with --server",
                hint="Leave it out, or load models here with --server ''.",
            )
    try:
        from sam4mllm_integrations.mcp_remote import RemoteTools
    except ImportError as error:
        raise not_installed("the MCP client", "mcp") from error
    # The user gets an error with a hint instead of the client library's log messages.
    logging.getLogger("mcp").addHandler(logging.NullHandler())
    return RemoteTools(server, token)
