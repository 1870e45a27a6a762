"""What an LLM reads when its arguments do not fit."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from sam4mllm_tool.errors import nearest

MOST_COMPLAINTS = 5


def complaint(tool: str, model: type[BaseModel], error: ValidationError) -> str:
    """Which arguments do not fit and why; a misspelt name or value gets the nearest one."""
    problems = error.errors(include_url=False)[:MOST_COMPLAINTS]
    return f"arguments of {tool} do not fit: " + "; ".join(_problem(model, p) for p in problems)


def _problem(model: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(step) for step in problem["loc"])
    message = str(problem["msg"])
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        message = f"is not an argument. {nearest(where, model.model_fields, 'Arguments')}"
    elif problem["type"] in ("enum", "literal_error"):
        given = str(problem["input"])[:60]
        message += f" (got {given!r}). {nearest(given, _options(problem), 'Known')}"
    return f"{where}: {message}" if where else message


def _options(problem: Any) -> list[str]:
    """The values that pydantic lists in words: ``'a', 'b' or 'c'``."""
    expected = str(problem.get("ctx", {}).get("expected", ""))
    return [part.strip("' ") for part in expected.replace(" or ", ",").split(",")]
