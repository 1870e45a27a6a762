"""LangChain: the registry's tools as ``BaseTool`` objects.

Content is short text for the model; the typed result with its masks as COCO RLE travels as the
message's artifact and never enters the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForToolRun, CallbackManagerForToolRun
from langchain_core.tools import BaseTool, BaseToolkit, ToolException
from pydantic import ConfigDict, ValidationError

from sam4mllm_integrations._shared import ToolReply, arun_tool, run_tool
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.model import load
from sam4mllm_tool.tools.coordinates import Coordinates
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.texts import complaint
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace

Content = str | list[str | dict[str, Any]]


class Sam4MLLMTool(BaseTool):
    """One tool of the registry.

    Input and dialogue errors reach the model as tool errors with their hint; backend errors are
    raised to the caller, as an agent cannot fix them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    toolbox: Toolbox
    spec: ToolSpec
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"

    @classmethod
    def from_spec(cls, toolbox: Toolbox, spec: ToolSpec) -> Sam4MLLMTool:
        """The LangChain form of a registry entry."""
        return cls(
            toolbox=toolbox,
            spec=spec,
            name=spec.name,
            description=spec.description,
            args_schema=spec.arguments,
            handle_tool_error=True,
            handle_validation_error=partial(_complaint, spec),
        )

    def _run(
        self, run_manager: CallbackManagerForToolRun | None = None, **arguments: Any
    ) -> tuple[Content, dict[str, Any]]:
        return _told(run_tool(self.toolbox, self.name, arguments))

    async def _arun(
        self, run_manager: AsyncCallbackManagerForToolRun | None = None, **arguments: Any
    ) -> tuple[Content, dict[str, Any]]:
        return _told(await arun_tool(self.toolbox, self.name, arguments))


class Sam4MLLMToolkit(BaseToolkit):
    """All tools over one model and one workspace.

    Example::

        toolkit = Sam4MLLMToolkit.from_pretrained()
        agent = create_agent(chat_model, toolkit.get_tools())
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    toolbox: Toolbox

    @classmethod
    def from_pretrained(
        cls,
        mllm: str = "embedded",
        *,
        allow_dirs: Iterable[str | Path] | None = None,
        output_dirs: Iterable[str | Path] = (),
        allow_network: bool = False,
        coordinates: Coordinates = "pixels",
        tools: Sequence[ToolSpec | str] | None = None,
        read_only: bool = False,
        **options: Any,
    ) -> Sam4MLLMToolkit:
        """Tools over the named models, which are loaded at the first call that needs them.

        Args:
            mllm: see :meth:`sam4mllm_tool.Sam4MLLM.from_pretrained`, which also takes ``options``.
            allow_dirs: folders that agents may read from; any if left out.
            output_dirs: folders that agents may write to; none if left out.
            allow_network: whether http(s) URLs may be opened.
            coordinates: ``"pixels"`` or ``"relative_1000"``.
            tools, read_only: which tools, see :class:`~sam4mllm_tool.tools.toolbox.Toolbox`.
        """
        dirs = None if allow_dirs is None else tuple(Path(d) for d in allow_dirs)
        policy = ImagePolicy(
            allowed_dirs=dirs,
            output_dirs=tuple(Path(d) for d in output_dirs),
            allow_network=allow_network,
        )
        toolbox = Toolbox(
            lambda: load(mllm, **options),
            Workspace(policy),
            coordinates=coordinates,
            tools=tools,
            read_only=read_only,
        )
        return cls(toolbox=toolbox)

    def get_tools(self) -> list[BaseTool]:
        """All tools of the toolbox. Loads no model."""
        return [Sam4MLLMTool.from_spec(self.toolbox, spec) for spec in self.toolbox.specs()]


def _told(reply: ToolReply) -> tuple[Content, dict[str, Any]]:
    """Content for the model, artifact for the program."""
    if reply.output is None:
        raise ToolException(reply.text)
    content: Content = reply.text
    if reply.picture is not None:
        picture = {
            "type": "image",
            "base64": reply.picture.base64,
            "mime_type": reply.picture.mime_type,
        }
        content = [{"type": "text", "text": reply.text}, picture]
    return content, reply.output.artifact()


def _complaint(spec: ToolSpec, error: Any) -> str:
    """What a model should read when its arguments do not fit."""
    problem = (
        complaint(spec.name, spec.arguments, error)
        if isinstance(error, ValidationError)
        else f"arguments of {spec.name} do not fit: {error}"
    )
    return f"Error: {problem}. Hint: Fix the arguments and call again."


__all__ = ["Sam4MLLMTool", "Sam4MLLMToolkit"]
