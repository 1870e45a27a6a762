"""The shipped base: tokenizer, lessons, packing, and that it loads with plain transformers."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.embedded_mllm import scenes as shards
from recipes.embedded_mllm.circuits import shift_code
from recipes.embedded_mllm.compare import States, inserted, write_comparing
from recipes.embedded_mllm.early import EarlyHeads
from recipes.embedded_mllm.forward import ATTENTION, forward, to_pixels
from recipes.embedded_mllm.lessons import FORMAT, TOPICS, UNIT, Plan, Teacher
from recipes.embedded_mllm.model import BaseShape, build_model, build_tokenizer
from recipes.embedded_mllm.packing import Packed, Packer
from recipes.embedded_mllm.resize import interpolated
from recipes.embedded_mllm.scenes import BaseScene, Reference, Thing
from recipes.embedded_mllm.train import adapt_vocabulary
from recipes.embedded_mllm.vision import FLAGS, fourier, patch_answers, point_answers
from recipes.embedded_mllm.world import known_words, names_of, questions_of, words_of
from sam4mllm_tool import embedded
from sam4mllm_tool.evaluation.scenes import scene_cases
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.mllm import load_mllm
from sam4mllm_tool.pipeline.model import Sam4MLLM, load
from sam4mllm_tool.scenes import wording
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.sprites import functions
from sam4mllm_tool.scenes.world import ALIKE_WORLD, SMALL_WORLD, WORLDS
from sam4mllm_tool.testing import ColourSegmenter
from sam4mllm_tool.types import Box, Point, RgbImage, TargetCount

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


def test_every_written_point_is_read_with_its_answer(scene: BaseScene, packer: Packer) -> None:
    """Places and answers against the text of the questions and replies."""
    lessons = Teacher(random.Random(6)).lessons(scene, replace(FULL, points=30, jitter=0.4))
    looks = packer.looks(packer.pack([lessons]))
    written, answers = [], []
    for lesson in lessons:
        for turn in lesson.turns:
            for text in (turn.question, turn.reply):
                found = re.findall(r"\((\d{3}),(\d{3})\)", text)
                written += [((int(x) + 0.5) / 1000, (int(y) + 0.5) / 1000) for x, y in found]
                asked = text is turn.question and lesson.topic == "points"
                replied = re.findall("Yes|No", turn.reply) if asked else [""] * len(found)
                answers += [{"Yes": 1, "No": 0, "": -1}[one] for one in replied]
    np.testing.assert_allclose(looks.points, written, atol=1e-6)
    assert looks.answers.tolist() == answers
    assert {-1, 0, 1} == set(answers)


def test_points_answer_what_the_map_shows(scene: BaseScene) -> None:
    questions = questions_of(SMALL_WORLD)
    points = [(0.1, 0.6), (0.1, 0.1), (0.7, 0.1)]  # the dog, nothing, the upper apple
    answers, boxes = point_answers([scene, scene], [1, 0, 1], points, questions)
    names = answers[:, questions.groups["names"]]
    assert [questions.names[n] for n in names.argmax(1)[[0, 2]]] == ["dog", "apple"]
    assert names[1].sum() == 0 and np.isnan(boxes[1]).all()
    np.testing.assert_allclose(boxes[2], scene.things[1].box)


def _asked(scene: BaseScene, packer: Packer) -> tuple[torch.Tensor, Packed]:
    lesson = Teacher(random.Random(2)).points(scene, FULL)
    assert lesson is not None
    return torch.from_numpy(scene.image[None]), packer.pack([[lesson]])


def test_attention_in_chunks_is_attention(
    scene: BaseScene, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.embedded_mllm.forward.CHUNK", 23)
    torch.manual_seed(0)
    model = build_model(build_tokenizer(words_of(SMALL_WORLD)), SHAPE).eval()
    picture, packed = _asked(scene, packer)
    _, plain, _ = forward(model, picture, packed)
    model.set_attn_implementation(ATTENTION)
    _, chunked, _ = forward(model, picture, packed)
    torch.testing.assert_close(chunked, plain, atol=1e-4, rtol=1e-4)


def test_an_inserted_layer_is_silent_until_it_is_written(scene: BaseScene, packer: Packer) -> None:
    """Written, it tells a box that fits what is seen from one that does not."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(words_of(SMALL_WORLD))
    model = build_model(tokenizer, SHAPE).eval()
    picture, packed = _asked(scene, packer)
    deeper = inserted(model, tokenizer, 1).eval()
    assert deeper.config.text_config.num_hidden_layers == 3
    torch.testing.assert_close(
        forward(deeper, picture, packed)[1], forward(model, picture, packed)[1]
    )


