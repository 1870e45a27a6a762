"""What a tool is: a name, a description, typed arguments and results, and a function.

A tool of your own reaches every framework once it is listed in ``Toolbox(…, tools=…)``::

    class CountArguments(ToolArguments):
        image: ImageSource
        expression: Expression

    class CountResult(ToolResult):
        number: int

    def count_objects(context: ToolContext, arguments: CountArguments) -> ToolOutput:
        record = context.workspace.open_image(arguments.image)
        found = context.model.segment(record.image, arguments.expression)
        number = len(found.objects)
        return ToolOutput(CountResult(text=f"{number} found", number=number))

    COUNT = ToolSpec("count_objects", "Count objects.", CountArguments, CountResult, count_objects)
    toolbox = Toolbox(model, tools=[*BUILTIN_TOOLS, COUNT])
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from pydantic import BaseModel

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.pipeline.faults import typed_faults
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.tools.coordinates import Coordinates, Frame
from sam4mllm_tool.tools.schemas import ToolResult
from sam4mllm_tool.tools.workspace import ImageRecord, ObjectRecord, Workspace
from sam4mllm_tool.types import Mask


@dataclass(frozen=True)
class ToolOutput:
    """What a tool returns.

    Attributes:
        result: typed, JSON-ready, small; ``result.text`` is what an LLM should read.
        masks: by object_id; they never enter the text.
        picture: for a multimodal reader.
        trace: of ``segment_object``.
    """

    result: ToolResult
    masks: dict[str, Mask] = field(default_factory=dict)
    picture: Image.Image | None = None
    trace: Trace | None = None

    @property
    def text(self) -> str:
        """The result in words."""
        return self.result.text

    def artifact(self) -> dict[str, Any]:
        """The result with its masks as COCO RLE, JSON-ready: for programs, not for a prompt."""
        data = self.result.model_dump(mode="json")
        data["masks"] = {object_id: mask.to_rle() for object_id, mask in self.masks.items()}
        return data


class ToolContext:
    """What a tool works with: the models, one user's workspace, and the coordinates in use.

    Attributes:
        workspace: images and objects by handle, and which files and addresses are allowed.
        coordinates: what the tools' numbers mean.
    """

    def __init__(
        self,
        model: Sam4MLLM | Callable[[], Sam4MLLM],
        workspace: Workspace,
        coordinates: Coordinates,
    ) -> None:
        self._model = model
        self._loading = threading.Lock()
        self.workspace = workspace
        self.coordinates: Coordinates = coordinates

    @property
    def model(self) -> Sam4MLLM:
        """The pipeline, loaded now if it was not yet.

        Raises:
            BackendError: it cannot be loaded; the next call tries again.
        """
        with self._loading:
            if not isinstance(self._model, Sam4MLLM):
                with typed_faults("loading the models"):
                    self._model = self._model()
            return self._model

    def frame(self, record: ImageRecord) -> Frame:
        """Translates between the agent's numbers and pixels of that image."""
        return Frame(self.coordinates, record.image.width, record.image.height)

    def masked_objects(self, object_ids: list[str]) -> tuple[ImageRecord, list[ObjectRecord]]:
        """Objects of one image that all have masks.

        Raises:
            UnknownHandle: no such object.
            InputError: objects of different images, or one without a mask.
        """
        found = [self.workspace.object(object_id) for object_id in dict.fromkeys(object_ids)]
        if len({one.image_id for one in found}) > 1:
            raise InputError(
                "the objects belong to different images", hint="Give objects of one image."
            )
        bare = [one.object_id for one in found if one.mask is None]
        if bare:
            raise InputError(
                f"{', '.join(bare)} have no mask yet",
                hint="Call segment_with_prompts(object_id=…) to draw it.",
            )
        return self.workspace.image(found[0].image_id), found


@dataclass(frozen=True)
class ToolSpec:
    """A tool as every framework needs it.

    Attributes:
        name: letters, digits and underscores.
        description: what it does and when to use it, for an LLM.
        arguments: model of its arguments, a subclass of
            :class:`~sam4mllm_tool.tools.schemas.ToolArguments`.
        result: model of its result, a subclass of
            :class:`~sam4mllm_tool.tools.schemas.ToolResult`.
        function: runs it. ``InputError`` and ``DialogueError`` reach the agent with their hints,
            all other errors are raised to the caller.
        read_only: whether it leaves files alone.
        has_coordinates: whether its numbers are coordinates, so that its description should say
            which ones.
        returns_picture: whether its output holds a picture.
        needs_model: whether it asks the models. A tool that does not need not wait for them.
    """

    name: str
    description: str
    arguments: type[BaseModel]
    result: type[ToolResult]
    function: Callable[[ToolContext, Any], ToolOutput]
    read_only: bool = True
    has_coordinates: bool = False
    returns_picture: bool = False
    needs_model: bool = True
