"""Protocols against the numbers that the original evaluators gave on the same files.

Recorded from LISA's ``get_mask_from_json``, ``intersectionAndUnionGPU`` and ``REFER`` (with
OpenCV 5.0), and from ReLA's ``load_grefcoco_json``, ``RefCOCOMapper`` and
``ReferEvaluator`` over detectron2, each run unchanged on the data and predictions of
``protocol_data``.
"""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from protocol_data import predicted, write_grefcoco, write_reasonseg, write_refcoco

from sam4mllm_tool.datasets import load_examples
from sam4mllm_tool.datasets.protocol import PROTOCOLS, get_protocol
from sam4mllm_tool.errors import DatasetError, InputError
from sam4mllm_tool.evaluation.benchmark import benchmark_cases
from sam4mllm_tool.evaluation.judge import judge
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.evaluation.published import PUBLISHED, published_for
from sam4mllm_tool.evaluation.report import build_report, to_markdown
from sam4mllm_tool.types import Box, Mask


class Predicting:
    """Answers with :func:`predicted`."""

    def segment(self, image, expression, count):
        pixels = predicted(expression, image.width, image.height)
        mask = None if pixels is None else Mask(pixels)
        located = SimpleNamespace(box=Box(0, 0, 1, 1))
        found = [] if mask is None else [SimpleNamespace(mask=mask, located=located, points=())]
        return SimpleNamespace(objects=found, trace=SimpleNamespace(exchanges=[]))


def outcomes(name, root, protocol):
    """The outcomes of cases that can be read, and how many cannot."""
    found, unreadable = [], 0
    for case in benchmark_cases(name, root, "val", protocol=protocol)():
        try:
            image = case.open_image()
        except DatasetError:
            unreadable += 1
            continue
        found.append(judge(Predicting(), case, image).outcome)
    return found, unreadable


def measured(found, *names):
    return {name: METRICS[name](found) for name in names}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    makers = {"reasonseg": write_reasonseg, "grefcoco": write_grefcoco, "refcoco": write_refcoco}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


# --- LISA -----------------------------------------------------------------------------------------

LISA_PAINTED = {  # pixels of (target, ignore), as LISA paints them
    "00": (677, 912), "01": (1977, 0), "02": (199656, 15832), "03": (1223, 293),
    "04": (1252, 0), "05": (1457, 0), "06": (144297, 26625), "07": (1539, 0), "08": (1390, 0),
    "09": (1651, 411), "10": (217820, 5828), "11": (879, 561), "12": (1179, 275),
    "13": (1402, 430), "14": (130414, 0), "15": (1297, 466), "16": (1297, 0), "17": (739, 973),
    "18": (196069, 12223), "19": (938, 306), "20": (1022, 118), "21": (1166, 1040),
    "22": (102198, 26420), "23": (1195, 261),
}  # fmt: skip
LISA_DIGEST, LISA_GIOU, LISA_CIOU = "8d4a4316f71c", 0.33858433, 0.4658323146648544  # fmt: skip


def test_reasonseg_is_read_and_scored_as_lisa_does(roots):
    root = roots["reasonseg"]
    lisa = get_protocol("lisa")
    whole = hashlib.sha1()
    for example in load_examples("reasonseg", root, "val", protocol=lisa):
        image = example.open_image()
        pixels = np.zeros((image.height, image.width), np.uint8)
        for mask in example.truth():
            pixels[mask.pixels] = 1
        if (ignored := example.ignored()) is not None:
            pixels[ignored.pixels] = 255
        areas = int((pixels == 1).sum()), int((pixels == 255).sum())
        assert areas == LISA_PAINTED[example.example_id], example.example_id
        whole.update(hashlib.sha1(pixels.tobytes()).hexdigest()[:12].encode())
        number = int(example.example_id)
        first = {7: "A", 8: "the café’s sign"}.get(number, f"Thing {number} 0")
        assert example.expressions == (first,)
    assert whole.hexdigest()[:12] == LISA_DIGEST
    found, _ = outcomes("reasonseg", root, lisa)
    # LISA adds 1e-5 to each union (and to its count) before it divides.
    assert measured(found, "gIoU", "cIoU") == {
        "gIoU": pytest.approx(LISA_GIOU, abs=2e-6),
        "cIoU": pytest.approx(LISA_CIOU, abs=2e-6),
    }
    ours, _ = outcomes("reasonseg", root, PROTOCOLS["ours"])
    assert len(ours) > len(found) == 24
    assert abs(METRICS["gIoU"](ours) - LISA_GIOU) > 0.002