def test_edges_that_fit_are_told_from_edges_that_do_not() -> None:
    """States that hold codes plainly: attention goes to the number that equals the edge seen."""
    wide = BaseShape(text_width=160, text_layers=1, text_inner=32, image_size=24, patch_size=6)
    torch.manual_seed(0)
    layer = build_model(build_tokenizer(words_of(SMALL_WORLD)), wide).model.language_model.layers[0]
    count, width = 60, 160
    boxes = torch.rand(count, 4)
    seen = torch.where(torch.arange(count)[:, None] % 2 == 0, boxes, torch.rand(count, 4))
    points, edges = torch.zeros(count, width), torch.zeros(count, 4, width)
    points[:, :64], points[:, 128] = fourier(seen).flatten(1), 4.0
    for edge in range(4):
        edges[:, edge, 64:80], edges[:, edge, 129 + edge] = fourier(boxes[:, edge]), 4.0
    start = torch.zeros(1, width)
    start[0, 140] = 8.0
    push = torch.zeros(width)
    push[150] = 1.0
    states = States(
        torch.cat([start, edges.flatten(0, 1), points]),
        torch.arange(count) + 1 + 4 * count, seen, 1 + torch.arange(count) % 2,
        torch.arange(4 * count).reshape(count, 4) + 1, boxes,
        torch.zeros(1, dtype=torch.long), push,
    )  # fmt: skip
    write_comparing(layer, states, sharpness=14.0, strength=4.0)
    raised = torch.tensor([_raised(layer, states, n)[150] for n in range(count)])
    fits, differs = raised[states.on == 1], raised[states.on == 2]
    assert (fits[:, None] > differs).float().mean() > 0.95


