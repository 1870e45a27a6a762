"""LlamaIndex tools, sync and async, with image blocks.

    agent = FunctionAgent(tools=tools(toolbox), llm=llm)

LlamaIndex tells the model about every exception a tool raises. Pass the run's events to
:func:`stop_on_backend_error` to stop when the system failed.
"""

from __future__ import annotations

from typing import Any

from sam4mllm_integrations._shared import ToolReply, arun_tool, run_tool
from sam4mllm_tool.errors import BackendError
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.toolbox import Toolbox

try:
    from llama_index.core.llms import ImageBlock, TextBlock
    from llama_index.core.tools import AsyncBaseTool, ToolMetadata, ToolOutput
except ImportError as error:
    raise ImportError('LlamaIndex tools need: pip install "sam4mllm-tool[llamaindex]"') from error


class RegistryTool(AsyncBaseTool):
    """One of the tools; ``raw_output`` of its result is the typed output with masks."""

    def __init__(self, toolbox: Toolbox, spec: ToolSpec) -> None:
        self._toolbox = toolbox
        self._metadata = ToolMetadata(spec.description, spec.name, spec.arguments)

    @property
    def metadata(self) -> ToolMetadata:
        """Name, description, arguments."""
        return self._metadata

    def call(self, *args: Any, **kwargs: Any) -> ToolOutput:
        """Run the tool with keyword arguments, or one mapping.

        Raises:
            BackendError: the system failed.
        """
        arguments = _arguments(args, kwargs)
        return self._output(arguments, run_tool(self._toolbox, self.metadata.get_name(), arguments))

    async def acall(self, *args: Any, **kwargs: Any) -> ToolOutput:
        """:meth:`call` without blocking the event loop."""
        arguments = _arguments(args, kwargs)
        reply = await arun_tool(self._toolbox, self.metadata.get_name(), arguments)
        return self._output(arguments, reply)

    def _output(self, arguments: dict[str, Any], reply: ToolReply) -> ToolOutput:
        blocks: list[Any] = [TextBlock(text=reply.text)]
        if reply.picture is not None:
            picture = reply.picture
            blocks.append(ImageBlock(image=picture.data, image_mimetype=picture.mime_type))
        return ToolOutput(
            self.metadata.get_name(),
            blocks=blocks,
            raw_input=arguments,
            raw_output=reply.output,
            is_error=reply.is_error,
        )


def tools(toolbox: Toolbox) -> list[AsyncBaseTool]:
    """All tools."""
    return [RegistryTool(toolbox, spec) for spec in toolbox.specs()]


def stop_on_backend_error(event: Any) -> None:
    """Raise the BackendError a tool call ended in, if ``event`` is such a call's result."""
    output = getattr(event, "tool_output", None)
    if isinstance(output, ToolOutput) and isinstance(output.exception, BackendError):
        raise output.exception


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = args[0] if len(args) == 1 and isinstance(args[0], dict) else {}
    return {**given, **kwargs}
