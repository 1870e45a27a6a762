from .errors import (
    AccessDenied,
    BackendError,
    CheckpointError,
    DeviceOutOfMemory,
    DialogueError,
    EndpointError,
    ExpressionError,
    ImageError,
    InputError,
    PointOutsideImage,
    ProbabilitiesMissing,
    PromptError,
    Sam4MllmError,
    UnknownHandle,
)
from .images.access import ImagePolicy
from .images.loading import load_image
from .pipeline.model import (
    LocatedObject,
    Location,
    Sam4MLLM,
    Segmentation,
    SegmentedObject,
    Settings,
    replay,
)
from .pipeline.points import Thresholds
from .pipeline.trace import Trace
from .protocols import MaskCandidate, Mllm, Reply, Segmenter, SegmentPrompt
from .tools.builtin import BUILTIN_TOOLS
from .tools.registry import ToolContext, ToolOutput, ToolSpec
from .tools.schemas import ToolArguments, ToolResult
from .tools.toolbox import Toolbox
from .tools.workspace import Workspace
from .types import (
    Box,
    Mask,
    Point,
    PointLabel,
    PromptPoint,
    RgbImage,
    Status,
    Strategy,
    TargetCount,
    YesNo,
)

__all__ = [
    "BUILTIN_TOOLS",
    "AccessDenied",
    "BackendError",
    "Box",
    "CheckpointError",
    "DeviceOutOfMemory",
    "DialogueError",
    "EndpointError",
    "ExpressionError",
    "ImageError",
    "ImagePolicy",
    "InputError",
    "LocatedObject",
    "Location",
    "Mask",
    "MaskCandidate",
    "Mllm",
    "Point",
    "PointLabel",
    "PointOutsideImage",
    "ProbabilitiesMissing",
    "PromptError",
    "PromptPoint",
    "Reply",
    "RgbImage",
    "Sam4MLLM",
    "Sam4MllmError",
    "SegmentPrompt",
    "Segmentation",
    "SegmentedObject",
    "Segmenter",
    "Settings",
    "Status",
    "Strategy",
    "TargetCount",
    "Thresholds",
    "ToolArguments",
    "ToolContext",
    "ToolOutput",
    "ToolResult",
    "ToolSpec",
    "Toolbox",
    "Trace",
    "UnknownHandle",
    "Workspace",
    "YesNo",
    "load_image",
    "replay",
]
