"""The pipeline: image + expression → masks, with a trace of how they came about.

Start reading in ``strategies.py``, which holds the flow; the steps it is made of are in
``steps.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sam4mllm_tool import embedded
from sam4mllm_tool.errors import InputError, check_options
from sam4mllm_tool.formats import DialogueFormat, get_format
from sam4mllm_tool.images.loading import ImageLike, to_rgb_image
from sam4mllm_tool.mllm import is_address, load_mllm
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import Location, Segmentation, SegmentedObject, Settings
from sam4mllm_tool.pipeline.steps import DialogueSteps
from sam4mllm_tool.pipeline.strategies import STRATEGIES, Strategy, get_strategy
from sam4mllm_tool.pipeline.trace import (
    Recorder,
    RecordingMllm,
    RecordingProposer,
    RecordingSegmenter,
    ReplayMllm,
    ReplayProposer,
    Trace,
)
from sam4mllm_tool.pipeline.validation import check_count
from sam4mllm_tool.proposer import NAME, load_proposer
from sam4mllm_tool.protocols import CheckpointNotes, Segmenter
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.types import RgbImage, TargetCount

ROOM_FOR_SEGMENTER = 1 << 30
"""Bytes that an MLLM on the same device leaves for the segmenter's activations and embeddings."""


@dataclass(frozen=True)
class Sam4MLLM(DialogueSteps):
    """Two models and the dialogue between them; the steps one by one, or all in one call.

    Example::

        model = Sam4MLLM.from_pretrained()
        found = model.segment("desk.png", "the red apple left of the dog")
        found.objects[0].mask.pixels  # bool array (height, width)
    """

    @classmethod
    def from_pretrained(
        cls,
        mllm: str = embedded.NAME,
        *,
        adapter: str | None = None,
        segmenter: str = embedded.NAME,
        proposer: str = NAME,
        device: str = "auto",
        dtype: str = "auto",
        format: str | None = None,
        settings: Settings | None = None,
        segmenter_options: Mapping[str, Any] | None = None,
        **mllm_options: Any,
    ) -> Sam4MLLM:
        """Load an MLLM (with an optional PEFT adapter) and a segmenter by name.

        Args:
            mllm: ``"embedded"`` (with an adapter: the base it was trained over), a directory or
                hub id of a transformers image-text-to-text model, or the address of an
                OpenAI-compatible server (``http://host:8000/v1``).
            adapter: directory or hub id of a PEFT adapter over it.
            segmenter: ``"embedded"``, a checkpoint file of segment-anything or
                EfficientViT-SAM, or a directory or hub id of a transformers SAM family.
            proposer: what finds candidates for a phrase: ``"mllm"`` (its own boxes), or a
                directory or hub id of a transformers checkpoint of SAM 3, Grounding DINO or OWLv2.
            device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device.
            dtype: ``"auto"`` (bfloat16 on CUDA, else float32), or a torch dtype name.
            format: name of a dialogue format, if the checkpoint's own should not be used.
            settings: how the dialogue is held.
            segmenter_options: passed on to ``load_segmenter``: ``decoder`` (a file of fine-tuned
                weights laid over the segmenter's), ``dtype`` (of its image encoder).
            mllm_options: passed on to ``LocalMllm.from_pretrained`` or ``OpenAIEndpointMllm``.

        Raises:
            InputError: an option that the MLLM or the segmenter does not have.
            CheckpointError: a checkpoint is missing, corrupt or of the wrong kind.
            DeviceOutOfMemory: the device is too small for it.
            EndpointError: the server cannot be reached.
        """
        check_options(segmenter_options or {}, load_segmenter)
        finder = load_proposer(proposer, device=device)
        # First the others: what the MLLM's check of memory finds is what is left beside it.
        drawer = load_segmenter(segmenter, device=device, **(segmenter_options or {}))
        if not is_address(mllm):
            reserve = {"reserve_bytes": ROOM_FOR_SEGMENTER}
            mllm_options = {"device": device, "dtype": dtype, **reserve, **mllm_options}
        talker = load_mllm(mllm, adapter=adapter, **mllm_options)
        return cls(
            mllm=talker,
            segmenter=drawer,
            settings=settings or Settings(),
            format=get_format(format) if format else talker.own_format,
            proposer=finder,
        )

    def segment(
        self,
        image: ImageLike,
        expression: str,
        *,
        count: TargetCount | str = TargetCount.ZERO_OR_MORE,
        strategy: Strategy | str | None = None,
        source: str = "",
    ) -> Segmentation:
        """Expression → mask(s).

        Args:
            image: anything that :func:`~sam4mllm_tool.load_image` reads, or what it returns.
            expression: what to find.
            count: how many objects it may mean: ``"0+"``, ``"1+"`` or ``"1"``. The default is the
                one that published adapters were trained with, and the only one that lets a model
                answer that there is none.
            strategy: a name or a value, see :mod:`sam4mllm_tool.pipeline.strategies`; by default
                that of the settings.
            source: what the trace calls the image.

        Raises:
            ExpressionError: empty or overlong expression.
            InputError: unknown ``count`` or ``strategy``.
            ImageError, AccessDenied: the image cannot be read.
            DialogueError: a reply could not be read.
            BackendError: a model, device or endpoint failed.
        """
        picture = to_rgb_image(image)
        chosen = get_strategy(strategy or self.settings.strategy)
        recorder = Recorder()
        recorded = replace(
            self,
            mllm=RecordingMllm(self.mllm, recorder),
            segmenter=RecordingSegmenter(self.segmenter, recorder),
            proposer=RecordingProposer(self.proposer, recorder) if self.proposer else None,
        )
        location, drawn = chosen.run(recorded, picture, expression, check_count(count))
        objects = tuple(
            replace(one, image=picture, expression=location.expression) for one in drawn
        )
        trace = _trace(self, recorder, chosen, picture, source, location, objects)
        return Segmentation(location, objects, trace, picture)


