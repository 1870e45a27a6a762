"""VQAv2: short answers to questions about COCO's pictures.

Layout (Goyal et al., CVPR 2017)::

    v2_OpenEnded_mscoco_SPLIT2014_questions.json    v2_mscoco_SPLIT2014_annotations.json
    SPLIT2014/COCO_SPLIT2014_*.jpg      (or images/SPLIT2014, images/mscoco/images/SPLIT2014)

The answer is the one that most people gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sam4mllm_tool.datasets import named
from sam4mllm_tool.datasets.coco import CocoImage, stream_items
from sam4mllm_tool.datasets.vqa import SHORTLY, VqaExample

_SOURCE = "VQA v2 (https://visualqa.org/download.html)"


def examples(data: Path, split: str = "train") -> Iterator[VqaExample]:
    """One record for each picture, with all its questions, in the order of the questions' file.

    Raises:
        DatasetError: a missing or malformed file.
    """
    year = f"{split}2014"
    questions = named.present(
        "vqav2", [data / f"v2_OpenEnded_mscoco_{year}_questions.json"], _SOURCE
    )
    annotations = named.present("vqav2", [data / f"v2_mscoco_{year}_annotations.json"], _SOURCE)
    answers = {
        item["question_id"]: str(item["multiple_choice_answer"])
        for item in stream_items(annotations, "annotations.item")
    }
    pictures: dict[int, list[tuple[str, str]]] = {}
    for item in stream_items(questions, "questions.item"):
        if item["question_id"] in answers:
            pair = (f"{item['question']}\n{SHORTLY}", answers[item["question_id"]])
            pictures.setdefault(item["image_id"], []).append(pair)
    folders = (data / year, data / "images" / year, data / "images/mscoco/images" / year)
    folder_of = named.Folder(folders, _SOURCE)
    for number, pairs in pictures.items():
        image = folder_of(CocoImage(f"COCO_{year}_{number:012d}.jpg", 0, 0))
        yield VqaExample(str(number), image, tuple(pairs))
