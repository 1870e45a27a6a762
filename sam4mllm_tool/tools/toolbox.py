"""The tools: one registry that every framework's adapter is made from.

``Toolbox(model).call(name, arguments)`` validates, runs and returns a :class:`ToolOutput`. Errors
an agent can act on are raised as ``InputError`` or ``DialogueError`` with a hint; adapters turn
those into tool errors and let everything else pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ValidationError

from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.drawing.overlay import numbered_view
from sam4mllm_tool.errors import InputError, PromptError
from sam4mllm_tool.geometry import intersection
from sam4mllm_tool.masks.files import save_masks
from sam4mllm_tool.masks.relations import (
    combine,
    mask_distance,
    mask_iou,
    relative_position,
    share_inside,
)
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import LocatedObject, Location
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.pipeline.validation import check_image_points
from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.tools import schemas as m
from sam4mllm_tool.tools.coordinates import Coordinates, Frame
from sam4mllm_tool.tools.texts import complaint, object_line, pair_line, points_text
from sam4mllm_tool.tools.workspace import ImageRecord, ObjectRecord, Workspace, labelled_masks
from sam4mllm_tool.types import Box, Mask, Point, PointLabel, PromptPoint, TargetCount


@dataclass(frozen=True)
class ToolOutput:
    """What a tool gives back.

    Attributes:
        result: typed, JSON-ready, small; ``result.text`` is what an LLM should read.
        masks: by object_id; they never enter the text.
        picture: of ``view_objects``.
        trace: of ``segment_object``.
    """

    result: m.ToolResult
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


@dataclass(frozen=True)
class ToolSpec:
    """A tool as every framework needs it: name, description, schemas, function."""

    name: str
    description: str
    arguments: type[BaseModel]
    result: type[m.ToolResult]
    function: Callable[[Toolbox, Any], ToolOutput]
    read_only: bool = True


class Toolbox:
    """The tools over one model and one workspace.

    Args:
        model: the pipeline, or a function that loads it at the first call that needs it.
        workspace: handles and access policy; a new one by default.
        coordinates: ``"pixels"`` of the upright image, or ``"relative_1000"``: thousandths of its
            width and height, for agents that cannot know the image's size.
    """

    def __init__(
        self,
        model: Sam4MLLM | Callable[[], Sam4MLLM],
        workspace: Workspace | None = None,
        *,
        coordinates: Coordinates = "pixels",
    ) -> None:
        self._model = model
        self._loading = threading.Lock()
        self.workspace = workspace or Workspace()
        self.coordinates: Coordinates = coordinates

    @property
    def model(self) -> Sam4MLLM:
        """The pipeline, loaded now if it was not yet."""
        with self._loading:
            if not isinstance(self._model, Sam4MLLM):
                self._model = self._model()
            return self._model

    def for_workspace(self, workspace: Workspace) -> Toolbox:
        """The same model over another workspace: one client's handles are not another's."""
        return Toolbox(lambda: self.model, workspace, coordinates=self.coordinates)

    def specs(self) -> list[ToolSpec]:
        """All tools, their descriptions completed by the coordinates in use. Loads nothing."""
        unit = Frame.describe(self.coordinates)
        return [replace(spec, description=f"{spec.description} {unit}") for spec in REGISTRY]

    def call(self, name: str, arguments: Mapping[str, Any] | None = None) -> ToolOutput:
        """Run a tool.

        Raises:
            InputError: unknown tool, arguments that do not fit its schema, bad input.
            DialogueError: the MLLM's reply could not be read.
            BackendError: a model, device or endpoint failed.
        """
        spec = get_tool(name)
        try:
            parsed = spec.arguments.model_validate(dict(arguments or {}))
        except ValidationError as error:
            raise InputError(
                complaint(name, error), hint="Call again with the arguments mended."
            ) from error
        return spec.function(self, parsed)

    async def acall(self, name: str, arguments: Mapping[str, Any] | None = None) -> ToolOutput:
        """:meth:`call` in a worker thread; cancelling the task frees the model's turn."""
        return await run_in_thread(self.call, name, arguments)

    # -- the tools -------------------------------------------------------------------------------

    def segment_object(self, args: m.SegmentObjectArguments) -> ToolOutput:
        """Expression → masks in one call."""
        record = self.workspace.open_image(args.image)
        settings = self.model.settings
        settings = replace(
            settings,
            strategy=args.strategy or settings.strategy,
            points=args.points or settings.points,
            budget=args.points or settings.budget,
            thresholds=_thresholds(settings.thresholds, args.p_yes_above, args.p_no_above),
        )
        found = replace(self.model, settings=settings).segment(
            record.image, args.expression, count=args.count, source=record.source
        )
        kept = [
            self.workspace.add_object(
                replace(
                    _object_record(record, found.location, one.located),
                    points=one.points,
                    drawn=one.drawn,
                    mask=one.mask,
                )
            )
            for one in found.objects
        ]
        return self._objects_output(
            record, found.location, kept, m.ObjectsResult, trace=found.trace
        )

    def locate_object(self, args: m.LocateObjectArguments) -> ToolOutput:
        """Round 1: expression → boxes."""
        record = self.workspace.open_image(args.image)
        location = self.model.locate(
            record.image, args.expression, args.count, alternates=args.alternates
        )
        kept = [
            self.workspace.add_object(_object_record(record, location, found))
            for found in location.objects
        ]
        frame = self._frame(record)
        others = location.objects[0].alternates if location.objects else ()
        alternates = [
            m.AlternateBox(box=frame.box_out(o.box), score=_rounded(o.score)) for o in others
        ]
        return self._objects_output(record, location, kept, m.LocateResult, alternates=alternates)

    def is_point_inside_object(self, args: m.IsPointInsideObjectArguments) -> ToolOutput:
        """Round 2: is each point on the object?"""
        if args.object_id is None:
            assert args.image is not None and args.expression is not None
            opened = self.workspace.open_image(args.image)
            location = self.model.locate(opened.image, args.expression, TargetCount.ZERO_OR_MORE)
            if not location.objects:
                return self._objects_output(opened, location, [], m.PointsResult)
            found = self.workspace.add_object(_object_record(opened, location, location.objects[0]))
        else:
            found = self.workspace.object(args.object_id)
        record = self.workspace.image(found.image_id)
        frame = self._frame(record)
        location = found.location or _location_of(self.model, record, found)
        thresholds = _thresholds(self.model.settings.thresholds, args.p_yes_above, args.p_no_above)
        points = None if args.points is None else [frame.point_in(p.x, p.y) for p in args.points]
        answers = self.model.check_points(
            record.image, location, found.box, points, thresholds=thresholds
        )
        found = self.workspace.update_object(replace(found, points=_merged(found.points, answers)))
        told = [_point_result(frame, answer, found.mask) for answer in answers]
        return ToolOutput(
            m.PointsResult(
                **_header(record, "ok", points_text(_quoted(found), told), location.notes),
                object_id=found.object_id,
                points=told,
            )
        )

    def segment_with_prompts(self, args: m.SegmentWithPromptsArguments) -> ToolOutput:
        """Box and points (and a former mask) → mask."""
        former = self.workspace.object(args.object_id) if args.object_id else None
        record = (
            self.workspace.image(former.image_id)
            if former
            else self.workspace.open_image(args.image)
        )
        frame = self._frame(record)
        box = former.box if former else None
        if args.box is not None:
            box = frame.box_in(args.box)
            if intersection(box, Box(0, 0, record.image.width, record.image.height)) is None:
                raise PromptError(
                    f"the box {args.box} covers nothing of the image",
                    hint="Give [x_min, y_min, x_max, y_max] with x_min < x_max and y_min < y_max.",
                )
        given = tuple(
            PromptPoint(*frame.point_in(p.x, p.y), PointLabel(p.label)) for p in args.points
        )
        if given:
            check_image_points([Point(p.x, p.y) for p in given], record.image)
        points = _merged(former.points if former else (), given)
        refines = former is not None and former.drawn is not None and args.box is None
        logits = former.drawn.logits if refines and former and former.drawn else None
        drawn = self.model.draw(record.image, [SegmentPrompt(box, points, logits)])[0]
        drawn_record = ObjectRecord(
            image_id=record.image_id,
            name=former.name if former else "from prompts",
            box=box or drawn.mask.box or Box(0, 0, 0, 0),
            score=former.score if former else None,
            location=former.location if former else None,
            points=points,
            drawn=drawn,
            mask=drawn.mask,
        )
        # A mask that was drawn before is kept: refining it makes a new object.
        if former is not None and former.mask is None:
            kept = self.workspace.update_object(replace(drawn_record, object_id=former.object_id))
        else:
            kept = self.workspace.add_object(drawn_record)
        return self._objects_output(record, None, [kept], m.ObjectsResult)

    def compare_objects(self, args: m.CompareObjectsArguments) -> ToolOutput:
        """Areas, overlaps, distances and positions; a combined object on request."""
        record, found = self._masked_objects(args.object_ids)
        frame = self._frame(record)
        pairs = [_compare(frame, a, b) for a, b in combinations(found, 2)]
        combined = None
        if args.combine:
            mask = combine(args.combine, [_mask(one) for one in found])
            combined = self.workspace.add_object(
                ObjectRecord(
                    image_id=record.image_id,
                    name=f"{args.combine} of {', '.join(args.object_ids)}",
                    box=mask.box or Box(0, 0, 0, 0),
                    mask=mask,
                )
            )
        lines = [object_line(self._summary(frame, one)) for one in found]
        lines += [pair_line(pair) for pair in pairs]
        lines += [f"New: {object_line(self._summary(frame, combined))}"] if combined else []
        return ToolOutput(
            m.ComparisonResult(
                **_header(record, "ok", "\n".join(lines)),
                objects=[self._summary(frame, one) for one in found],
                pairs=pairs,
                combined=self._summary(frame, combined) if combined else None,
            ),
            masks={combined.object_id: _mask(combined)} if combined else {},
        )

    def view_objects(self, args: m.ViewObjectsArguments) -> ToolOutput:
        """A bounded picture with numbered masks."""
        if args.object_ids:
            record, found = self._masked_objects(args.object_ids)
        else:
            record = self.workspace.open_image(args.image)
            found = [o for o in self.workspace.objects(record.image_id) if o.mask is not None]
        numbers = {_number(one): _mask(one) for one in found}
        shown = {_number(one): one.object_id for one in found}
        picture = numbered_view(record.image, numbers, crop=args.crop, max_side=args.max_side)
        listed = ", ".join(f"{n} = {_quoted(self.workspace.object(o))}" for n, o in shown.items())
        text = f"Picture of {record.image_id}, {picture.width}x{picture.height}. " + (
            f"Marked: {listed}." if shown else "It has no objects with masks yet."
        )
        return ToolOutput(
            m.ViewResult(
                **_header(record, "ok", text),
                shown=shown,
                view_width=picture.width,
                view_height=picture.height,
            ),
            picture=picture,
        )

    def save_objects(self, args: m.SaveObjectsArguments) -> ToolOutput:
        """Masks, COCO JSON and overlay to an allowed folder."""
        record, found = self._masked_objects(args.object_ids)
        files = save_masks(
            labelled_masks(found),
            record.image,
            args.folder,
            args.formats,
            self.workspace.policy,
            stem=record.image_id,
            file_name=record.file_name,
        )
        text = f"Wrote {len(files)} files: " + ", ".join(str(f) for f in files)
        return ToolOutput(
            m.SaveResult(**_header(record, "ok", text), files=[str(f) for f in files])
        )

    # -- shared pieces ---------------------------------------------------------------------------

    def _frame(self, record: ImageRecord) -> Frame:
        return Frame(self.coordinates, record.image.width, record.image.height)

    def _masked_objects(self, object_ids: list[str]) -> tuple[ImageRecord, list[ObjectRecord]]:
        """Objects of one image that all have masks."""
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

    def _objects_output(
        self,
        record: ImageRecord,
        location: Location | None,
        kept: list[ObjectRecord],
        result: type[m.ToolResult],
        trace: Trace | None = None,
        **more: Any,
    ) -> ToolOutput:
        frame = self._frame(record)
        summaries = [self._summary(frame, one) for one in kept]
        notes = (*record.notes, *(location.notes if location else ()))
        if not kept and location is not None:
            text = (
                f"Nothing in {record.image_id} matches {location.expression!r}. "
                "Try a simpler or more general expression, or count '1' to force an answer."
            )
        else:
            text = "\n".join(object_line(summary) for summary in summaries)
            if any(one.mask is None for one in kept):
                text += "\nNext: is_point_inside_object, then segment_with_prompts."
        if issubclass(result, m.ObjectsResult):
            more["objects"] = summaries
            more["questions"] = trace.questions if trace else int(location is not None)
        for other in more.get("alternates", []):
            text += f"\nOther box: {other.box}, score {other.score}"
        header = _header(record, "found" if kept else "not_found", text, notes)
        masks = {one.object_id: one.mask for one in kept if one.mask is not None}
        return ToolOutput(result(**header, **more), masks=masks, trace=trace)

    def _summary(self, frame: Frame, one: ObjectRecord) -> m.ObjectSummary:
        labels = [point.label for point in one.points]
        size = frame.width * frame.height
        return m.ObjectSummary(
            object_id=one.object_id,
            name=one.name,
            box=frame.box_out(one.box),
            score=_rounded(one.score),
            area=one.mask.area if one.mask else None,
            area_fraction=round(one.mask.area / size, 5) if one.mask else None,
            predicted_iou=_rounded(one.drawn.predicted_iou) if one.drawn else None,
            points_inside=labels.count(PointLabel.FOREGROUND),
            points_outside=labels.count(PointLabel.BACKGROUND),
            points_undecided=labels.count(PointLabel.UNDECIDED),
        )


