"""Defaults of the command-line options, from environment variables and settings files.

In order of priority: the command line; an environment variable such as ``SAM4MLLM_MLLM``; the file
named by ``--settings`` or ``SAM4MLLM_SETTINGS``; ``sam4mllm.toml`` in the user's configuration
folder. A ``sam4mllm.toml`` in the working folder is not read: otherwise the author of a downloaded
folder could choose the checkpoints, servers and limits.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
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
    """Each setting is the default of the option of that name, in every command that has it."""

    model_config = SettingsConfigDict(env_prefix="SAM4MLLM_", env_ignore_empty=True, extra="forbid")

    mllm: str | None = None
    adapter: str | None = None
    format: str | None = None
    sam: str | None = None
    sam_decoder: str | None = None
    sam_dtype: str | None = None
    proposer: str | None = None
    device: str | None = None
    server: str | None = None
    network: bool | None = None
    max_pixels: int | None = None
    max_bytes: int | None = None
    allow_dir: list[Path] | None = None
    output_dir: list[Path] | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the values from :func:`read_defaults`, which records where each comes from."""
        return (init_settings,)


class Setting(NamedTuple):
    """A default and its source: a variable's name or a file's path."""

    name: str
    value: Any
    source: str


def files_read(named: Path | None = None) -> list[Path]:
    """The files that settings are read from, in order of priority.

    Args:
        named: the file of ``--settings``.
    """
    own = Path(typer.get_app_dir("sam4mllm-tool")) / FILE_NAME
    return [own] if named is None else [named, own]


def read_defaults(named: Path | None = None) -> list[Setting]:
    """All defaults that are set, with their sources.

    Args:
        named: the file of ``--settings``.

    Raises:
        InputError: a file is missing or unreadable, or a setting is unknown or invalid.
    """
    if named is not None and not named.is_file():
        raise InputError(f"there is no settings file {named}", hint="Check --settings.")
    found: dict[str, Setting] = {}
    try:
        for one in _all_settings(named):
            found.setdefault(one.name, one)
        values = Defaults(**{name: one.value for name, one in found.items()})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InputError(
            f"the setting {name!r} of {found[name].source}: {first['msg']}",
            hint=nearest(name, Defaults.model_fields, "Settings"),
        ) from error
    except (tomllib.TOMLDecodeError, SettingsError, OSError) as error:
        raise InputError(
            f"the settings cannot be read: {error}",
            hint=f"Files: {', '.join(str(path) for path in files_read(named))}.",
        ) from error
    checked = values.model_dump(mode="json", exclude_unset=True)
    return [one._replace(value=checked[name]) for name, one in found.items()]


def _all_settings(named: Path | None) -> Iterator[Setting]:
    """Each setting of each source, in order of priority."""
    for name, value in EnvSettingsSource(Defaults)().items():
        yield Setting(name, value, f"SAM4MLLM_{name.upper()}")
    for path in files_read(named):
        for name, value in TomlConfigSettingsSource(Defaults, path)().items():
            yield Setting(name, value, str(path))


def origins(found: Sequence[Setting], options: Mapping[str, Any]) -> list[str]:
    """Where defaults come from: a line per source, such as ``defaults from FILE: mllm, sam``.

    Args:
        found: the result of :func:`read_defaults`.
        options: the result of :func:`default_map`; other settings are left out.
    """
    nested = [one for one in options.values() if isinstance(one, dict)]
    names = set(options).union(*nested)
    sources = dict.fromkeys(one.source for one in found if one.name in names)
    return [
        f"defaults from {source}: "
        + ", ".join(one.name for one in found if one.source == source and one.name in names)
        for source in sources
    ]


def default_map(command: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a command's options, or of all commands of a group, as click takes them.

    Args:
        command: a command or group of click or typer.
        defaults: name of a setting → value.
    """
    if hasattr(command, "commands"):
        return {name: default_map(one, defaults) for name, one in command.commands.items()}
    options = {parameter.name for parameter in command.params}
    # In a command without an MLLM, --format has another meaning.
    excluded = set() if "mllm" in options else {"format"}
    return {name: value for name, value in defaults.items() if name in options - excluded}
