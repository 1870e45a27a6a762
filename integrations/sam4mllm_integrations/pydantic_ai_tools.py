"""Pydantic AI tools.

agent = Agent(model, tools=tools(toolbox))
"""

from __future__ import annotations

from typing import Any

from sam4mllm_integrations._shared import arguments_schema, arun_tool
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.toolbox import Toolbox

try:
    from pydantic_ai import BinaryContent, Tool, ToolReturn
    from pydantic_ai.exceptions import ToolFailed
except ImportError as error:
    raise ImportError('Pydantic AI tools need: pip install "sam4mllm-tool[pydantic-ai]"') from error


def tools(toolbox: Toolbox) -> list[Tool[Any]]:
    """All tools; a BackendError ends the run, other errors are returned to the model.

    The ``metadata`` of a return is the typed output with masks, which the model does not see.
    """
    return [_tool(toolbox, spec) for spec in toolbox.specs()]


def _tool(toolbox: Toolbox, spec: ToolSpec) -> Tool[Any]:
    async def run(**arguments: Any) -> ToolReturn[Any]:
        reply = await arun_tool(toolbox, spec.name, arguments)
        if reply.is_error:
            raise ToolFailed(reply.text)  # a ModelRetry would end the run at the second mistake
        value: Any = reply.text
        if reply.picture is not None:
            picture = BinaryContent(reply.picture.data, media_type=reply.picture.mime_type)
            value = [reply.text, picture]
        return ToolReturn(value, metadata=reply.output)

    return Tool.from_schema(run, spec.name, spec.description, arguments_schema(spec.arguments))
