"""ADE20K, PACO, Part-ImageNet, VQA and one's own data, from miniatures in their exact layouts."""

import json

import numpy as np
import pytest
from PIL import Image
from protocol_data import run_lengths, write_grefcoco, write_reasonseg, write_refcoco
from typer.testing import CliRunner

from sam4mllm_tool.cli import app
from sam4mllm_tool.datasets import DATASETS, VQA_SETS, load_examples
from sam4mllm_tool.datasets.own import coco as own_coco
from sam4mllm_tool.errors import DatasetError, ImageError
from sam4mllm_tool.types import Box

WIDTH, HEIGHT = 80, 50


def block(left, top, right, bottom):
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    pixels[top:bottom, left:right] = True
    return pixels


def save_picture(path, colour=(9, 90, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(path)


def polygon(left, top, right, bottom):
    return [float(n) for n in (left, top, right, top, right, bottom, left, bottom)]


# --- ADE20K ---------------------------------------------------------------------------------------


def ade_object(number, name, box, level=0):
    """An entry of "object" as version 2021_17_01 writes it."""
    left, top, right, bottom = box
    return {
        "id": number, "name": f"{name}, thing", "name_ndx": 7, "hypernym": [name], "raw_name": name,
        "attributes": [], "depth_ordering_rank": number + 1, "occluded": "no", "crop": "0",
        "parts": {"hasparts": [], "ispartof": 0 if level else [], "part_level": level},
        "instance_mask": f"ADE_train_00000005/instance_{number:03d}_ADE_train_00000005.png",
        "polygon": {"x": [left, right, right, left], "y": [top, top, bottom, bottom],
                    "click_date": []},
        "saved_date": "18-Dec-2005 06:56:48",
    }  # fmt: skip


def write_ade(root):
    scene = root / "ADE20K_2021_17_01/images/ADE/training/urban/street"
    save_picture(scene / "ADE_train_00000005.jpg")
    things = [("car", (4, 10, 34, 40), 0), ("wheel", (6, 30, 16, 40), 1),
              ("sky", (0, 0, 80, 9), 0), ("car", (40, 12, 70, 44), 0), ("bird", (1, 1, 4, 4), 0),
              ("wheel", (50, 30, 62, 44), 1)]  # fmt: skip
    objects = [ade_object(n, name, box, level) for n, (name, box, level) in enumerate(things)]
    folder = scene / "ADE_train_00000005"
    folder.mkdir()
    for n, (_, (left, top, right, bottom), _level) in enumerate(things):
        # The mask is smaller than the polygon's box: a corner is missing.
        pixels = block(left, top, right, bottom) & ~block(left, top, left + 2, top + 3)
        Image.fromarray(pixels.astype(np.uint8) * 255).save(
            folder / f"instance_{n:03d}_ADE_train_00000005.png"
        )
    notes = {"annotation": {"filename": "ADE_train_00000005.jpg", "folder": str(scene),
                            "imsize": [HEIGHT, WIDTH, 3], "source": {}, "scene": ["urban"],
                            "object": objects}}  # fmt: skip
    (scene / "ADE_train_00000005.json").write_text(json.dumps(notes))
    return root


def test_ade20k_gives_objects_and_parts_by_name(tmp_path):
    cars, wheels = load_examples("ade20k", write_ade(tmp_path), "train")
    assert cars.expressions == ("car",) and wheels.expressions == ("wheel",)
    assert cars.boxes == (Box(4, 10, 34, 40), Box(40, 12, 70, 44))
    left, _ = cars.truth()
    assert np.array_equal(left.pixels, block(4, 10, 34, 40) & ~block(4, 10, 6, 13))
    assert cars.open_image().size == (WIDTH, HEIGHT)
    assert len(wheels.masks) == 2
    # The sky is stuff, the bird covers less than 2 % of the picture.


def test_ade20k_passes_over_what_cannot_be_read(tmp_path):
    scene = next(write_ade(tmp_path).rglob("street"))
    (scene / "ADE_train_00000001.json").write_text("{")
    broken, cars, _ = load_examples("ade20k", tmp_path, "train")
    with pytest.raises(DatasetError, match=r"ADE_train_00000001\.json"):
        broken.open_image()
    (scene / "ADE_train_00000005/instance_003_ADE_train_00000005.png").unlink()
    with pytest.raises(DatasetError, match="instance_003"):
        cars.open_image()


# --- PACO, Part-ImageNet --------------------------------------------------------------------------


def coco_file(names, objects, file_name, number=391895):
    """COCO's form; ``objects``: (category id, mask, further keys)."""
    annotations = []
    for place, (category, pixels, more) in enumerate(objects, 1):
        rows, columns = np.argwhere(pixels).min(0), np.argwhere(pixels).max(0) + 1
        annotations.append({
            "id": place, "image_id": number, "category_id": category, "area": int(pixels.sum()),
            "bbox": [int(rows[1]), int(rows[0]), int(columns[1] - rows[1]),
                     int(columns[0] - rows[0])],
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths(pixels)}, **more,
        })  # fmt: skip
    image = {"id": number, "file_name": file_name, "width": WIDTH, "height": HEIGHT}
    categories = [{"id": n, "name": name, "supercategory": "X"} for n, name in names.items()]
    return {"images": [image], "annotations": annotations, "categories": categories}


def test_paco_asks_about_parts(tmp_path):
    names = {1: "bottle", 2: "bottle:neck", 3: "bottle:cap"}
    objects = [
        (1, block(5, 5, 45, 48), {"obj_ann_id": 1}),
        (2, block(10, 6, 30, 20), {"obj_ann_id": 1}),
        (3, block(10, 2, 13, 5), {"obj_ann_id": 1}),  # too small
        (2, block(50, 6, 70, 26), {"obj_ann_id": 9}),
    ]
    content = coco_file(names, objects, "train2017/000000391895.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/paco_lvis_v1_train.json").write_text(json.dumps(content))
    save_picture(tmp_path / "train2017/000000391895.jpg")
    (necks,) = load_examples("paco", tmp_path, "train")
    assert necks.expressions == ("neck of bottle",)
    assert necks.image_id == "391895", "as RefCOCO names COCO's pictures"
    assert necks.boxes == (Box(10, 6, 30, 20), Box(50, 6, 70, 26))
    assert np.array_equal(necks.truth()[1].pixels, block(50, 6, 70, 26))
    assert necks.open_image().size == (WIDTH, HEIGHT)
    with pytest.raises(DatasetError, match=r"paco_lvis_v1_val\.json is missing"):
        next(load_examples("paco", tmp_path, "val"))


def test_part_imagenet_and_the_limit_of_five(tmp_path):
    names = {0: "Quadruped Head", 1: "Quadruped Foot"}
    feet = [(1, block(12 * n, 30, 12 * n + 11, 45), {}) for n in range(6)]
    content = coco_file(names, [(0, block(3, 3, 30, 20), {}), *feet], "n02096585_1.JPEG")
    (tmp_path / "annotations/train").mkdir(parents=True)
    (tmp_path / "annotations/train/train.json").write_text(json.dumps(content))
    save_picture(tmp_path / "images/train/n02096585_1.JPEG")
    (head,) = load_examples("part-imagenet", tmp_path, "train")
    assert head.expressions == ("Quadruped Head",) and head.boxes == (Box(3, 3, 30, 20),)
    content["annotations"].pop()
    (tmp_path / "annotations/train/train.json").write_text(json.dumps(content))
    _, five = load_examples("part-imagenet", tmp_path, "train")
    assert len(five.masks) == 5


def test_pictures_that_are_nowhere_are_named(tmp_path):
    content = coco_file({0: "x"}, [(0, block(3, 3, 30, 20), {})], "n1.JPEG")
    (tmp_path / "annotations").mkdir(parents=True)
    (tmp_path / "annotations/val.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"n1\.JPEG") as error:
        next(load_examples("part-imagenet", tmp_path, "val"))
    assert str(tmp_path / "images/val") in error.value.hint


# --- one's own data -------------------------------------------------------------------------------


def write_own_coco(root):
    names = {1: "the left block", 2: "any block"}
    objects = [(1, block(2, 2, 5, 5), {}), (2, block(2, 2, 5, 5), {}), (2, block(9, 9, 40, 30), {})]
    content = coco_file(names, objects, "a.png", number=7)
    root.mkdir(parents=True, exist_ok=True)
    (root / "annotations.json").write_text(json.dumps(content))
    save_picture(root / "images/a.png")
    return root


def test_ones_own_coco_by_category_or_by_expressions(tmp_path):
    write_own_coco(tmp_path)
    left, every = load_examples("coco", tmp_path, "train")
    assert left.expressions == ("the left block",) and len(left.masks) == 1
    assert every.expressions == ("any block",) and len(every.masks) == 2, "however small"
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["annotations"][2]["expressions"] = ["the big one", "not the small one"]
    (tmp_path / "val").mkdir()
    (tmp_path / "val/annotations.json").write_text(json.dumps(content))
    save_picture(tmp_path / "val/images/a.png")
    (big,) = own_coco(tmp_path, "val")
    assert big.expressions == ("the big one", "not the small one")
    assert big.boxes == (Box(9, 9, 40, 30),)
    with pytest.raises(DatasetError, match="missing"):
        next(own_coco(tmp_path, "test"))


def test_what_annotate_writes_can_be_learnt_from(model, blocks, tmp_path):
    from sam4mllm_tool.annotate import annotate

    blocks.pil.save(tmp_path / "b.png")
    annotate(model, tmp_path, ["the red block", "all blocks"], tmp_path / "annotations.json")
    red, both = load_examples("coco", tmp_path, "train")
    assert red.expressions == ("the red block",) and red.boxes == (Box(70, 15, 190, 45),)
    assert len(both.masks) == 2 and both.open_image().size == blocks.size


def test_labelme(tmp_path):
    def shape(label, points, kind="polygon", group=None):
        return {"label": label, "points": points, "group_id": group, "description": "",
                "shape_type": kind, "flags": {}, "mask": None}  # fmt: skip

    save_picture(tmp_path / "a.jpg")
    shapes = [
        shape("the ring", [[10, 10], [30, 10], [30, 20], [10, 20]], group=1),
        shape("the ring", [[50, 10], [60, 10], [60, 20], [50, 20]], group=1),
        shape("a disc", [[40, 35], [40, 45]], "circle"),
        shape("a disc", [[2, 30], [12, 48]], "rectangle"),
    ]
    notes = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": "..\\pics\\a.jpg",
             "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(notes))
    ring, discs = load_examples("labelme", tmp_path, "train")
    (united,) = ring.truth()
    assert np.array_equal(united.pixels, block(10, 10, 30, 20) | block(50, 10, 60, 20))
    circle, square = discs.truth()
    assert circle.area == pytest.approx(np.pi * 100, rel=0.03) and circle.contains(40, 43)
    assert np.array_equal(square.pixels, block(2, 30, 12, 48))
    assert ring.open_image().size == (WIDTH, HEIGHT)
    notes["shapes"] = [shape("x", [[1, 1], [5, 5]], "line")]
    (tmp_path / "a.json").write_text(json.dumps(notes))
    (broken,) = load_examples("labelme", tmp_path, "train")
    with pytest.raises(DatasetError, match="no area"):
        broken.open_image()


def write_jsonl(root):
    save_picture(root / "a.png")
    save_picture(root / "b.png")
    Image.fromarray(block(3, 4, 33, 24)).save(root / "m.png")
    rle = {"size": [HEIGHT, WIDTH], "counts": run_lengths(block(40, 4, 70, 44))}
    rows = [
        {"image": "a.png", "text": ["the left one", "left"], "masks": ["m.png"]},
        {"image": "a.png", "text": "both", "masks": ["m.png", rle]},
        {"image": "b.png", "text": "a unicorn", "masks": []},
        {"image": "b.png", "text": "a roof", "masks": [[polygon(5, 6, 25, 16)]]},
    ]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return root


def test_json_lines(tmp_path):
    left, both, none, roof = load_examples("jsonl", write_jsonl(tmp_path), "train")
    assert left.expressions == ("the left one", "left")
    assert both.boxes == (Box(3, 4, 33, 24), Box(40, 4, 70, 44))
    assert none.masks == ()
    assert np.array_equal(roof.truth()[0].pixels, block(5, 6, 25, 16))
    assert [e.expressions for e in load_examples("jsonl", tmp_path / "data.jsonl", "train")][2] == (
        "a unicorn",
    )
    (tmp_path / "data.jsonl").write_text('{"image": "c.png", "text": "x"}\n{"picture": 1}\n')
    lost, *rest = [next(rows := load_examples("jsonl", tmp_path, "train"))]
    with pytest.raises(DatasetError, match=r"line 1.*c\.png"):
        lost.open_image()
    with pytest.raises(DatasetError, match="line 2 cannot be read"):
        next(rows)
    assert rest == []


# --- VQA ------------------------------------------------------------------------------------------


def test_llava_records_without_a_picture_are_left_out(tmp_path):
    said = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "Three."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]  # fmt: skip
    image = "coco/train2017/000000000009.jpg"
    records = [{"id": "1", "conversations": said}, {"id": 2, "image": image, "conversations": said}]
    (tmp_path / "mix.json").write_text(json.dumps(records))
    save_picture(tmp_path / "coco/train2017/000000000009.jpg")
    (only,) = VQA_SETS["vqa"](tmp_path / "mix.json", "train")
    assert only.pairs == (("How many?", "Three."), ("Sure?", "Yes."))
    assert only.open_image().size == (WIDTH, HEIGHT)
    with pytest.raises(DatasetError, match="no file"):
        next(VQA_SETS["vqa"](tmp_path / "none.json", "train"))


def test_vqa_v2(tmp_path):
    questions = {"info": {}, "task_type": "Open-Ended", "questions": [
        {"image_id": 9, "question": "What colour?", "question_id": 9000},
        {"image_id": 25, "question": "Is it day?", "question_id": 25000},
        {"image_id": 9, "question": "How many?", "question_id": 9001}]}  # fmt: skip
    annotations = {"info": {}, "annotations": [
        {"question_id": n, "image_id": n // 1000, "multiple_choice_answer": answer,
         "question_type": "x", "answer_type": "other",
         "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": 1}]}
        for n, answer in ((9001, "2"), (9000, "red"), (25000, "yes"))]}  # fmt: skip
    asked = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    asked.write_text(json.dumps(questions))
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps(annotations))
    for n in (9, 25):
        save_picture(tmp_path / f"train2014/COCO_train2014_{n:012d}.jpg")
    first, second = VQA_SETS["vqav2"](tmp_path, "train")
    shortly = "Answer the question using a single word or phrase."
    assert first.pairs == ((f"What colour?\n{shortly}", "red"), (f"How many?\n{shortly}", "2"))
    assert second.image_id == "25" and second.pairs[0][1] == "yes"
    assert first.open_image().size == (WIDTH, HEIGHT)


