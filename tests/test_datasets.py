"""Data sets read from miniatures in their exact on-disk layouts."""

import json
import os
import pickle
import sys
from collections import OrderedDict
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam4mllm_tool.datasets import DATASETS, load_examples
from sam4mllm_tool.datasets.plain_pickle import read_plain_pickle
from sam4mllm_tool.errors import DatasetError, InputError
from sam4mllm_tool.types import Box, Mask, TargetCount

WIDTH, HEIGHT = 60, 40
SQUARE = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
TWO_PARTS = [
    [0.0, 0.0, 8.0, 0.0, 8.0, 8.0, 0.0, 8.0],
    [40.0, 30.0, 50.0, 30.0, 50.0, 38.0, 40.0, 38.0],
]


def rows(*spans):
    """A mask that is true on these (top, bottom, left, right) rectangles."""
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    for top, bottom, left, right in spans:
        pixels[top:bottom, left:right] = True
    return pixels


def run_lengths(pixels):
    flat = pixels.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.r_[0, flat, 0]))
    marks = np.r_[0, edges, flat.size] if flat.size not in edges else np.r_[0, edges]
    return np.diff(marks).tolist()


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(path)


def instances():
    crowd = rows((20, 30, 5, 15))
    return {
        "info": {"year": 2014},
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 11, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400.0,
             "bbox": [10.0, 5.0, 20.0, 20.0], "segmentation": SQUARE},
            {"id": 12, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 144.0,
             "bbox": [0.0, 0.0, 50.0, 38.0], "segmentation": TWO_PARTS},
            {"id": 13, "image_id": 2, "category_id": 1, "iscrowd": 1, "area": 100.0,
             "bbox": [5, 20, 10, 10],
             "segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths(crowd)}},
            {"id": 14, "image_id": 3, "category_id": 1, "iscrowd": 0, "area": 1.0,
             "bbox": [0, 0, 1, 1], "segmentation": [[1.0, 2.0, 3.0, 4.0]]},
        ],
        "images": [
            {"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "width": WIDTH, "height": HEIGHT}
            for n in (1, 2, 3)
        ],
    }  # fmt: skip


def ref(number, image, annotation, split, *texts, **more):
    return {
        "ref_id": number, "ann_id": annotation, "image_id": image, "split": split, "category_id": 1,
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "sent_ids": list(range(len(texts))),
        "sentences": [{"sent": t, "raw": t.upper(), "tokens": t.split(), "sent_id": i}
                      for i, t in enumerate(texts)],
        **more,
    }  # fmt: skip


REFS = [
    ref(0, 1, 11, "val", "the square", "square thing"),
    ref(1, 1, 12, "train", "two parts"),
    ref(2, 2, 13, "val", "the crowd"),
    ref(3, 3, 14, "testA", "no area"),
]


def refer_folder(root, name="refcoco", file="refs(unc).p", refs=REFS):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "instances.json").write_text(json.dumps(instances()))
    if file.endswith(".p"):
        (folder / file).write_bytes(pickle.dumps(refs, protocol=0))
    else:
        (folder / file).write_text(json.dumps(refs))
    for n in (1, 2, 3):
        picture(root / "images/mscoco/images/train2014" / f"COCO_train2014_{n:012d}.jpg", (n, 0, 0))
    return root


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("refcoco", "refcoco", "refs(unc).p"),
        ("refcoco+", "refcoco+", "refs(unc).p"),
        ("refcocog", "refcocog", "refs(umd).p"),
        ("refcocog-google", "refcocog", "refs(google).p"),
        ("refcoco-google", "refcoco", "refs(google).p"),
        ("refcoco", "refcoco", "refs(unc).json"),
    ],
)
def test_the_refer_layout(tmp_path, name, folder, file):
    records = list(load_examples(name, refer_folder(tmp_path, folder, file), "val"))
    square, crowd = records
    assert square.expressions == ("the square", "square thing")
    assert [case for case, _ in square.cases()] == ["0:0", "0:1"]
    assert np.array_equal(square.truth()[0].pixels, rows((5, 25, 10, 30)))
    assert square.boxes == (Box(10, 5, 30, 25),)
    assert square.count is TargetCount.ONE
    assert square.open_image().size == (WIDTH, HEIGHT)
    assert np.array_equal(crowd.truth()[0].pixels, rows((20, 30, 5, 15)))
    assert crowd.image_id == "2" and crowd.dataset == name
    (beside,) = square.others()
    assert np.array_equal(beside.pixels, rows((0, 8, 0, 8), (30, 38, 40, 50))), "no ref's split"
    assert crowd.others() == []