# --- ReLA -----------------------------------------------------------------------------------------

RELA = {"gIoU": 24.96370117245612, "cIoU": 24.36498881678073, "t_acc": 66.66666666666666,
        "n_acc": 27.5}  # fmt: skip
RELA_AREAS = [112443, 133870, 112443, 0, 63968, 97308, 63968, 0, 87965, 153817, 87965, 0, 95613,
              135834, 95613, 0, 120376, 94070, 120376, 0, 39889, 107798, 39889, 0]  # fmt: skip
RELA_TOTAL = 9175384


def test_grefcoco_is_read_and_scored_as_rela_does(roots):
    root = roots["grefcoco"]
    found, unreadable = outcomes("grefcoco", root, get_protocol("rela"))
    assert unreadable == 0 and len(found) == 160
    areas = [outcome.truth_area for outcome in found]
    assert areas[0 : 2 * len(RELA_AREAS) : 2] == RELA_AREAS
    assert sum(areas) == RELA_TOTAL
    scores = measured(found, "gIoU", "cIoU", "t_acc", "n_acc")
    assert {name: 100 * value for name, value in scores.items()} == pytest.approx(RELA, abs=1e-9)
    ours, _ = outcomes("grefcoco", root, PROTOCOLS["ours"])
    for name in ("gIoU", "cIoU", "n_acc"):
        assert abs(100 * METRICS[name](ours) - RELA[name]) > 0.3, name


def test_rela_asks_the_raw_sentence_and_a_ref_of_crowds_alone_is_named(tmp_path):
    root = write_grefcoco(tmp_path)
    examples = list(load_examples("grefcoco", root, "val", protocol=get_protocol("rela")))
    assert examples[0].expressions == ("Thing, 0 0!", "Thing, 0 1!")
    assert [len(example.masks) for example in examples[:4]] == [1, 2, 1, 0], "the crowd is dropped"
    refs = json.loads((root / "grefcoco/grefs(unc).json").read_text())
    refs[0]["ann_id"] = [103]
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(refs))
    first = next(load_examples("grefcoco", root, "val", protocol=get_protocol("rela")))
    with pytest.raises(DatasetError, match="only crowds"):
        first.open_image()


# --- REFER ----------------------------------------------------------------------------------------


def test_refcoco_is_read_as_the_refer_api_does(roots):
    root = roots["refcoco"]
    whole = hashlib.sha1()
    for example in load_examples("refcoco", root, "val", protocol=get_protocol("refer")):
        (mask,) = example.truth()
        whole.update(mask.pixels.tobytes())
    assert whole.hexdigest()[:12] == "4bb67b7c13fe"
    found, _ = outcomes("refcoco", root, get_protocol("refer"))
    assert len(found) == 120
    assert measured(found, "gIoU", "cIoU") == pytest.approx(
        {"gIoU": 0.17437615837890305, "cIoU": 0.26235347443591284}
    )


# --- the rules one by one -------------------------------------------------------------------------

CHANGES = {
    "texts=first": "reasonseg", "flag=exact": "reasonseg", "ties=earlier": "reasonseg",
    "plain_text=characters": "reasonseg", "sentence=raw": "grefcoco", "sentence=lower": "refcoco",
    "crowds=drop": "grefcoco", "size=480": "grefcoco", "no_target=statement": "grefcoco",
    "exif=stored": "reasonseg",
}  # fmt: skip


