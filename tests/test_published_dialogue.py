"""The dialogue as the model reads it: recorded ids, published templates, real vocabularies."""

from __future__ import annotations

import pytest

from sam4mllm_tool import embedded
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.mllm.encoding import DialogueEncoder
from sam4mllm_tool.mllm.loading import load_processor
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.types import TargetCount

FORM = Sam4MllmFormat()
SYSTEM = Turn("system", FORM.system_prompt or "")
ROUND_1 = Turn(
    "user", FORM.ask_boxes("the red star left of a qzx", TargetCount.ONE_OR_MORE, (640, 480))
)
ROUND_2 = Turn(
    "user",
    "Check if the points listed below are located on the object with bounding box "
    "[281,251,863,999]:\n(822,771) (300,900)",
)
BOXES = "[281,251,863,999] [010,020,300,400]"

# Recorded while the format itself wrote a newline before every reply, which is how the shipped
# weights were made; the prompt then ended before that newline.
_ASKED = [1264, 1543, 1497, 1534, 1439, 1462, 1285, 226, 86, 95, 93, 1275]
_ANSWERED = [204, 64, 543, 17, 513, 17, 1125, 17, 1261, 66, 1279, 272, 17, 282, 17, 562, 17, 662,
             66, 2]  # fmt: skip
_CHECKED = [4, 1266, 64, 543, 17, 513, 17, 1125, 17, 1261, 66, 1276, 13, 1084, 17, 1033, 14, 1280,
            562, 17, 1162, 14]  # fmt: skip
_NEWLINE = 204
RECORDED: list[tuple[Dialogue, list[int]]] = [
    ((SYSTEM, ROUND_1), [1, 1262, 4, 3, *_ASKED, 5]),
    (
        (SYSTEM, ROUND_1, Turn("assistant", BOXES), ROUND_2),
        [1, 1262, 4, 3, *_ASKED, 5, *_ANSWERED, *_CHECKED, 5],
    ),
    (
        (
            ROUND_1, Turn("assistant", "No object found."), ROUND_2, Turn("assistant", "YesNo"),
            Turn("user", "What is at (010,020)?"),
        ),
        [1, 4, 3, *_ASKED, 5, 204, 1274, 2, *_CHECKED, 5, 204, 1277, 1278, 2, 4, 1283, 1426, 1301,
         1280, 272, 17, 282, 14, 36, 5],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("dialogue", "ids"), RECORDED)
def test_the_embedded_model_reads_the_ids_it_was_made_with(
    dialogue: Dialogue, ids: list[int]
) -> None:
    encoder = DialogueEncoder(load_processor(embedded.MLLM))
    assert encoder.text_ids(dialogue) == [*ids, _NEWLINE]
    assert encoder.encode_continuation("YesNo") == [1277, 1278]
    assert encoder.encode_continuation("[010,") == [64, 272, 17]
