"""OpenAI Agents SDK tools.

agent = Agent(name=…, tools=tools(toolbox))
"""

from __future__ import annotations

from typing import Any

from sam4mllm_integrations._shared import arun_tool
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.toolbox import Toolbox

try:
    from agents import FunctionTool, ToolOutputImage, ToolOutputText
    from agents.tool_context import ToolContext

    from sam4mllm_integrations.openai_functions import strict_schema
except ImportError as error:
    raise ImportError(
        'OpenAI Agents tools need: pip install "sam4mllm-tool[openai-agents]"'
    ) from error


def tools(toolbox: Toolbox) -> list[FunctionTool]:
    """All tools; a BackendError ends the run, other errors are returned to the model."""
    return [_tool(toolbox, spec) for spec in toolbox.specs()]


def _tool(toolbox: Toolbox, spec: ToolSpec) -> FunctionTool:
    async def invoke(context: ToolContext[Any], arguments: str) -> Any:
        reply = await arun_tool(toolbox, spec.name, arguments)
        if reply.picture is None:
            return reply.text
        image = ToolOutputImage(image_url=reply.picture.data_uri, detail="auto")
        return [ToolOutputText(text=reply.text), image]

    return FunctionTool(
        name=spec.name,
        description=spec.description,
        params_json_schema=strict_schema(spec.arguments),
        on_invoke_tool=invoke,
        strict_json_schema=True,
    )