def get_tool(name: str) -> ToolSpec:
    """The tool of that name.

    Raises:
        InputError: no such tool.
    """
    for spec in REGISTRY:
        if spec.name == name:
            return spec
    names = ", ".join(spec.name for spec in REGISTRY)
    raise InputError(f"there is no tool {name[:60]!r}", hint=f"Tools: {names}.")


REGISTRY: tuple[ToolSpec, ...] = (
    ToolSpec(
        "segment_object",
        "Find the object(s) an expression describes and return pixel masks, in one call. Use it "
        "first for any 'which pixels' question. Masks stay in the workspace under object_ids; "
        "pass these to the other tools. On not_found, try a simpler expression or another count. "
        "If a mask looks wrong, check points with is_point_inside_object and refine with "
        "segment_with_prompts.",
        m.SegmentObjectArguments,
        m.ObjectsResult,
        Toolbox.segment_object,
    ),
    ToolSpec(
        "locate_object",
        "Find the object(s) an expression describes and return boxes only: the cheap first step "
        "when you need no mask, want other likely boxes, or want to go step by step. Next: "
        "is_point_inside_object, then segment_with_prompts with the object_id.",
        m.LocateObjectArguments,
        m.LocateResult,
        Toolbox.locate_object,
    ),
    ToolSpec(
        "is_point_inside_object",
        "Ask the model whether points lie on an object: inside, outside or undecided, with "
        "p_yes and p_no. Leave points out to probe an even grid over the box. Answers are kept "
        "with the object and used by segment_with_prompts. If the object has a mask, in_mask and "
        "disagrees show where mask and answer differ.",
        m.IsPointInsideObjectArguments,
        m.PointsResult,
        Toolbox.is_point_inside_object,
    ),
    ToolSpec(
        "segment_with_prompts",
        "Draw or refine a mask from a box and/or labelled points. With an object_id, its box, "
        "answered points and former mask are used too. Refining gives a new object_id and keeps "
        "the old mask.",
        m.SegmentWithPromptsArguments,
        m.ObjectsResult,
        Toolbox.segment_with_prompts,
    ),
    ToolSpec(
        "compare_objects",
        "Compare objects of one image: areas, overlap (IoU), containment, distance, relative "
        "position; optionally make a new object as union, intersection or difference.",
        m.CompareObjectsArguments,
        m.ComparisonResult,
        Toolbox.compare_objects,
    ),
    ToolSpec(
        "view_objects",
        "Get a picture of the image with numbered masks, whole or cropped, to check results "
        "with your own eyes.",
        m.ViewObjectsArguments,
        m.ViewResult,
        Toolbox.view_objects,
    ),
    ToolSpec(
        "save_objects",
        "Write masks as PNG, COCO JSON (RLE or polygons) and an overlay picture to an allowed "
        "folder; returns the paths.",
        m.SaveObjectsArguments,
        m.SaveResult,
        Toolbox.save_objects,
        read_only=False,
    ),
)


