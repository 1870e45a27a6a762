"""Referring data sets, each as a stream of :class:`ReferringExample`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sam4mllm_tool.datasets import (
    ade20k,
    gqa,
    hub,
    llava,
    own,
    paco,
    part_imagenet,
    reasonseg,
    vqav2,
)
from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample
from sam4mllm_tool.datasets.refer import ReferFiles
from sam4mllm_tool.datasets.vqa import VqaExample
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.types import TargetCount

__all__ = [
    "DATASETS",
    "VQA_SETS",
    "Dataset",
    "ReferringExample",
    "check_present",
    "load_examples",
]

Reader = Callable[[Path, str, Protocol], Iterator[ReferringExample]]


@dataclass(frozen=True)
class Dataset:
    """A data set's name, its splits and its reader.

    Attributes:
        polygons: whether its truth can be compared at another size than the picture's.
    """

    name: str
    splits: tuple[str, ...]
    read: Reader
    polygons: bool = False


_REFER = "https://github.com/lichengunc/refer (refcoco.zip, refcoco+.zip, refcocog.zip)"
_GREFER = "https://github.com/henghuiding/gRefCOCO (grefs(unc).json, instances.json)"
_UNC = ("train", "val", "testA", "testB")
_THREE = ("train", "val", "test")
_REFER_FAMILY = (
    (ReferFiles("refcoco", "refcoco", "refs(unc)", _REFER), _UNC),
    (ReferFiles("refcoco-google", "refcoco", "refs(google)", _REFER), _THREE),
    (ReferFiles("refcoco+", "refcoco+", "refs(unc)", _REFER), _UNC),
    (ReferFiles("refcocog", "refcocog", "refs(umd)", _REFER), _THREE),
    (ReferFiles("refcocog-google", "refcocog", "refs(google)", _REFER), ("train", "val")),
    (ReferFiles("grefcoco", "grefcoco", "grefs(unc)", _GREFER, TargetCount.ZERO_OR_MORE), _UNC),
)

DATASETS: dict[str, Dataset] = {
    known.name: known
    for known in (
        *(Dataset(files.name, some, files.examples, True) for files, some in _REFER_FAMILY),
        Dataset("reasonseg", _THREE, reasonseg.examples),
        Dataset("ade20k", ("train", "val"), ade20k.examples),
        Dataset("paco", _THREE, paco.examples),
        Dataset("part-imagenet", _THREE, part_imagenet.examples),
        *(Dataset(name, _THREE, read) for name, read in own.READERS.items()),
    )
}

VQA_SETS: dict[str, Callable[[Path, str], Iterator[VqaExample]]] = {
    "vqa": llava.examples,
    "vqav2": vqav2.examples,
    "gqa": gqa.examples,
}
"""Questions without masks, by name: ``vqa`` is a LLaVA instruction file."""


def load_examples(
    name: str,
    data: str | Path,
    split: str,
    limit: int | None = None,
    protocol: Protocol = OURS,
) -> Iterator[ReferringExample]:
    """The records of a split, in the order of the files, from the original or the hub's layout.

    Args:
        name: a key of ``DATASETS``.
        data: the folder that holds the data set.
        split: one of the data set's splits.
        limit: at most this many records.
        protocol: whose reading of the files.

    Raises:
        DatasetError: unknown name or split; a file is missing (the hint says what to download and
            where to put it) or not in its layout.
    """
    if name not in DATASETS:
        raise DatasetError(f"unknown data set {name!r}", hint=f"Known ones: {', '.join(DATASETS)}.")
    dataset, folder = DATASETS[name], Path(data).expanduser()
    if split not in dataset.splits:
        raise DatasetError(
            f"{name} has no split {split!r}", hint=f"Its splits: {', '.join(dataset.splits)}."
        )
    if protocol.size != "own" and not dataset.polygons:
        raise DatasetError(
            f"{name} cannot be evaluated by protocol {protocol.name}: its masks have one size",
            hint="Use --rule size=own, or another protocol.",
        )
    packed = hub.parquet_files(folder, split)
    if packed:
        records = hub.examples(packed, name, split, protocol)
    else:
        records = dataset.read(folder, split, protocol)
    return islice(records, limit)


def check_present(name: str, data: str | Path, split: str) -> None:
    """Read one record, so that a missing file is reported before any model is loaded.

    Raises:
        DatasetError: as :func:`load_examples`.
    """
    next(load_examples(name, data, split, limit=1), None)
