"""smolagents tools.

    agent = ToolCallingAgent(tools=tools(toolbox), model=model, step_callbacks=[after_step])

:func:`after_step` shows the pictures of ``view_objects`` to a model that can see, and stops the
agent when the system failed: smolagents by itself tells the model about every exception.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from sam4mllm_integrations._shared import arguments_schema, inlined, run_tool, without_null
from sam4mllm_tool.errors import BackendError, Sam4MllmError
from sam4mllm_tool.tools.registry import ToolSpec
from sam4mllm_tool.tools.toolbox import Toolbox

try:
    from smolagents import ActionStep, Tool
except ImportError as error:
    raise ImportError('smolagents tools need: pip install "sam4mllm-tool[smolagents]"') from error


class ToolCallError(Sam4MllmError):
    """What the agent should fix in its call."""


class RegistryTool(Tool):
    """One of the tools; takes a PIL image wherever an image source is meant.

    ``view_objects`` returns an image (an ``AgentImage`` within the agent), the others text.
    """

    skip_forward_signature_validation = True

    def __init__(self, toolbox: Toolbox, spec: ToolSpec) -> None:
        self.toolbox = toolbox
        self.name = spec.name
        self.description = spec.description
        self.inputs = _inputs(spec)
        self.output_type = "image" if spec.returns_picture else "string"
        self.unseen: Image.Image | None = None
        super().__init__()

    def forward(self, *args: Any, **kwargs: Any) -> str | Image.Image:
        """Run the tool.

        Raises:
            ToolCallError: the agent can fix the call; smolagents passes the message on.
            BackendError: the system failed.
        """
        arguments = dict(zip(self.inputs, args, strict=False)) | kwargs
        if isinstance(arguments.get("image"), Image.Image):
            arguments["image"] = self._handle(arguments["image"])
        reply = run_tool(self.toolbox, self.name, arguments)
        if reply.output is None:
            raise ToolCallError(reply.text)
        if reply.output.picture is not None:
            self.unseen = reply.output.picture
            return self.unseen
        return reply.text

    def _handle(self, image: Image.Image) -> str:
        plain = image.to_raw() if hasattr(image, "to_raw") else image  # AgentImage holds no pixels
        return self.toolbox.workspace.open_image(plain).image_id


def tools(toolbox: Toolbox) -> list[Tool]:
    """All tools."""
    return [RegistryTool(toolbox, spec) for spec in toolbox.specs()]


def after_step(step: ActionStep, agent: Any) -> None:
    """Show new pictures to the model; a step callback.

    Raises:
        BackendError: the system failed in this step.
    """
    cause: BaseException | None = step.error
    while cause is not None:
        if isinstance(cause, BackendError):
            raise cause
        cause = cause.__cause__
    for tool in agent.tools.values():
        if isinstance(tool, RegistryTool) and tool.unseen is not None:
            step.observations_images = [*(step.observations_images or []), tool.unseen]
            tool.unseen = None


def _inputs(spec: ToolSpec) -> dict[str, dict[str, Any]]:
    schema = inlined(arguments_schema(spec.arguments))
    required = schema.get("required", ())
    inputs = {name: without_null(part) for name, part in schema["properties"].items()}
    for name, part in inputs.items():
        if name not in required:
            part["nullable"] = True
        if name == "image":
            part["type"] = ["string", "image"]
    return inputs
