"""GQA: short answers to compositional questions.

Layout (Hudson and Manning, CVPR 2019): ``SPLIT_balanced_questions.json``, an object {question id:
{"imageId", "question", "answer", …}}, and ``images/ID.jpg``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sam4mllm_tool.datasets import named
from sam4mllm_tool.datasets.record import need_extra
from sam4mllm_tool.datasets.vqa import SHORTLY, VqaExample
from sam4mllm_tool.errors import DatasetError

_SOURCE = "GQA (https://cs.stanford.edu/people/dorarad/gqa/download.html)"


def examples(data: Path, split: str = "train") -> Iterator[VqaExample]:
    """One record for each picture, with all its questions, in the order of the file.

    Raises:
        DatasetError: a missing or malformed file.
    """
    ijson = need_extra("ijson")
    name = f"{split}_balanced_questions.json"
    file = named.present("gqa", (data / name, data / "questions" / name), _SOURCE)
    pictures: dict[str, list[tuple[str, str]]] = {}
    try:
        with file.open("rb") as stream:
            for _, item in ijson.kvitems(stream, ""):
                pair = (f"{item['question']}\n{SHORTLY}", str(item["answer"]))
                pictures.setdefault(str(item["imageId"]), []).append(pair)
    except (ijson.JSONError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{file} is not in GQA's layout: {error!r}", hint=f"Download {_SOURCE}."
        ) from error
    for number, pairs in pictures.items():
        yield VqaExample(number, data / "images" / f"{number}.jpg", tuple(pairs))