def test_gqa(tmp_path):
    questions = {
        "02930152": {"imageId": "2354786", "question": "Is the sky dark?", "answer": "yes",
                     "fullAnswer": "Yes, it is.", "isBalanced": True, "groups": {}},
        "07333408": {"imageId": "2375429", "question": "What is on the wall?", "answer": "pipe"},
    }  # fmt: skip
    (tmp_path / "train_balanced_questions.json").write_text(json.dumps(questions))
    save_picture(tmp_path / "images/2354786.jpg")
    first, second = VQA_SETS["gqa"](tmp_path, "train")
    assert first.pairs[0] == (
        "Is the sky dark?\nAnswer the question using a single word or phrase.", "yes",
    )  # fmt: skip
    assert first.open_image().size == (WIDTH, HEIGHT)
    with pytest.raises(ImageError):
        second.open_image()


# --- as typed -------------------------------------------------------------------------------------


def write_every_set(root):
    """Name → path of a miniature of every data set's training split."""
    found = {"grefcoco": write_grefcoco(root / "grefs", "train", pictures=3),
             "reasonseg": write_reasonseg(root / "reasonseg", "train", files=4),
             "ade20k": write_ade(root / "ade20k"), "coco": write_own_coco(root / "coco"),
             "jsonl": write_jsonl(root / "jsonl")}  # fmt: skip
    for name, folder, refs in (
        ("refcoco", "refcoco", "unc"),
        ("refcoco-google", "refcoco", "google"),
        ("refcoco+", "refcoco+", "unc"),
        ("refcocog", "refcocog", "umd"),
        ("refcocog-google", "refcocog", "google"),
    ):
        made = write_refcoco(root / name, "train")
        (made / "refcoco").rename(made / "to be named")
        (made / "to be named").rename(made / folder)
        (made / folder / "refs(unc).p").rename(made / folder / f"refs({refs}).p")
        found[name] = made
    parts = coco_file({1: "a:b"}, [(1, block(3, 3, 40, 40), {"obj_ann_id": 9})], "x/a.jpg")
    for name, file, pictures in (
        ("paco", "annotations/paco_lvis_v1_train.json", ""),
        ("part-imagenet", "annotations/train/train.json", "images/train"),
    ):
        found[name] = root / name
        (root / name / file).parent.mkdir(parents=True)
        (root / name / file).write_text(json.dumps(parts))
        save_picture(root / name / pictures / "x/a.jpg")
    save_picture(root / "labelme/a.jpg")
    shape = {"label": "it", "shape_type": "rectangle", "points": [[2, 3], [40, 30]]}
    notes = {"shapes": [shape], "imagePath": "a.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    (root / "labelme/a.json").write_text(json.dumps(notes))
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (root / "mix.json").write_text(json.dumps([{"id": 1, "image": "a.jpg", "conversations": said}]))
    save_picture(root / "a.jpg")
    save_picture(root / "vqav2/train2014/COCO_train2014_000000000009.jpg")
    asked = {"questions": [{"image_id": 9, "question": "What?", "question_id": 1}]}
    told = {"annotations": [{"question_id": 1, "multiple_choice_answer": "that"}]}
    (root / "vqav2/v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(asked))
    (root / "vqav2/v2_mscoco_train2014_annotations.json").write_text(json.dumps(told))
    save_picture(root / "gqa/images/5.jpg")
    gqa = {"1": {"imageId": "5", "question": "What?", "answer": "that"}}
    (root / "gqa/train_balanced_questions.json").write_text(json.dumps(gqa))
    return found | {"labelme": root / "labelme", "vqa": root / "mix.json",
                    "vqav2": root / "vqav2", "gqa": root / "gqa"}  # fmt: skip


def test_dialogues_are_shown_of_every_set(tmp_path):
    """Referring sets, one's own data and VQA, named alike."""
    named = write_every_set(tmp_path)
    assert set(named) == {*DATASETS, *VQA_SETS}
    for name, path in named.items():
        arguments = ["dialogues", "--data", f"{name}={path}", "--show", "2", "--ppg", "0",
                     "--preset", "published", "--out", str(tmp_path / "drawn" / name)]  # fmt: skip
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        wanted = "assistant" if name in VQA_SETS else "Please provide the bounding box"
        assert wanted in result.stdout, (name, result.stdout)
        assert list((tmp_path / "drawn" / name).glob("*.png")), name
