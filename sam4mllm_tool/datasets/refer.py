"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO in their published layout.

Source of the layout: REFER (Kazemzadeh et al., EMNLP 2014; Yu et al., ECCV 2016) and gRefCOCO
(Liu et al., CVPR 2023). Below the data folder::

    refcoco/    refs(unc).p  refs(google).p  instances.json
    refcoco+/   refs(unc).p                  instances.json
    refcocog/   refs(umd).p  refs(google).p  instances.json
    grefcoco/   grefs(unc).json              instances.json
    images/mscoco/images/train2014/COCO_train2014_*.jpg     (or images/train2014, train2014)

A ``.json`` twin beside a ``.p`` file is preferred. ``file_name`` of a ref is not the picture's
(it carries the annotation id); the picture's comes from ``instances.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam4mllm_tool.datasets.coco import CocoImage, CocoObject, read_images, read_objects
from sam4mllm_tool.datasets.plain_pickle import read_plain_pickle
from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample, Rle
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.types import TargetCount

IMAGE_FOLDERS = (
    "images/mscoco/images/train2014",
    "images/train2014",
    "train2014",
    "coco/train2014",
    "images",
)
_COCO = "http://images.cocodataset.org/zips/train2014.zip"


@dataclass(frozen=True)
class ReferFiles:
    """Where a data set of this family lies, and where it comes from.

    Attributes:
        name: of the data set, as users call it.
        folder: below the data folder.
        refs: stem of the file with the expressions.
        source: what to download.
        count: how many targets an expression may have.
    """

    name: str
    folder: str
    refs: str
    source: str
    count: TargetCount = TargetCount.ONE

    def examples(
        self, data: Path, split: str, protocol: Protocol = OURS
    ) -> Iterator[ReferringExample]:
        """The split's refs in the order of the file, one record each.

        A ref that loses all its targets as crowds gives a record with a ``fault``.

        Raises:
            DatasetError: a missing or malformed file.
        """
        instances = self._present(data, "instances.json")
        refs = [ref for ref in self._read_refs(data) if ref["split"] == split]
        if not refs:
            raise DatasetError(
                f"{self.name} has no expressions in split {split!r}", hint="Check the split's name."
            )
        images = read_images(instances, {ref["image_id"] for ref in refs})
        size = (480, 480) if protocol.size == "480" else None
        objects = read_objects(instances, images, size)
        on_image: dict[int, list[int]] = {}
        for number, found in objects.items():
            if not found.crowd:  # its one mask may hold a target
                on_image.setdefault(found.image_id, []).append(number)
        folder = self._image_folder(data, images.values())
        for ref in refs:
            others = set(on_image.get(ref["image_id"], ())) - set(_annotation_ids(ref))
            neighbours = tuple(objects[number].mask for number in sorted(others))
            yield self._record(ref, split, images, objects, folder, neighbours, protocol)

    def _record(
        self,
        ref: dict[str, Any],
        split: str,
        images: dict[int, CocoImage],
        objects: dict[int, CocoObject],
        folder: Path,
        neighbours: tuple[Rle, ...],
        protocol: Protocol,
    ) -> ReferringExample:
        try:
            listed = [objects[number] for number in _annotation_ids(ref)]
            targets = [one for one in listed if protocol.crowds == "keep" or not one.crowd]
            if listed and not targets:
                fault = DatasetError(
                    f"ref {ref['ref_id']} of {self.name} has only crowds as targets"
                )
                return ReferringExample.unreadable(self.name, split, str(ref["ref_id"]), fault)
            return ReferringExample(
                dataset=self.name,
                split=split,
                example_id=str(ref["ref_id"]),
                image_id=str(ref["image_id"]),
                image=folder / images[ref["image_id"]].file_name,
                expressions=tuple(_asked(one, protocol) for one in ref["sentences"]),
                masks=tuple(target.mask for target in targets),
                boxes=tuple(target.box for target in targets),
                count=self.count,
                neighbours=neighbours,
                scored=tuple(target.scored for target in targets if target.scored),
                scored_size=(480, 480) if protocol.size == "480" else None,
                exif=protocol.exif,
                decides=protocol.no_target == "statement",
            )
        except KeyError as error:
            raise DatasetError(
                f"ref {ref.get('ref_id')} of {self.name} lacks {error} in its files",
                hint="The refs and instances.json do not belong together; download both again.",
            ) from error

    def _read_refs(self, data: Path) -> list[dict[str, Any]]:
        twin = data / self.folder / f"{self.refs}.json"
        if twin.exists() or self.count is TargetCount.ZERO_OR_MORE:
            path = self._present(data, twin.name)
            try:
                refs = json.loads(path.read_bytes())
            except ValueError as error:
                raise DatasetError(
                    f"{path} is not valid JSON: {error}", hint="Download the file again."
                ) from error
        else:
            path = self._present(data, f"{self.refs}.p")
            refs = read_plain_pickle(path)
        if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
            raise DatasetError(f"{path} is not a list of refs", hint="Download the file again.")
        return refs

    def _present(self, data: Path, file: str) -> Path:
        path = data / self.folder / file
        if not path.exists():
            raise DatasetError(
                f"{self.name}: {path} is missing",
                hint=f"Download {self.source} and unpack it so that {path} exists.",
            )
        return path

    def _image_folder(self, data: Path, images: Iterable[CocoImage]) -> Path:
        """The folder that holds some of the images; all must lie in one."""
        names = [image.file_name for image in images]
        folders = [data / name for name in (f"{self.folder}/images", *IMAGE_FOLDERS)]
        for folder in folders:
            if folder.is_dir() and any((folder / name).exists() for name in names):
                return folder
        raise DatasetError(
            f"{self.name}: the pictures, {names[0]} first, are in none of the image folders",
            hint=f"Download {_COCO} and unpack it to {data / IMAGE_FOLDERS[1]}.",
        )


def _asked(sentence: dict[str, Any], protocol: Protocol) -> str:
    """The expression that a protocol asks of a sentence."""
    if protocol.sentence == "raw":
        return str(sentence["raw"])
    text = str(sentence["sent"])
    return text.strip().lower() if protocol.sentence == "lower" else text


def _annotation_ids(ref: dict[str, Any]) -> list[int]:
    """Annotation ids of the targets: one number in RefCOCO, a list in gRefCOCO, where a missing
    target is written as ``[-1]``.
    """
    numbers = ref["ann_id"]
    listed = numbers if isinstance(numbers, list) else [numbers]
    return [number for number in listed if number != -1]
