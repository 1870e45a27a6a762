"""Defaults of the options: environment variables, ``./sam4mllm.toml``, the user's own file.

What is typed on the command line goes first, then a variable such as ``SAM4MLLM_MLLM``, then
``sam4mllm.toml`` in the working folder, then ``sam4mllm.toml`` in the user's configuration folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import typer
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from sam4mllm_tool.errors import InputError, nearest

FILE_NAME = "sam4mllm.toml"


class Defaults(BaseSettings):
    """Every setting is an option of the same name, of each command that has it."""

    model_config = SettingsConfigDict(env_prefix="SAM4MLLM_", env_ignore_empty=True, extra="forbid")

    mllm: str | None = None
    adapter: str | None = None
    format: str | None = None
    sam: str | None = None
    sam_decoder: str | None = None
    sam_dtype: str | None = None
    proposer: str | None = None
    device: str | None = None
    network: bool | None = None
    max_pixels: int | None = None
    max_bytes: int | None = None
    allow_dir: list[Path] | None = None
    output_dir: list[Path] | None = None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment, then the files, the nearest first."""
        files = [TomlConfigSettingsSource(settings_cls, path) for path in files_read()]
        return EnvSettingsSource(settings_cls), *files


class Setting(NamedTuple):
    """A default that is set somewhere, and where."""

    name: str
    value: Any
    source: str


def files_read() -> list[Path]:
    """Where configuration files are looked for, the nearest first."""
    return [Path.cwd() / FILE_NAME, Path(typer.get_app_dir("sam4mllm-tool")) / FILE_NAME]


def read_defaults() -> list[Setting]:
    """What is set, and where.

    Raises:
        InputError: a file or variable that cannot be read, or a setting that there is not.
    """
    try:
        values = Defaults().model_dump(mode="json", exclude_unset=True)
        return [Setting(name, value, _source_of(name)) for name, value in values.items()]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InputError(
            f"the setting {name!r} of {_source_of(name)}: {first['msg']}",
            hint=nearest(name, Defaults.model_fields, "Settings"),
        ) from error
    except (tomllib.TOMLDecodeError, SettingsError, OSError) as error:
        raise InputError(
            f"the settings cannot be read: {error}",
            hint=f"Files: {', '.join(str(path) for path in files_read())}.",
        ) from error


def default_map(command: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a command's options, or of all commands of a group, as click takes them.

    Args:
        command: of click, or typer's own copy of it.
        defaults: name of a setting → value.
    """
    if hasattr(command, "commands"):
        return {name: default_map(one, defaults) for name, one in command.commands.items()}
    options = {parameter.name for parameter in command.params}
    # Of a command without an MLLM, --format is something else.
    unlike = set() if "mllm" in options else {"format"}
    return {name: value for name, value in defaults.items() if name in options - unlike}


def _source_of(name: str) -> str:
    """Where a setting comes from, in words."""
    if name in EnvSettingsSource(Defaults)():
        return f"SAM4MLLM_{name.upper()}"
    for path in files_read():
        if name in TomlConfigSettingsSource(Defaults, path)():
            return str(path)
    return "the settings"