def _raised(layer: torch.nn.Module, states: States, number: int) -> torch.Tensor:
    """What attention adds to a point that reads the start, its question's box and itself."""
    read = [states.starts[:1], states.edges[number], states.points[number : number + 1]]
    tokens = states.tokens[torch.cat(read)]
    attention = layer.self_attn
    q, k, v = (
        getattr(attention, name)(tokens).unflatten(-1, (-1, 32)).transpose(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    weights = (q @ k.transpose(-1, -2) * 32**-0.5).softmax(-1)
    return attention.o_proj((weights @ v).transpose(0, 1).flatten(1))[-1].detach()


def test_a_grid_is_interpolated_along_its_own_axes() -> None:
    across = torch.arange(8.0).repeat(8)  # grows with x only
    finer = interpolated(torch.stack([across, -across], 1), 8, 12)
    rows = finer[:, 0].reshape(12, 12)
    torch.testing.assert_close(rows[0], rows[7])
    assert (rows[3].diff() > 0).all()
    torch.testing.assert_close(finer[:, 1], -finer[:, 0])


def test_another_vocabulary_keeps_the_rows_of_its_words() -> None:
    torch.manual_seed(0)
    old, new = (build_tokenizer(words) for words in (["red dog", "green"], ["blue dog red zebra"]))
    model = build_model(old, SHAPE)
    before = model.get_input_embeddings().weight.detach().clone()
    adapt_vocabulary(model, old, new)
    after = model.get_input_embeddings().weight.detach()
    for word in ("dog", "red", "417", "Yes", "<image>"):
        rows = [t.convert_tokens_to_ids(word) for t in (old, new)]
        torch.testing.assert_close(after[rows[1]], before[rows[0]])
    assert after[new.convert_tokens_to_ids("zebra")].abs().sum() > 0
    assert model.config.image_token_index == new.convert_tokens_to_ids("<image>")


def test_early_heads_learn_from_points_alone(scene: BaseScene, packer: Packer) -> None:
    """Gradients reach the states of points and no other."""
    torch.manual_seed(0)
    model = build_model(build_tokenizer(words_of(SMALL_WORLD)), replace(SHAPE, text_layers=4))
    picture, packed = _asked(scene, packer)
    looks = packer.looks(packed)
    states = [state.detach().requires_grad_() for state in forward(model, picture, packed)[2]]
    questions = questions_of(SMALL_WORLD)
    answers, boxes = point_answers([scene], looks.rows.tolist(), looks.points.tolist(), questions)
    heads = EarlyHeads(SHAPE.text_width, questions)
    torch.nn.init.normal_(heads.seen.answers.weight)
    sum(heads(states, looks, torch.from_numpy(answers), torch.from_numpy(boxes))).backward()
    for layer, state in enumerate(states):
        reached = torch.zeros(packed.tokens.shape[1], dtype=torch.bool)
        if state.grad is not None:
            reached = state.grad[0].abs().sum(-1) > 0
        expected = set(looks.places.tolist()) if layer in (2, 3) else set()
        assert set(reached.nonzero()[:, 0].tolist()) == expected


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


def test_the_shipped_model_hears_all_that_is_asked() -> None:
    """Two properties of one thing find it; a false one of them mostly does not."""
    model, found = Sam4MLLM(load_mllm(), ColourSegmenter()), {"compound": [], "contradicted": []}
    for case in scene_cases(3, 300, world=ALIKE_WORLD, split="val")():
        if case.kind in found:
            located = model.locate(case.open_image(), case.expression, TargetCount.ZERO_OR_MORE)
            found[case.kind].append(bool(located.objects))
    assert min(map(len, found.values())) > 20
    share = {kind: float(np.mean(values)) for kind, values in found.items()}
    assert share["compound"] > 0.85 and share["contradicted"] < 0.6
    assert load_mllm().name == "embedded"


def test_the_shipped_model_knows_the_thing_from_its_neighbour() -> None:
    """Round 2 about overlapping things: points of another object are refused."""
    model, right = load(), {"target": [], "other": []}
    for index in range(30):
        scene = render_scene(WORLDS["small-overlap"], "val", index, 77)
        image = RgbImage.from_pil(scene.image)
        for number, thing in enumerate(scene.objects):
            named = [e.text for e in expressions(scene, random.Random(0)) if e.targets == (number,)]
            points = _deep(scene, thing.box)
            if not named or not points:
                continue
            location = model.stated(image, named[0], Box(*thing.box))
            places = [Point(x, y) for x, y, _ in points]
            answers = model.check_points(image, location, Box(*thing.box), places)
            for (_, _, on), answer in zip(points, answers, strict=True):
                yes = answer.p_yes > answer.p_no
                right["target" if on == number else "other"].append(yes == (on == number))
    assert min(map(len, right.values())) > 30
    assert np.mean(right["target"]) > 0.85 and np.mean(right["other"]) > 0.7


def _deep(scene: Scene, box: tuple[float, ...]) -> list[tuple[float, float, int]]:
    """The deepest place of each object within a box, at least 4 px inside, and whose it is."""
    x0, y0, x1, y1 = (round(edge) for edge in box)
    found = []
    for number, thing in enumerate(scene.objects):
        depth = distance_transform_edt(np.pad(thing.mask, 1))[1:-1, 1:-1]
        inner = depth[y0:y1, x0:x1]
        if inner.size and inner.max() >= 4:
            row, column = np.unravel_index(inner.argmax(), inner.shape)
            found.append((x0 + column + 0.5, y0 + row + 0.5, number))
    return found