def test_a_crowd_is_no_neighbour(tmp_path):
    """Its one mask may hold the target."""
    content = instances()
    content["annotations"][2]["image_id"] = 1
    refer_folder(tmp_path, refs=REFS[:1])
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(content))
    (square,) = load_examples("refcoco", tmp_path, "val")
    assert [mask.area for mask in square.others()] == [8 * 8 + 10 * 8]


def test_polygons_are_united_and_degenerate_ones_are_empty(tmp_path):
    refer_folder(tmp_path)
    (two_parts,) = load_examples("refcoco", tmp_path, "train")
    assert np.array_equal(two_parts.truth()[0].pixels, rows((0, 8, 0, 8), (30, 38, 40, 50)))
    (no_area,) = load_examples("refcoco", tmp_path, "testA")
    assert no_area.truth()[0].area == 0, "four numbers are no box here"


def test_polygons_are_rasterised_as_pycocotools_does(tmp_path):
    corners = np.random.default_rng(0).uniform(0, 40, (6, 2)).ravel().tolist()
    content = instances()
    content["annotations"][0]["segmentation"] = [corners]
    refer_folder(tmp_path)
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(content))
    record = next(load_examples("refcoco", tmp_path, "val"))
    reference = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([corners], HEIGHT, WIDTH)))
    assert np.array_equal(record.truth()[0].pixels, reference.astype(bool))


def test_grefcoco_has_several_targets_or_none(tmp_path):
    refs = [
        ref(0, 1, [11, 12], "val", "both things", no_target=False),
        ref(1, 2, [-1], "val", "a unicorn", no_target=True),
    ]
    refer_folder(tmp_path, "grefcoco", "grefs(unc).json", refs)
    both, none = load_examples("grefcoco", tmp_path, "val")
    assert len(both.masks) == len(both.boxes) == 2
    assert (none.masks, none.boxes) == ((), ())
    assert both.others() == [], "targets are no neighbours"
    assert [mask.area for mask in none.others()] == []
    assert both.count is none.count is TargetCount.ZERO_OR_MORE


def test_a_limit_and_a_stream(tmp_path):
    refer_folder(tmp_path)
    assert len(list(load_examples("refcoco", tmp_path, "val", limit=1))) == 1


# --- what is missing or broken ----------------------------------------------------------------


def test_a_missing_file_names_what_to_download_and_where(tmp_path):
    for name, dataset in DATASETS.items():
        with pytest.raises(DatasetError) as error:
            next(load_examples(name, tmp_path, dataset.splits[0]))
        assert name == "labelme" or "Download" in error.value.hint
        assert str(tmp_path) in error.value.message + error.value.hint
        assert isinstance(error.value, InputError)


def test_missing_pictures_are_named(tmp_path):
    refer_folder(tmp_path)
    for file in (tmp_path / "images/mscoco/images/train2014").iterdir():
        file.unlink()
    with pytest.raises(DatasetError, match=r"COCO_train2014_000000000001\.jpg") as error:
        next(load_examples("refcoco", tmp_path, "val"))
    assert "train2014.zip" in error.value.hint


def test_files_that_do_not_belong_together(tmp_path):
    refer_folder(tmp_path, refs=[ref(0, 1, 999, "val", "x")])
    with pytest.raises(DatasetError, match="belong together"):
        next(load_examples("refcoco", tmp_path, "val"))


