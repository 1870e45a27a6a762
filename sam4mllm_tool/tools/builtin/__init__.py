"""The tools that come with the package, one file each."""

from __future__ import annotations

from sam4mllm_tool.tools.builtin.compare_objects import COMPARE_OBJECTS
from sam4mllm_tool.tools.builtin.is_point_inside_object import IS_POINT_INSIDE_OBJECT
from sam4mllm_tool.tools.builtin.locate_object import LOCATE_OBJECT
from sam4mllm_tool.tools.builtin.propose_objects import PROPOSE_OBJECTS
from sam4mllm_tool.tools.builtin.save_objects import SAVE_OBJECTS
from sam4mllm_tool.tools.builtin.segment_object import SEGMENT_OBJECT
from sam4mllm_tool.tools.builtin.segment_with_prompts import SEGMENT_WITH_PROMPTS
from sam4mllm_tool.tools.builtin.view_objects import VIEW_OBJECTS
from sam4mllm_tool.tools.registry import ToolSpec

BUILTIN_TOOLS: tuple[ToolSpec, ...] = (
    SEGMENT_OBJECT,
    LOCATE_OBJECT,
    PROPOSE_OBJECTS,
    IS_POINT_INSIDE_OBJECT,
    SEGMENT_WITH_PROMPTS,
    COMPARE_OBJECTS,
    VIEW_OBJECTS,
    SAVE_OBJECTS,
)
"""In the order in which an agent meets them."""