def seen(root, name, protocol):
    """What a protocol makes of each case: its text, its picture's size, its truth and its score."""
    found = []
    for case in benchmark_cases(name, root, "val", protocol=protocol)():
        image = case.open_image()
        outcome = judge(Predicting(), case, image).outcome
        found.append((case.expression, image.size, outcome.truth_area, outcome.iou))
    return found


@pytest.fixture(scope="module")
def ours(roots):
    return {name: seen(roots[name], name, PROTOCOLS["ours"]) for name in ("reasonseg", "grefcoco")}


@pytest.mark.parametrize("change", CHANGES)
def test_each_rule_alone_makes_its_difference(roots, ours, change):
    name = CHANGES[change]
    changed = PROTOCOLS["ours"].with_rules([change])
    assert changed.name == f"ours {change}"
    found = seen(roots[name], name, changed)
    if change == "sentence=lower":
        texts = [text for text, *_ in found]
        assert texts == [text.strip().lower() for text in texts]
    else:
        assert found != ours[name]


def test_a_rule_that_a_set_cannot_follow_is_refused(roots):
    with pytest.raises(DatasetError, match="reasonseg cannot be evaluated by protocol rela"):
        load_examples("reasonseg", roots["reasonseg"], "val", protocol=get_protocol("rela"))


def test_unknown_protocols_and_rules_list_the_known_ones():
    with pytest.raises(InputError) as error:
        get_protocol("lissa")
    assert "ours, lisa, rela, refer" in error.value.hint
    for bad in ("size=481", "colour=red", "size", "name=x"):
        with pytest.raises(InputError, match="no rule") as error:
            PROTOCOLS["ours"].with_rules([bad])
        assert "size=own|480" in error.value.hint
    assert get_protocol("lisa").with_rules(["texts=first"]).name == "lisa"


def test_a_picture_on_its_side_is_taken_as_the_masks_say(tmp_path):
    """COCO's masks are of the picture as stored; ``ours`` sees that they fit only so."""
    root = write_refcoco(tmp_path)
    first = next(load_examples("refcoco", root, "val"))
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(first.image).save(first.image, exif=exif)
    stored = Image.open(first.image).size
    for name in ("ours", "refer"):
        example = next(load_examples("refcoco", root, "val", protocol=get_protocol(name)))
        assert example.open_image().size == stored
    for name in ("lisa", "rela"):  # as OpenCV and detectron2, which refuses it too
        example = next(load_examples("refcoco", root, "val", protocol=get_protocol(name)))
        with pytest.raises(DatasetError, match="its mask"):
            example.open_image()


def test_the_statement_counts_in_the_iou_where_a_protocol_says_so():
    none = Outcome("a", "a", 0, 0, 0, said_target=True, decides=True)
    assert none.iou == 0 and none.counted == (0, 0), "a presence is stated, its mask is empty"
    assert replace(none, said_target=False).iou == 1
    assert replace(none, decides=False).iou == 1
    lost = Outcome("b", "b", 40, 100, 60, said_target=False, decides=True)
    assert lost.iou == 0 and lost.counted == (0, 120)
    assert replace(lost, decides=False).iou == pytest.approx(1 / 3)


# --- what is published ----------------------------------------------------------------------------


def test_published_numbers_stand_beside_their_split_and_protocol_only():
    for (name, split), row in PUBLISHED.items():
        assert published_for(name, split, row.protocol, row.cases) == row.numbers
        assert published_for(name, split, row.protocol, row.cases - 1) == ()
        assert published_for(name, split, "ours", row.cases) == ()
        assert published_for(name, "train", row.protocol, row.cases) == ()
        assert published_for(name, split, f"{row.protocol} size=480", row.cases) == ()


def test_the_report_names_the_protocol_beside_every_number():
    about = {"title": "x", "strategies": ["pqpp"], "protocol": "rela size=own"}
    report = build_report([], about, where_published="Somewhere.")
    assert report["protocol"] == report["strategies"]["pqpp"]["protocol"] == "rela size=own"
    text = to_markdown(report)
    assert "| metric | pqpp, protocol rela size=own |" in text
    assert "Somewhere. This run is not that" in text