def _object_record(record: ImageRecord, location: Location, found: LocatedObject) -> ObjectRecord:
    return ObjectRecord(
        image_id=record.image_id,
        name=location.expression,
        box=found.box,
        score=found.score,
        location=location,
        points=found.points,
    )


def _location_of(model: Sam4MLLM, record: ImageRecord, found: ObjectRecord) -> Location:
    """A dialogue for an object that no expression found: as if its box had been the reply."""
    return model.stated(record.image, found.name, found.box)


def _merged(
    former: tuple[PromptPoint, ...], new: tuple[PromptPoint, ...]
) -> tuple[PromptPoint, ...]:
    """Former points and new ones; a new label replaces the former one at the same place."""
    by_place = {(p.x, p.y): p for p in (*former, *new)}
    return tuple(by_place.values())


def _thresholds(base: Thresholds, p_yes: float | None, p_no: float | None) -> Thresholds:
    return Thresholds(
        background=base.background if p_no is None else p_no,
        foreground=base.foreground if p_yes is None else p_yes,
    )


def _mask(one: ObjectRecord) -> Mask:
    assert one.mask is not None
    return one.mask


def _number(one: ObjectRecord) -> int:
    return int(one.object_id.partition("_")[2])


def _quoted(one: ObjectRecord) -> str:
    return f"{one.object_id} ({one.name[:60]})"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)


