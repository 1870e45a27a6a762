"""Pictures whose objects have names: a name is an expression that means all objects that have it.

The selection follows the authors' notebooks: a name is used if at most five objects of the picture
have it, and each of their boxes covers more than 2 % of the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sam4mllm_tool.datasets.coco import CocoImage, read_images, stream_items
from sam4mllm_tool.datasets.record import ReferringExample, Rle
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.masks.coco import segmentation_to_rle
from sam4mllm_tool.types import Box, TargetCount

MOST, SMALLEST = 5, 0.02


@dataclass(frozen=True)
class Named:
    """An object with a name; its mask as RLE or as a file."""

    name: str
    mask: Rle | Path
    box: Box


@dataclass(frozen=True)
class NamedPicture:
    """A picture and its objects, in the data set's order.

    Attributes:
        size: (width, height).
    """

    image_id: str
    image: Path
    size: tuple[int, int]
    objects: tuple[Named, ...]


def examples(
    dataset: str,
    split: str,
    pictures: Iterable[NamedPicture],
    most: int = MOST,
    smallest: float = SMALLEST,
) -> Iterator[ReferringExample]:
    """One record for each name of each picture that is asked.

    Args:
        most: largest number of objects with one name.
        smallest: share of the picture that each box must cover more than.
    """
    for picture in pictures:
        groups: dict[str, list[Named]] = {}
        for one in picture.objects:
            groups.setdefault(one.name, []).append(one)
        area = picture.size[0] * picture.size[1]
        for name, found in groups.items():
            if len(found) > most or any(one.box.area <= smallest * area for one in found):
                continue
            yield ReferringExample(
                dataset=dataset,
                split=split,
                example_id=f"{picture.image_id}/{name}",
                image_id=picture.image_id,
                image=picture.image,
                expressions=(name,),
                masks=tuple(one.mask for one in found),
                boxes=tuple(one.box for one in found),
                count=TargetCount.ONE_OR_MORE,
            )


def coco_pictures(
    file: Path,
    names: dict[int, str],
    folder_of: Folder,
    smallest: float = SMALLEST,
) -> Iterator[NamedPicture]:
    """The pictures of a COCO file, streamed; objects whose box is too small are kept without mask.

    Args:
        names: of the categories that count, by id.
        folder_of: finds a picture's file.
        smallest: share of the picture from which on a mask is read.
    """
    images = read_images(file)
    objects: dict[int, list[Named]] = {}
    for item in stream_items(file, "annotations.item"):
        image = images.get(item["image_id"])
        if image is None or item["category_id"] not in names:
            continue
        x, y, width, height = map(float, item["bbox"])
        box = Box(x, y, x + width, y + height)
        rle: Rle = {}
        if box.area > smallest * image.width * image.height:
            rle = segmentation_to_rle(item["segmentation"], image.width, image.height)
        named = Named(names[item["category_id"]], rle, box)
        objects.setdefault(item["image_id"], []).append(named)
    for number, image in images.items():
        if number in objects:
            size = (image.width, image.height)
            yield NamedPicture(str(number), folder_of(image), size, tuple(objects[number]))


class Folder:
    """Where a COCO file's pictures lie: the first of some folders that holds the first one asked.

    Args:
        folders: to look in.
        source: what to download, for the hint.
    """

    def __init__(self, folders: Iterable[Path], source: str) -> None:
        self._folders, self._source = list(folders), source
        self._found: Path | None = None

    def __call__(self, image: CocoImage) -> Path:
        """The picture's file.

        Raises:
            DatasetError: none of the folders holds it.
        """
        if self._found is None:
            held = (folder for folder in self._folders if (folder / image.file_name).exists())
            self._found = next(held, None)
        if self._found is None:
            raise DatasetError(
                f"the picture {image.file_name} is in none of the image folders",
                hint=f"Download {self._source} and unpack it to {self._folders[0]}.",
            )
        return self._found / image.file_name


def present(name: str, candidates: Iterable[Path], source: str) -> Path:
    """The first of some files that exists.

    Raises:
        DatasetError: none does.
    """
    listed = list(candidates)
    found = next((path for path in listed if path.exists()), None)
    if found is None:
        raise DatasetError(
            f"{name}: {listed[0]} is missing",
            hint=f"Download {source} and unpack it so that {listed[0]} exists.",
        )
    return found