load = Sam4MLLM.from_pretrained


def replay(
    trace: Trace,
    image: ImageLike,
    segmenter: Segmenter,
    *,
    format: DialogueFormat | None = None,
    strategy: Strategy | None = None,
) -> Segmentation:
    """Run a recorded query again with its recorded replies: no MLLM, the same masks.

    Args:
        trace: of the recorded run.
        image: the picture it was about.
        segmenter: draws the masks.
        format: if the run was made with one that its name alone does not describe.
        strategy: if the run was made with one of your own.

    Raises:
        InputError: the trace does not hold a question that is asked, or names a strategy that is
            not built in.
    """
    recorded = dict(trace.settings)
    format_name = recorded.pop("format")
    notes = CheckpointNotes.model_validate(recorded.pop("notes"))
    recorded["thresholds"] = Thresholds(**recorded["thresholds"])
    if strategy is None and trace.strategy not in STRATEGIES:
        raise InputError(
            f"the trace was made with the strategy {trace.strategy!r}",
            hint="Pass that strategy to replay(strategy=…).",
        )
    model = Sam4MLLM(
        ReplayMllm(trace, format_name, notes),
        segmenter,
        Settings(**recorded),
        format,
        ReplayProposer(trace) if "proposer" in trace.models else None,
    )
    return model.segment(
        image, trace.expression, count=trace.count, strategy=strategy or trace.strategy
    )


def _trace(
    model: Sam4MLLM,
    recorder: Recorder,
    strategy: Strategy,
    image: RgbImage,
    source: str,
    location: Location,
    objects: Sequence[SegmentedObject],
) -> Trace:
    names = {"mllm": model.mllm.name, "segmenter": model.segmenter.name}
    if model.proposer is not None:
        names["proposer"] = model.proposer.name
    return Trace(
        expression=location.expression,
        count=location.count.value,
        strategy=strategy.name,
        status=location.status.value,
        image={
            "width": image.width,
            "height": image.height,
            "digest": image.digest,
            "source": source,
        },
        models=names,
        settings={
            **asdict(model.settings),
            "format": model.speech.name,
            "notes": model.mllm.notes.model_dump(mode="json"),
        },
        exchanges=recorder.exchanges,
        mask_calls=recorder.mask_calls,
        proposal_calls=recorder.proposal_calls,
        objects=[one.data(f"obj_{number}") for number, one in enumerate(objects, 1)],
        timings=recorder.timings,
        notes=list(location.notes),
    )