def _header(
    record: ImageRecord,
    status: Literal["ok", "found", "not_found"],
    text: str,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    for note in notes:
        text += f"\nNote: {note}."
    return {
        "status": status,
        "image_id": record.image_id,
        "image_width": record.image.width,
        "image_height": record.image.height,
        "text": f"{record.image_id} ({record.image.width}x{record.image.height}): {text}",
        "notes": list(notes),
    }


def _point_result(frame: Frame, answer: PromptPoint, mask: Mask | None) -> m.PointResult:
    in_mask = None if mask is None else mask.contains(answer.x, answer.y)
    sure = answer.label is not PointLabel.UNDECIDED
    x, y = frame.point_out(Point(answer.x, answer.y))
    return m.PointResult(
        x=x,
        y=y,
        answer=m.ANSWER[answer.label],
        p_yes=round(answer.p_yes or 0.0, 4),
        p_no=round(answer.p_no or 0.0, 4),
        in_mask=in_mask,
        disagrees=sure and in_mask is not None
        and in_mask != (answer.label is PointLabel.FOREGROUND),
    )  # fmt: skip


def _compare(frame: Frame, a: ObjectRecord, b: ObjectRecord) -> m.PairComparison:
    one, other = _mask(a), _mask(b)
    return m.PairComparison(
        a=a.object_id,
        b=b.object_id,
        iou=round(mask_iou(one, other), 4),
        a_inside_b=round(share_inside(one, other), 4),
        b_inside_a=round(share_inside(other, one), 4),
        distance=frame.length_out(mask_distance(one, other)) if one.area and other.area else None,
        position=relative_position(one, other),
    )
