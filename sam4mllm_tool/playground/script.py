"""The tool calls of a session as text: JSON as an agent writes it, and a Python script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sam4mllm_tool.playground.board import Step, named_handles

_LONGEST_LINE = 88


def as_json(steps: Sequence[Step]) -> str:
    """The calls as a list of ``{"name", "arguments"}``, as in an agent's reply."""
    return json.dumps([{"name": s.tool, "arguments": s.arguments} for s in steps], indent=2)


def as_python(steps: Sequence[Step], loading: str, image_id: str, picture: str) -> str:
    """A script that makes the same calls.

    Args:
        steps: the calls.
        loading: Python expression that loads the models.
        image_id: the handle that the calls use for the picture.
        picture: the file that the script opens instead.
    """
    names = {image_id: "image"}
    lines = ["from sam4mllm_tool import Toolbox, load", ""]
    lines += [f"toolbox = Toolbox({loading})", f"image = {picture!r}", ""]
    for number, step in enumerate(steps, 1):
        variable = f"step_{number}"
        lines.append(_call(variable, step, names))
        for handle, path in named_handles(step.result):
            names.setdefault(handle, variable + path)
    return "\n".join(lines) + "\n"


def _call(variable: str, step: Step, names: Mapping[str, str]) -> str:
    items = [f"{key!r}: {_literal(value, names)}" for key, value in step.arguments.items()]
    opening = f"{variable} = toolbox.call({step.tool!r}, {{"
    line = f"{opening}{', '.join(items)}}}).result"
    if len(line) <= _LONGEST_LINE:
        return line
    inner = "".join(f"    {item},\n" for item in items)
    return f"{opening}\n{inner}}}).result"


def _literal(value: Any, names: Mapping[str, str]) -> str:
    """A JSON value as Python source; handles are replaced by the variables that hold them."""
    if isinstance(value, str):
        return names.get(value, repr(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_literal(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(part, names) for part in value) + "]"
    return repr(value)