def test_pictures_that_do_not_belong_to_the_masks(tmp_path):
    refer_folder(tmp_path)
    record = next(load_examples("refcoco", tmp_path, "val"))
    Image.new("RGB", (HEIGHT, WIDTH)).save(record.image)
    with pytest.raises(DatasetError, match="40×60"):
        record.open_image()


@pytest.mark.parametrize("file", ["refcoco/instances.json", "refcoco/refs(unc).json"])
def test_cut_off_json(tmp_path, file):
    refer_folder(tmp_path, file="refs(unc).json")
    path = tmp_path / file
    path.write_text(path.read_text()[:-200])
    with pytest.raises(DatasetError, match="not valid JSON"):
        list(load_examples("refcoco", tmp_path, "val"))


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(DatasetError, match="unknown data set") as error:
        load_examples("cocoa", tmp_path, "val")
    assert "reasonseg" in error.value.hint
    with pytest.raises(DatasetError, match="no split 'testC'"):
        load_examples("refcoco", tmp_path, "testC")


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    refer_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "ijson", None)
    with pytest.raises(DatasetError, match="ijson") as error:
        next(load_examples("refcoco", tmp_path, "val"))
    assert "sam4mllm-tool[eval]" in error.value.hint


# --- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_out_of_any_protocol(tmp_path, protocol):
    value = [{"a": [1, 2.5, None, True], "b": ("x", {"y": 2**70})}, "ümläut"]
    path = tmp_path / "x.p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert read_plain_pickle(path) == value


def test_a_python_2_pickle(tmp_path):
    # cPickle.dumps([{"sent": "the caf\xc3\xa9", "raw": u"Caf\xe9", "id": 3L}], 0) of Python 2.7
    path = tmp_path / "x.p"
    path.write_bytes(
        b"(lp1\n(dp2\nS'sent'\np3\nS'the caf\\xc3\\xa9'\np4\nsS'raw'\np5\nVCaf\\u00e9\np6\n"
        b"sS'id'\np7\nL3L\nsa."
    )
    assert read_plain_pickle(path) == [{"sent": "the café", "raw": "Café", "id": 3}]


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


