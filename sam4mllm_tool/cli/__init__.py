"""The command line: ``sam4mllm-tool``. Each command is a short file; heavy imports wait."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool import __version__
from sam4mllm_tool.cli import (
    annotate,
    check,
    convert,
    demo,
    dialogues,
    doctor,
    evaluate,
    mcp,
    models,
    playground,
    probe,
    scenes,
    schemas,
    segment,
    serve,
    train,
)
from sam4mllm_tool.cli.common import fail, quiet_libraries, remark
from sam4mllm_tool.errors import Sam4MllmError

app = typer.Typer(
    name="sam4mllm-tool",
    help="Language to pixels: segment what a text describes, and ask whether points lie on it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sam4mllm-tool {__version__}")
        raise typer.Exit


@app.callback()
def _set_up(
    context: typer.Context,
    settings: Annotated[
        Path | None,
        typer.Option(envvar="SAM4MLLM_SETTINGS", help="TOML file with defaults of the options."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Language to pixels: segment what a text describes, and ask whether points lie on it."""
    # Warnings are for those who call the libraries; -W or PYTHONWARNINGS brings them back.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Slow to import, and neither --help nor a completion needs it.
    from sam4mllm_tool.cli.settings import FILE_NAME, default_map, origins, read_defaults

    context.obj = settings
    found = read_defaults(settings)
    defaults = default_map(context.command, {one.name: one.value for one in found})
    context.default_map = defaults
    for line in origins(found, defaults.get(context.invoked_subcommand or "", {})):
        remark(line)
    if settings is None and Path(FILE_NAME).exists():
        remark(f"./{FILE_NAME} is not read by itself; name it: --settings {FILE_NAME}")


app.command("segment")(segment.segment)
app.command("probe")(probe.probe)
app.command("tools")(schemas.tools)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("mcp")(mcp.mcp)
app.command("playground")(playground.playground)
app.command("serve")(serve.serve)
app.command("models")(models.models)
app.command("check")(check.check)
app.command("scenes")(scenes.scenes)
app.add_typer(evaluate.app, name="eval")
app.command("dialogues")(dialogues.dialogues)
app.command("train")(train.train)
app.command("annotate")(annotate.annotate)
app.command("convert-adapter")(convert.convert_adapter)


def main() -> None:
    """Run the command line; typed errors become a message, a hint and an exit status."""
    quiet_libraries()
    try:
        app(prog_name="sam4mllm-tool")
    except Sam4MllmError as error:
        sys.exit(fail(error))
