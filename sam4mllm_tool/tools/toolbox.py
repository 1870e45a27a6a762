"""A set of tools over one model and one workspace, as every framework's adapter uses it.

``Toolbox(model).call(name, arguments)`` validates, runs and returns a :class:`ToolOutput`. Errors
an agent can act on are raised as ``InputError`` or ``DialogueError`` with a hint; adapters turn
those into tool errors and let everything else pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.errors import InputError, nearest
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS
from sam4mllm_tool.tools.coordinates import Coordinates, Frame
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.state import StateStore
from sam4mllm_tool.tools.texts import complaint
from sam4mllm_tool.tools.workspace import Workspace


class Toolbox:
    """The tools over one model and one workspace.

    Args:
        model: the pipeline, or a function that loads it at the first call that needs it.
        workspace: handles and access policy; a new one by default.
        coordinates: ``"pixels"`` of the upright image, or ``"relative_1000"``: thousandths of its
            width and height, for agents that cannot know the image's size.
        tools: built-in tools by name, and tools of your own (see
            :mod:`sam4mllm_tool.tools.registry`); all built-in ones by default.
        read_only: leave out tools that write files.
        state: folder in which the new workspace is kept, so that its handles outlive the process.

    Raises:
        InputError: a name that no built-in tool has, two tools of one name, or a workspace beside
            ``state``.
    """

    def __init__(
        self,
        model: Sam4MLLM | Callable[[], Sam4MLLM],
        workspace: Workspace | None = None,
        *,
        coordinates: Coordinates = "pixels",
        tools: Sequence[ToolSpec | str] | None = None,
        read_only: bool = False,
        state: str | Path | None = None,
    ) -> None:
        if state is not None:
            if workspace is not None:
                raise InputError(
                    "state is for a new workspace", hint="Give the workspace its own state."
                )
            workspace = Workspace(state=StateStore(state).workspace("toolbox"))
        self._context = ToolContext(model, workspace or Workspace(), coordinates)
        self._tools = select_tools(tools, read_only=read_only)

    @property
    def model(self) -> Sam4MLLM:
        """The pipeline, loaded now if it was not yet."""
        return self._context.model

    @property
    def workspace(self) -> Workspace:
        """Images and objects by handle."""
        return self._context.workspace

    @property
    def coordinates(self) -> Coordinates:
        """What the tools' numbers mean."""
        return self._context.coordinates

    def for_workspace(self, workspace: Workspace) -> Toolbox:
        """The same model and tools over another workspace, such as another client's."""
        tools = list(self._tools.values())
        return Toolbox(lambda: self.model, workspace, coordinates=self.coordinates, tools=tools)

    def specs(self) -> list[ToolSpec]:
        """All tools, their descriptions completed by the coordinates in use. Loads nothing."""
        unit = Frame.describe(self.coordinates)
        return [
            replace(spec, description=f"{spec.description} {unit * spec.has_coordinates}".strip())
            for spec in self._tools.values()
        ]

    def spec(self, name: str) -> ToolSpec:
        """The tool of that name.

        Raises:
            InputError: no such tool here.
        """
        if name not in self._tools:
            raise _no_tool(name, self._tools)
        return self._tools[name]

    def call(self, name: str, arguments: Mapping[str, Any] | None = None) -> ToolOutput:
        """Run a tool.

        Raises:
            InputError: unknown tool, arguments that do not fit its schema, bad input.
            DialogueError: the MLLM's reply could not be read.
            BackendError: a model, device or endpoint failed.
        """
        spec = self.spec(name)
        try:
            parsed = spec.arguments.model_validate(dict(arguments or {}))
        except ValidationError as error:
            raise InputError(
                complaint(name, spec.arguments, error), hint="Fix the arguments and call again."
            ) from error
        return spec.function(self._context, parsed)

    async def acall(self, name: str, arguments: Mapping[str, Any] | None = None) -> ToolOutput:
        """:meth:`call` in a worker thread; cancelling the task frees the model's turn."""
        return await run_in_thread(self.call, name, arguments)


def select_tools(
    tools: Sequence[ToolSpec | str] | None = None, *, read_only: bool = False
) -> dict[str, ToolSpec]:
    """Tools by name, in the order given; all built-in ones if none are given.

    Raises:
        InputError: a name that no built-in tool has, or two tools of one name.
    """
    known = {spec.name: spec for spec in BUILTIN_TOOLS}
    chosen: dict[str, ToolSpec] = {}
    for tool in BUILTIN_TOOLS if tools is None else tools:
        if isinstance(tool, str) and tool not in known:
            raise _no_tool(tool, known)
        spec = known[tool] if isinstance(tool, str) else tool
        if spec.name in chosen:
            raise InputError(f"two tools are named {spec.name!r}", hint="Rename one of them.")
        chosen[spec.name] = spec
    return {name: spec for name, spec in chosen.items() if spec.read_only or not read_only}


def _no_tool(name: str, known: Mapping[str, ToolSpec]) -> InputError:
    return InputError(f"there is no tool {name[:60]!r}", hint=nearest(name, known, "Tools"))