HOSTILE = {
    "class": pickle.dumps(OrderedDict(a=1)),
    "numpy": pickle.dumps(np.float64(1)),
    "function": pickle.dumps(print),
    "inst opcode": b"(S'x'\nios\nsystem\n.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Pname\n.",
    "cut off": pickle.dumps(REFS)[:-20],
    "not a pickle": b"hello",
    "empty": b"",
    "huge memo": b"\x80\x02]r\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_anything_but_plain_values_is_refused(tmp_path, data):
    path = tmp_path / "x.p"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="not a pickle of plain values"):
        read_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_does_not_run(tmp_path, protocol):
    marker = tmp_path / "attacked"
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([Attack(str(marker))], protocol=protocol))
    with pytest.raises(DatasetError, match="mkdir"):
        read_plain_pickle(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the attack is real: the plain unpickler runs it"


# --- ReasonSeg -----------------------------------------------------------------------------------


def polygon(label, left, top, right, bottom):
    points = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return {"label": label, "shape_type": "polygon", "points": points}


def reasonseg_folder(root, shapes, text="something to sit on", encoding="utf-8"):
    (root / "val").mkdir(exist_ok=True)
    picture(root / "val/a.jpg", (9, 9, 9))
    notes = {"text": [text], "is_sentence": True, "shapes": shapes}
    (root / "val/a.json").write_bytes(json.dumps(notes, ensure_ascii=False).encode(encoding))
    return root


def test_reasonseg_shapes(tmp_path):
    shapes = [
        polygon("target", 12, 12, 15, 15),  # small: painted last, stays on top
        polygon("ignore", 10, 10, 19, 19),
        polygon("target", 0, 0, 29, 29),
        polygon("flag", 0, 0, 59, 39),
    ]
    (record,) = load_examples("reasonseg", reasonseg_folder(tmp_path, shapes), "val")
    ignored = rows((10, 20, 10, 20)) & ~rows((12, 16, 12, 16))
    assert np.array_equal(record.ignored().pixels, ignored)
    assert np.array_equal(record.truth()[0].pixels, rows((0, 30, 0, 30)) & ~ignored)
    assert record.boxes == (Box(0, 0, 30, 30),)
    assert record.expressions == ("something to sit on",)


def test_reasonseg_without_ignored_region_and_in_a_windows_code_page(tmp_path):
    shapes = [polygon("target", 1, 1, 3, 3)]
    (record,) = load_examples(
        "reasonseg", reasonseg_folder(tmp_path, shapes, "the café’s sign", "cp1252"), "val"
    )
    assert record.ignored() is None
    assert record.expressions == ("the café’s sign",)


def test_a_broken_reasonseg_file_is_named(tmp_path):
    reasonseg_folder(tmp_path, [])
    (tmp_path / "val/a.json").write_text("{")
    with pytest.raises(DatasetError, match=r"a\.json"):
        next(load_examples("reasonseg", tmp_path, "val")).open_image()
    (tmp_path / "val/a.jpg").unlink()
    with pytest.raises(DatasetError, match=r"a\.jpg is missing"):
        next(load_examples("reasonseg", tmp_path, "val")).open_image()


# --- the hub's layout ----------------------------------------------------------------------------


def encoded(colour):
    buffer = BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_the_hubs_refcoco(tmp_path):
    crowd = rows((20, 30, 5, 15))
    table = pa.table({
        "question_id": ["q0", "q1"],
        "image": [encoded("red"), encoded("blue")],
        "answer": [["the square", "square thing"], ["the crowd"]],
        "segmentation": pa.array([SQUARE[0], run_lengths(crowd)], pa.list_(pa.float32())),
        "bbox": pa.array([[10, 5, 20, 20], [5, 20, 10, 10]], pa.list_(pa.float32())),
        "iscrowd": [0, 1],
        "file_name": ["COCO_train2014_000000000001_0.jpg", "COCO_train2014_000000000002_2.jpg"],
    })  # fmt: skip
    (tmp_path / "data").mkdir()
    parquet.write_table(table.slice(0, 1), tmp_path / "data/testA-00000-of-00002.parquet")
    parquet.write_table(table.slice(1, 1), tmp_path / "data/testA-00001-of-00002.parquet")
    square, people = load_examples("refcoco", tmp_path, "testA")
    assert np.array_equal(square.truth()[0].pixels, rows((5, 25, 10, 30)))
    assert np.array_equal(people.truth()[0].pixels, crowd)
    assert square.boxes == (Box(10, 5, 30, 25),)
    assert square.image_id == "COCO_train2014_000000000001"
    assert square.others() is None, "these rows do not say what else there is"
    assert square.open_image().array[0, 0].tolist() == [255, 0, 0]
    assert square.expressions == ("the square", "square thing")


def test_the_hubs_reasonseg(tmp_path):
    truth = rows((3, 9, 4, 30))
    table = pa.table({
        "image": [encoded("red")], "text": ["what to sit on"], "image_id": ["x1"],
        "mask": pa.array([truth.tolist()], pa.list_(pa.list_(pa.bool_()))),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    (record,) = load_examples("reasonseg", tmp_path, "test")
    assert record.truth() == [Mask(truth)]
    assert record.boxes == (Box(4, 3, 30, 9),)


def test_a_parquet_file_of_another_kind_is_named(tmp_path):
    parquet.write_table(pa.table({"image": [encoded("red")]}), tmp_path / "val-00000.parquet")
    with pytest.raises(DatasetError, match="not in the known layout"):
        next(load_examples("refcoco", tmp_path, "val"))
