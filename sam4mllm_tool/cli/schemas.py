"""``sam4mllm-tool tools``: all schemas as JSON."""

from __future__ import annotations

from sam4mllm_tool.cli.common import print_json


def tools() -> None:
    """Print every tool with its description and schemas. Loads no model."""
    from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS

    print_json(
        [
            {
                "name": spec.name,
                "description": spec.description,
                "read_only": spec.read_only,
                "arguments": spec.arguments.model_json_schema(),
                "result": spec.result.model_json_schema(),
            }
            for spec in BUILTIN_TOOLS
        ]
    )
