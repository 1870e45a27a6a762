"""The shipped base: tokenizer, lessons, packing, and that it loads with plain transformers."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.embedded_mllm import scenes as shards
from recipes.embedded_mllm.circuits import shift_code
from recipes.embedded_mllm.forward import forward, to_pixels
from recipes.embedded_mllm.lessons import FORMAT, TOPICS, UNIT, Plan, Teacher
from recipes.embedded_mllm.model import BaseShape, build_model, build_tokenizer
from recipes.embedded_mllm.packing import Packer
from recipes.embedded_mllm.scenes import BaseScene, Reference, Thing
from recipes.embedded_mllm.vision import FLAGS, fourier, patch_answers
from recipes.embedded_mllm.world import known_words, names_of, questions_of, words_of
from sam4mllm_tool import embedded
from sam4mllm_tool.evaluation.scenes import scene_cases
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.mllm import load_mllm
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.scenes import wording
from sam4mllm_tool.scenes.sprites import functions
from sam4mllm_tool.scenes.world import ALIKE_WORLD, SMALL_WORLD
from sam4mllm_tool.testing import ColourSegmenter
from sam4mllm_tool.types import Box, TargetCount

SHAPE = BaseShape(
    image_size=24, patch_size=6, vision_width=32, vision_layers=1, vision_inner=32,
    text_width=32, text_layers=2, text_inner=32,
)  # fmt: skip
FULL = Plan(boxes=2, absent=1, what=1, what_lists=1, points=2, verify=1, ppg=1, list_sizes=(4, 9))


@pytest.fixture(scope="module")
def scene() -> BaseScene:
    """A dog on the left, two apples on the right; the lower one is bigger."""
    labels = np.zeros((128, 128), dtype=np.uint8)
    boxes = [(0, 32, 32, 96), (64, 0, 96, 32), (64, 64, 128, 128)]
    for number, (x0, y0, x1, y1) in enumerate(boxes, 1):
        labels[y0:y1, x0:x1] = number
    shares = [tuple(edge / 128 for edge in box) for box in boxes]
    things = (
        Thing("dog", None, shares[0], 0.125),
        Thing("apple", "red", shares[1], 0.0625),
        Thing("apple", "green", shares[2], 0.25),
    )
    references = (
        Reference("the dog", "category", (0,)),
        Reference("the red apple", "colour", (1,)),
        Reference("the apples", "plural", (2, 1)),
        Reference("the car", "absent", ()),
    )
    image = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    return BaseScene(image, labels, things, references)


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(build_tokenizer(words_of(SMALL_WORLD)), SHAPE.grid**2, TOPICS)


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer(words_of(SMALL_WORLD))
    for text in ("Zebra crossing, é ✂ 17 1234\n\tx", "YesNoNoYes", "[001,999,000,123] (045,678)"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    inner = tokenizer("</s><image>", add_special_tokens=False, split_special_tokens=True)
    assert not set(inner["input_ids"]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(inner["input_ids"]) == "</s><image>"


def test_held_out_wordings_are_new_sentences_of_known_words():
    def of(value, wording):
        if isinstance(value, dict):
            return {text for part in value.values() for text in of(part, wording)}
        return set(getattr(value, wording, ()))

    constants = {k: v for k, v in vars(wording).items() if k.isupper() and k != "ABSENT"}
    trained, held = (
        {t for v in constants.values() for t in of(v, w)} for w in ("train", "held_out")
    )
    for name in names_of(SMALL_WORLD):
        trained |= {*functions().get(name, ())}
        held |= {*functions("held-out").get(name, ())}
    assert len(held) > 100
    assert not trained & held
    words = {*known_words(SMALL_WORLD), "t"}  # of "isn't"
    for text in held:
        told = re.sub(r"\{\w+\}", "", text).lower()
        assert {*re.findall("[a-z]+", told)} <= words, text


def test_shards_are_described_anew_without_new_pictures(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 4)
    shards.write_shard(2, tmp_path, SMALL_WORLD, "train", 5, image_size=24)
    described = tmp_path / "train-00002.json"
    before, wanted = (tmp_path / "train-00002-images.npy").stat(), described.read_text()
    lines = [json.loads(line) for line in wanted.splitlines()]
    described.write_text("\n".join(json.dumps([things, []]) for things, _ in lines))
    shards.describe_shard(2, tmp_path, SMALL_WORLD, "train", 5)
    assert described.read_text() == wanted
    assert (tmp_path / "train-00002-images.npy").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(SystemExit, match="other scenes"):
        shards.describe_shard(2, tmp_path, SMALL_WORLD, "train", 6)
    assert described.read_text() == wanted


def test_numbers_and_answers_are_single_tokens() -> None:
    tokenizer = build_tokenizer(words_of(SMALL_WORLD))
    numbers = tokenizer.convert_tokens_to_ids([f"{n:03d}" for n in range(1000)])
    assert numbers == list(range(numbers[0], numbers[0] + 1000))
    assert tokenizer.tokenize("\nYesNoNo") == ["Ċ", "Yes", "No", "No"]
    assert tokenizer.tokenize("[281,251,863,999] [0") == [
        "[", "281", ",", "251", ",", "863", ",", "999", "]", "Ġ[", "0",
    ]  # fmt: skip
    # A reply read in pieces (as a grammar feeds it) gives the same tokens.
    whole = "\n[281,251,863,999] (822,771)"
    pieces = ["\n", "[", "281", ",", "251", ",", "863", ",", "999", "]", " (", "822", ",", "771",
              ")"]  # fmt: skip
    assert [t for piece in pieces for t in tokenizer.tokenize(piece)] == tokenizer.tokenize(whole)


def test_packed_lessons_are_what_the_model_says_alone(scene: BaseScene, packer: Packer) -> None:
    torch.manual_seed(0)
    model = build_model(build_tokenizer(words_of(SMALL_WORLD)), SHAPE).eval()
    lessons = Teacher(random.Random(4)).lessons(scene, FULL)
    assert len(lessons) >= 6
    picture = torch.from_numpy(scene.image[None].copy())
    packed = packer.pack([lessons])
    start = len(packer.prefix)
    with torch.no_grad():
        together = model.lm_head(forward(model, picture, packed)[1])[0]
        for lesson in lessons:
            tokens, _ = packer.lesson(lesson)
            alone = model(
                input_ids=torch.tensor([packer.prefix + tokens]), pixel_values=to_pixels(picture)
            ).logits[0, -len(tokens) :]
            torch.testing.assert_close(
                together[start : start + len(tokens)], alone, atol=1e-4, rtol=1e-4
            )
            start += len(tokens)


def test_targets_are_the_next_tokens_of_replies(scene: BaseScene, packer: Packer) -> None:
    lessons = Teacher(random.Random(4)).lessons(scene, FULL)
    packed = packer.pack([lessons])
    chosen = packed.targets[0] != -100
    places = chosen.nonzero()[:, 0]
    assert (packed.tokens[0][places + 1] == packed.targets[0][places]).all()
    taught = sum(
        len(packer.encode(turn.reply)) + 1 for one in lessons for turn in one.turns if turn.taught
    )
    assert int(chosen.sum()) == taught


def test_lessons_tell_the_truth(scene: BaseScene) -> None:
    teacher = Teacher(random.Random(0))
    seen = set()
    for _ in range(60):
        for lesson in teacher.lessons(scene, FULL):
            seen.add(lesson.topic)
            question, reply = lesson.turns[-1].question, lesson.turns[-1].reply
            if lesson.topic == "absent":
                assert reply == "No object found."
            if lesson.topic == "plural":
                boxes = FORMAT.read_boxes(reply, UNIT).boxes
                assert [round(box.x_min * 8) for box in boxes] == [4, 4]
            if lesson.topic in ("what", "what list", "points"):
                listed = question.rpartition("\n")[2]
                places = [
                    tuple((int(n) + 0.5) / 1000 for n in part.strip("()?").split(","))
                    for part in listed.split()
                    if part.startswith("(")
                ]
                if lesson.topic == "what list":
                    said = reply.split()
                    found = [scene.object_at(*place) for place in places]
                    sure = [_inner(scene, place) for place in places]
                    words = [scene.things[n].name if n >= 0 else "background" for n in found]
                    for a, b, ok in zip(said, words, sure, strict=True):
                        assert a == b or not ok
                if lesson.topic == "points":
                    box = FORMAT.read_boxes(question, UNIT).boxes[0]
                    things = [Box(*thing.box) for thing in scene.things]
                    target = max(range(3), key=lambda n: box_iou(box, things[n]))
                    answers = re.findall("Yes|No", reply)
                    for place, answer in zip(places, answers, strict=True):
                        inside = scene.object_at(*place) == target
                        assert answer == ("Yes" if inside else "No") or not _inner(scene, place)
    assert {"category", "colour", "plural", "absent", "what", "what list", "points", "verify",
            "ppg"} <= seen  # fmt: skip


def _inner(scene: BaseScene, place: tuple[float, ...]) -> bool:
    """Whether rounding to the number line cannot have moved the place to another object."""
    reach = 0.002
    around = {
        scene.object_at(min(max(place[0] + dx, 0), 0.999), min(max(place[1] + dy, 0), 0.999))
        for dx in (-reach, 0, reach)
        for dy in (-reach, 0, reach)
    }
    return len(around) == 1


def test_patches_answer_what_the_map_shows(scene: BaseScene) -> None:
    questions = questions_of(SMALL_WORLD)
    answers, boxes = patch_answers(scene, questions, 4)
    groups = questions.groups
    dog, upper, lower, empty = 4, 2, 15, 3  # patches of the 4 x 4 grid
    names = answers[:, groups["names"]]
    assert questions.names[int(names[dog].argmax())] == "dog"
    assert names[empty].sum() == 0
    assert np.isnan(boxes[empty]).all()
    np.testing.assert_allclose(boxes[lower], [0.5, 0.5, 1, 1])
    assert answers[upper, groups["cells"]].tolist() == [1.0] * 9
    flags = dict(zip(_flag_names(), answers[lower, groups["flags"]], strict=True))
    assert flags == _flag_names() | {"one of two": 1, "right": 1, "bottom": 1, "biggest": 1}
    # The dog lies to the left of an apple, in the table side by name.
    left_of = answers[dog, groups["relations"]][: len(questions.names)]
    assert left_of[questions.names.index("apple")] == 1
    assert left_of.sum() == 1


def _flag_names() -> dict[str, int]:
    return dict.fromkeys(FLAGS, 0)


def test_codes_shift_by_a_matrix() -> None:
    values = torch.linspace(0, 0.9, 7)
    torch.testing.assert_close(
        fourier(values) @ shift_code(0.037).T, fourier(values + 0.037), atol=1e-4, rtol=1e-4
    )
    here, near, far = fourier(torch.tensor([0.5, 0.51, 0.9]))
    assert here @ near > here @ far
    assert math.isclose(float(fourier(torch.tensor(0.3)).pow(2).mean()), 1.0, rel_tol=1e-5)


def test_the_shipped_checkpoint_loads_plainly() -> None:
    """No special code, offline: classes, sizes, and the dialogue's own strings."""
    processor = AutoProcessor.from_pretrained(embedded.MLLM, backend="pil", local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(embedded.MLLM, local_files_only=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert sum(p.numel() for p in model.parameters()) < 12e6
    assert (embedded.MLLM / "model.safetensors").stat().st_size < 30e6
    about = json.loads((embedded.MLLM / "sam4mllm.json").read_text())
    assert about["format"] == "sam4mllm"
    assert {"dog", "red", "leftmost"} <= set(about["vocabulary"])
    tokens = processor.tokenizer.tokenize(FORMAT.ask_boxes("the red disc", TargetCount.ONE, UNIT))
    assert len(tokens) == 5
    assert not model.state_dict()["lm_head.weight"].isnan().any()


def test_the_shipped_adapter_hears_what_is_half_untrue() -> None:
    """With it, what is said twice over is still found, and what is half untrue is not."""
    cases = [
        case
        for case in scene_cases(3, 300, world=ALIKE_WORLD, split="val")()
        if case.kind in ("compound", "contradicted")
    ]
    assert Counter(case.kind for case in cases).most_common()[-1][1] > 20
    found: dict[tuple[str, str], list[bool]] = {}
    for name, mllm in (("base", load_mllm(str(embedded.MLLM))), ("adapted", load_mllm())):
        model = Sam4MLLM(mllm, ColourSegmenter())
        for case in cases:
            located = model.locate(case.open_image(), case.expression, TargetCount.ZERO_OR_MORE)
            found.setdefault((name, case.kind), []).append(bool(located.objects))
    share = {key: float(np.mean(values)) for key, values in found.items()}
    assert share["base", "contradicted"] > 0.8 and share["adapted", "contradicted"] < 0.3
    assert share["adapted", "compound"] > 0.7
    assert load_mllm().name == "embedded"
