from . import embedded, grammar
from .errors import (
    AccessDenied,
    BackendError,
    CheckpointError,
    DatasetError,
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
    StorageError,
    UnknownHandle,
)
from .formats.base import BoxesRead, DialogueFormat, PromptsRead
from .images.access import ImagePolicy
from .images.loading import ImageLike, LoadedImage, load_image
from .masks.interop import LabelledMask
from .pipeline.model import Sam4MLLM, load, replay
from .pipeline.points import Thresholds
from .pipeline.results import (
    LocatedObject,
    Location,
    ScoredBox,
    Segmentation,
    SegmentedObject,
    Settings,
)
from .pipeline.steps import DialogueSteps
from .pipeline.strategies import STRATEGIES, Strategy
from .pipeline.trace import Trace
from .protocols import (
    CheckpointNotes,
    Dialogue,
    MaskCandidate,
    Mllm,
    Proposal,
    Proposer,
    Reply,
    Segmenter,
    SegmentPrompt,
    Turn,
    YesNoWords,
)
from .tools.builtin import BUILTIN_TOOLS
from .tools.registry import ToolContext, ToolOutput, ToolSpec
from .tools.schemas import Expression, ImageSource, ToolArguments, ToolResult
from .tools.toolbox import Toolbox
from .tools.workspace import Workspace
from .types import Box, Mask, Point, PointLabel, PromptPoint, RgbImage, Status, TargetCount, YesNo

__version__: str

__all__ = [
    "BUILTIN_TOOLS",
    "STRATEGIES",
    "AccessDenied",
    "BackendError",
    "Box",
    "BoxesRead",
    "CheckpointError",
    "CheckpointNotes",
    "DatasetError",
    "DeviceOutOfMemory",
    "Dialogue",
    "DialogueError",
    "DialogueFormat",
    "DialogueSteps",
    "EndpointError",
    "Expression",
    "ExpressionError",
    "ImageError",
    "ImageLike",
    "ImagePolicy",
    "ImageSource",
    "InputError",
    "LabelledMask",
    "LoadedImage",
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
    "PromptsRead",
    "Proposal",
    "Proposer",
    "Reply",
    "RgbImage",
    "Sam4MLLM",
    "Sam4MllmError",
    "ScoredBox",
    "SegmentPrompt",
    "Segmentation",
    "SegmentedObject",
    "Segmenter",
    "Settings",
    "Status",
    "StorageError",
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
    "Turn",
    "UnknownHandle",
    "Workspace",
    "YesNo",
    "YesNoWords",
    "__version__",
    "embedded",
    "grammar",
    "load",
    "load_image",
    "replay",
]
