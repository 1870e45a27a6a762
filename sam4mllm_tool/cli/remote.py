"""``--server``: the models of a running MCP server instead of models loaded here."""

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
        help="Address of a running 'sam4mllm-tool mcp --transport http' to ask; loads no models. "
        "Needs the extra 'mcp'."
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
    """The tools of the server, or ``None`` if none is named: then models are loaded here.

    Raises:
        InputError: an option is given that only models loaded here have, the address is wrong, or
            the MCP client is not installed.
    """
    if not server:
        return None
    for name in _LOCAL_ONLY:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"--{name.replace('_', '-')} is not for a server: its models are loaded",
                hint="Leave it out, or load models here with --server ''.",
            )
    try:
        from sam4mllm_integrations.mcp_remote import RemoteTools
    except ImportError as error:
        raise not_installed("the MCP client", "mcp") from error
    # What the client library logs reaches the user as an error with a hint.
    logging.getLogger("mcp").addHandler(logging.NullHandler())
    return RemoteTools(server, token)
