"""Dialogue data and LoRA: exact strings, exact loss tokens, resumption, reload."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from recipes.embedded_mllm.model import (
    BaseShape,
    build_model,
    build_processor,
    build_tokenizer,
    save_base,
)
from sam4mllm_tool import embedded
from sam4mllm_tool.datasets import llava
from sam4mllm_tool.datasets.record import ReferringExample
from sam4mllm_tool.datasets.vqa import SceneVqa, VqaExample
from sam4mllm_tool.errors import CheckpointError, DatasetError, InputError
from sam4mllm_tool.evaluation.cases import cases_of
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.mllm import load_mllm
from sam4mllm_tool.mllm.loading import load_adapter, load_model, load_processor
from sam4mllm_tool.mllm.placement import choose_placement
from sam4mllm_tool.pipeline.points import grid_points
from sam4mllm_tool.protocols import MaskCandidate, SegmentPrompt
from sam4mllm_tool.scenes.world import SMALL_WORLD
from sam4mllm_tool.testing import ColourSegmenter
from sam4mllm_tool.training.candidates import Candidates
from sam4mllm_tool.training.convergence import convergence_page
from sam4mllm_tool.training.dialogues import Conversation, Recipe, conversations
from sam4mllm_tool.training.layers import adapt, take_over
from sam4mllm_tool.training.lora import train
from sam4mllm_tool.training.progress import HeldOut
from sam4mllm_tool.training.recipe import PRESETS, LoraRecipe
from sam4mllm_tool.training.sequences import Collator, ConversationEncoder
from sam4mllm_tool.types import Box, Mask, PointLabel, RgbImage, TargetCount

SHAPE = BaseShape(
    image_size=24, patch_size=12, vision_width=32, vision_layers=1, vision_inner=32,
    text_width=32, text_layers=2, text_inner=32,
)  # fmt: skip
SIDE = 40


def _picture() -> bytes:
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[5:25, 10:30] = (200, 0, 0)
    pixels[30:38, 2:12] = (0, 0, 200)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _example(
    number: int, image_id: str, *boxes: tuple[int, int, int, int], count: TargetCount
) -> ReferringExample:
    masks = []
    for x0, y0, x1, y1 in boxes:
        pixels = np.zeros((SIDE, SIDE), dtype=bool)
        pixels[y0:y1, x0:x1] = True
        masks.append(Mask(pixels).to_rle())
    return ReferringExample(
        "toy", "train", f"{number}", image_id, _picture(), (f"thing {number}",), tuple(masks),
        tuple(Box(*map(float, box)) for box in boxes), count=count,
    )  # fmt: skip


def _examples() -> list[ReferringExample]:
    red, blue = (10, 5, 30, 25), (2, 30, 12, 38)
    return [
        _example(0, "a", red, count=TargetCount.ONE),
        _example(1, "a", red, blue, count=TargetCount.ZERO_OR_MORE),
        _example(2, "b", count=TargetCount.ZERO_OR_MORE),
        _example(3, "b", blue, count=TargetCount.ONE),
    ]


PQPP = Recipe(ppg_share=0.0, candidates=Candidates(asked=(3, 6), spread=12, radius=0.2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained base with the embedded model's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer(["thing", "object"])
    model = build_model(tokenizer, SHAPE)
    save_base(folder, model, build_processor(tokenizer, SHAPE), ["thing"], "small", SHAPE)
    return folder


def _asked(conversation: Conversation) -> list[tuple[str, str]]:
    turns = conversation.turns
    return [(turns[n].text, turns[n + 1].text) for n in range(0, len(turns), 2)]


def test_conversations_are_the_published_strings() -> None:
    found = {c.image_id: _asked(c) for c in conversations(_examples(), PQPP)}
    flat = [pair for pairs in found.values() for pair in pairs]
    where = "Please provide the bounding box coordinate of the region this sentence describes"
    assert (f'{where} (1):\n"thing 0".', "[250,125,750,625]") in flat
    # Two targets, from left to right.
    both = "[050,750,300,950] [250,125,750,625]"
    assert (f'{where} (0+):\n"thing 1".', both) in flat
    assert (f'{where} (0+):\n"thing 2".', "No object found.") in flat
    second = [pair for pair in flat if pair[0].startswith("Check if the points listed below are")]
    assert len(second) == 3  # one for each reference that has a target
    for question, reply in second:
        assert 3 <= question.count("(") <= 6
        assert reply.count("Yes") + reply.count("No") == question.count("(")
        assert reply.replace("Yes", "").replace("No", "") == ""


def test_point_labels_are_those_of_the_mask() -> None:
    form = get_format("sam4mllm")
    labelled = 0
    for seed in range(6):
        for conversation in conversations(_examples(), replace(PQPP, seed=seed)):
            for number, points in conversation.points.items():
                question, reply = _asked(conversation)[number]
                expression = _asked(conversation)[number - 1][0].split('"')[1]
                example = next(e for e in _examples() if e.expressions[0] == expression)
                asked = form.read_boxes(question, (SIDE, SIDE)).boxes[0]
                centre = ((asked.x_min + asked.x_max) / 2, (asked.y_min + asked.y_max) / 2)
                mask = next(m for m in example.truth() if m.contains(*centre))
                said = reply.replace("Yes", "Y").replace("No", "N")
                assert said == "".join("Y" if mask.contains(p.x, p.y) else "N" for p in points)
                labelled += len(points)
    assert labelled > 40


def test_same_seed_same_conversations_whatever_came_before() -> None:
    whole = [_asked(c) for c in conversations(_examples(), PQPP)]
    tail = [_asked(c) for c in conversations(_examples()[2:], PQPP)]
    assert whole[-len(tail) :] == tail
    assert whole == [_asked(c) for c in conversations(_examples(), PQPP)]
    assert whole != [_asked(c) for c in conversations(_examples(), replace(PQPP, seed=1))]


def test_grids_are_those_of_the_pipeline() -> None:
    form, seen = get_format("sam4mllm"), 0
    exact = replace(PQPP.candidates, grids=1.0, jitter=0.0)
    for conversation in conversations(_examples(), replace(PQPP, candidates=exact)):
        for number, points in conversation.points.items():
            question, _ = _asked(conversation)[number]
            (box,) = form.read_boxes(question, (SIDE, SIDE)).boxes
            expected = grid_points(box, len(points))
            assert [(p.x, p.y) for p in points] == [pytest.approx(p, abs=0.05) for p in expected]
            seen += 1
    assert seen == 3


def test_excluded_pictures_do_not_appear() -> None:
    found = list(conversations(_examples(), PQPP, excluded={"a"}))
    assert [c.image_id for c in found] == ["b"]


def test_references_are_packed_up_to_the_limit() -> None:
    many = [_example(n, "a", (10, 5, 30, 25), count=TargetCount.ONE) for n in range(7)]
    found = list(conversations(many, replace(PQPP, references=3)))
    assert [c.topics.count("box") for c in found] == [3, 3, 1]


@dataclass
class DiscSegmenter(ColourSegmenter):
    """Draws discs around the foreground points, so that where they lie matters."""

    asked: list[SegmentPrompt] = field(default_factory=list)

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        self.asked += prompts
        return [(MaskCandidate(Mask(self.draw(p)), np.zeros((1, 1), np.float32), 1.0),)
                for p in prompts]  # fmt: skip

    @staticmethod
    def draw(prompt: SegmentPrompt) -> np.ndarray:
        rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
        pixels = np.zeros((SIDE, SIDE), dtype=bool)
        for point in prompt.points:
            if point.label is PointLabel.FOREGROUND:
                pixels |= (columns - point.x) ** 2 + (rows - point.y) ** 2 < 36
        return pixels


def test_ppg_keeps_the_groups_the_segmenter_does_best_with() -> None:
    example = _example(0, "a", (10, 5, 30, 25), count=TargetCount.ONE)
    (mask,) = example.truth()
    for seed in range(5):
        segmenter = DiscSegmenter()
        recipe = Recipe(ppg_share=1.0, positive=2, negative=1, tries=6, best=1, seed=seed)
        (conversation,) = conversations([example], recipe, segmenter)
        (pair,) = _asked(conversation)
        assert pair[0].startswith("Please provide the bounding box and prompt points, 2 on the")
        assert pair[1].startswith("[250,125,750,625] (")
        points = conversation.points[0]
        assert [mask.contains(p.x, p.y) for p in points] == [True, True, False]
        drawn = [segmenter.draw(prompt) for prompt in segmenter.asked]
        fit = [(d & mask.pixels).sum() / (d | mask.pixels).sum() for d in drawn]
        assert len(set(fit)) > 1
        assert points == segmenter.asked[int(np.argmax(fit))].points
        read = get_format("sam4mllm").read_box_and_points(pair[1], 2, 1, (SIDE, SIDE))[0]
        for kept, shown in zip(read.points, points, strict=True):
            assert kept.label is shown.label
            assert abs(kept.x - shown.x) < 0.05
            assert abs(kept.y - shown.y) < 0.05


def test_ppg_about_an_absent_thing_says_so() -> None:
    example = _example(0, "a", count=TargetCount.ZERO_OR_MORE)
    recipe = Recipe(ppg_share=1.0, positive=2, negative=1)
    (conversation,) = conversations([example], recipe, DiscSegmenter())
    ((question, reply),) = _asked(conversation)
    assert question.startswith("Please provide the bounding box and prompt points, 2 on the")
    assert "(0+)" in question
    assert reply == "No object found."
    grammar_reads = get_format("sam4mllm").read_box_and_points(reply, 2, 1, (SIDE, SIDE))
    assert grammar_reads == ()


def test_a_looser_count_keeps_its_promise() -> None:
    """Loosened, ``0+`` no longer gives absence away; what is asked always allows the truth."""
    many = [
        _example(n, f"{n}", *[(10, 5, 30, 25), (2, 30, 12, 38)][: n % 3], count=count)
        for n in range(90)
        for count in [(TargetCount.ZERO_OR_MORE, TargetCount.ONE, TargetCount.ONE_OR_MORE)[n % 3]]
    ]
    said: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    for number, found in enumerate(conversations(many, replace(PQPP, loosened=0.5))):
        said[number % 3].add(_asked(found)[0][0].split("(")[1].split(")")[0])
    assert said == {0: {"0+"}, 1: {"1", "1+", "0+"}, 2: {"1+", "0+"}}


def test_vqa_is_mixed_in_at_the_stated_rate() -> None:
    vqa = [VqaExample("v", _picture(), (("What colour is it?", "black"),))]
    many = [_example(n, f"{n}", (10, 5, 30, 25), count=TargetCount.ONE) for n in range(300)]
    found = list(conversations(many, replace(PQPP, vqa_share=0.25), vqa=vqa))
    share = sum(c.topics == ("vqa",) for c in found) / len(found)
    assert 0.19 < share < 0.31


def test_loss_is_on_the_assistants_words_only(base: Path) -> None:
    processor = load_processor(base)
    encoder = ConversationEncoder(processor, PQPP)
    (conversation, *_) = conversations(_examples()[:1], PQPP)
    (encoded,) = encoder.encode(conversation)
    tokens, labels = encoded.inputs["input_ids"][0], encoded.labels[0]
    under_loss = [processor.tokenizer.decode([t]) for t in labels[labels != -100]]
    answers = conversation.turns[3].text.replace("Yes", "Yes ").replace("No", "No ").split()
    box = ["[", "250", ",", "125", ",", "750", ",", "625", "]", "</s>"]
    assert under_loss == [*box, *answers, "</s>"]
    assert (tokens[labels != -100] == labels[labels != -100]).all()
    # Everything else, one by one: prefix, picture, questions, role marks.
    silent = processor.tokenizer.decode(tokens[labels == -100])
    assert "Yes" not in silent
    assert silent.count("<|assistant|>") == 2
    assert silent.count("<image>") == SHAPE.grid**2


def test_what_does_not_fit_is_left_out_by_whole_questions(base: Path) -> None:
    processor = load_processor(base)
    many = [_example(n, "a", (10, 5, 30, 25), count=TargetCount.ONE) for n in range(4)]
    (conversation,) = conversations(many, PQPP)
    (whole,) = ConversationEncoder(processor, PQPP).fit(conversation)
    length = whole.labels.shape[1]
    assert whole.text == length - SHAPE.grid**2 + 1, "the picture counts as one token"
    (cut,) = ConversationEncoder(processor, PQPP, whole.text - 1).fit(conversation)
    (shorter,) = ConversationEncoder(processor, PQPP).fit(conversation.shortened())
    assert cut.labels.shape[1] < length
    assert torch.equal(cut.labels, shorter.labels)
    assert torch.equal(cut.labels, whole.labels[:, : cut.labels.shape[1]])
    (one,) = ConversationEncoder(processor, PQPP, 1).fit(conversation)
    assert (one.labels == processor.tokenizer.eos_token_id).sum() == 1


def test_llava_instruction_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_picture())
    said = [
        ("human", "<image>\nColour?"),
        ("gpt", "Red."),
        ("human", "And?"),
        ("gpt", "Blue."),
    ]
    records = [
        {"id": 7, "image": "a.png", "conversations": [{"from": f, "value": v} for f, v in said]},
        {"id": 8, "conversations": []},
    ]
    file = tmp_path / "vqa.json"
    file.write_text(json.dumps(records))
    (example,) = llava.examples(file)
    assert example.pairs == (("Colour?", "Red."), ("And?", "Blue."))
    assert example.open_image().size == (SIDE, SIDE)
    file.write_text('[{"image": 3}]')
    with pytest.raises(DatasetError, match="no LLaVA instruction file"):
        next(llava.examples(file))


def test_scenes_say_what_lies_where() -> None:
    from sam4mllm_tool.scenes.render import render_scene

    for number, example in enumerate(SceneVqa(SMALL_WORLD, "train", 3, 4)):
        scene = render_scene(SMALL_WORLD, "train", number, 3)
        for question, answer in example.pairs:
            x, y = (int(part) for part in question.split("(")[1].rstrip(")?").split(","))
            # The named cell is a thousandth of a side wide: less than a pixel here.
            column, row = (
                (x + 0.5) * scene.image.width / 1000,
                (y + 0.5) * scene.image.height / 1000,
            )
            on = [t.name.split()[-1] for t in scene.objects if t.mask[int(row), int(column)]]
            assert answer == (on[0] if on else "background")


def test_padding_is_not_under_loss(base: Path) -> None:
    encoder = ConversationEncoder(load_processor(base), PQPP)
    encoded = [encoder.encode(c) for c in conversations(_examples(), PQPP)]
    batch = Collator(0)(encoded)
    for row, (one,) in enumerate(encoded):
        length = one.labels.shape[1]
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["attention_mask"][row, length:] == 0).all()
        assert torch.equal(batch["labels"][row, :length], one.labels[0])


def test_training_without_smoothable_numbers_goes_on_plainly_and_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise InputError("coordinates cannot be smoothed: so it is")

    monkeypatch.setattr("sam4mllm_tool.training.lora.TokenLoss", refuse)
    found = list(conversations(_examples()[:1], PQPP))
    recipe = replace(PRESETS["small"].learning, rank=2)
    train(base, found, tmp_path, recipe, PQPP, device="cpu")
    assert "so it is" in caplog.text and "plain cross-entropy" in caplog.text
    assert json.loads((tmp_path / "sam4mllm.json").read_text())["lora"]["smoothing"] == 0


@pytest.mark.parametrize("projector", ["lora", "full", "frozen"])
def test_only_lora_and_projector_learn(base: Path, projector: str) -> None:
    recipe = replace(PRESETS["published"].learning, projector=projector)
    model = adapt(load_model(base, choose_placement("cpu", "bfloat16")), recipe)
    learning = {n: weight for n, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in learning.values()} == {torch.float32}
    between = {name for name in learning if "multi_modal_projector" in name}
    assert all("lora_" in name for name in learning.keys() - between)
    assert not any("vision_tower" in name for name in learning)
    assert bool(between) == (projector != "frozen")
    assert all(("lora_" in name) == (projector == "lora") for name in between)
    projections = {
        name.split(".lora_")[0].rsplit(".", 1)[1]
        for name in learning.keys() - between if "lora_" in name
    }  # fmt: skip
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                           "down_proj"}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One adapter trained in one go, one that was interrupted after three of six steps."""
    torch.set_num_threads(1)
    found = list(conversations(_examples() * 3, PQPP))
    recipe = LoraRecipe(
        rank=4, alpha=4, dropout=0.1, rate=1e-2, epochs=3, batch=3, bf16=False, checkpointing=False,
        projector="full", accumulate=1, clip=1.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("adapters")
    whole, broken = folder / "whole", folder / "broken"
    cases = list(cases_of(_examples()))
    examined = HeldOut(cases, ColourSegmenter())
    train(
        base, found, whole, recipe, PQPP, device="cpu", save_steps=2, held_out=found[:2],
        examined=examined, tensorboard=True,
    )  # fmt: skip
    train(base, found, broken, recipe, PQPP, device="cpu", stop_after=3)
    train(base, found, broken, recipe, PQPP, device="cpu", resume=True)
    return whole, broken


def test_resuming_gives_the_uninterrupted_run(adapters: tuple[Path, Path]) -> None:
    whole, broken = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
    assert whole.keys() == broken.keys()
    assert any(value.abs().sum() > 0 for name, value in whole.items() if "lora_B" in name)
    for name, value in whole.items():
        assert torch.equal(value, broken[name]), name


def test_an_adapter_goes_on_from_another(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, _ = adapters
    recipe = LoraRecipe(rank=4, alpha=4, projector="full", bf16=False, checkpointing=False)
    model = adapt(load_model(base, choose_placement("cpu", "float32")), recipe)
    take_over(model, whole)
    saved = load_file(whole / "adapter_model.safetensors")
    found = get_peft_model_state_dict(model)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("lora_B" in name for name in learning)
    with pytest.raises(CheckpointError, match="training cannot continue"):
        take_over(adapt(load_model(base, choose_placement("cpu", "float32")),
                        replace(recipe, rank=8)), whole)  # fmt: skip
    with pytest.raises(CheckpointError, match="training cannot continue"):
        take_over(model, tmp_path)


def test_figures_of_the_pipeline_are_logged(adapters: tuple[Path, Path], base: Path) -> None:
    """What was logged last is what the finished adapter gives when asked again."""
    whole, _ = adapters
    state = max(whole.rglob("trainer_state.json"), key=lambda p: p.stat().st_mtime)
    history = json.loads(state.read_text())["log_history"]
    (logged,) = [h for h in history if h["step"] == 6 and "eval_cIoU" in h]
    assert {h["step"] for h in history if "eval_box_acc50" in h} == {2, 4, 6}
    model = load_adapter(load_model(base, choose_placement("cpu", "float32")), str(whole),
                         merge=False)  # fmt: skip
    again = HeldOut(list(cases_of(_examples())), ColourSegmenter())
    found = again.measure(model, load_processor(base), "sam4mllm")
    assert {"box_acc50", "cIoU", "n_acc"} <= found.keys()
    for name, value in found.items():
        assert logged[f"eval_{name}"] == pytest.approx(value), name
    assert list((whole / "tensorboard").glob("events*"))
    page = (whole / "convergence.html").read_text()
    for title in ("Loss", "Box Acc@0.5", "cIoU", "Learning rate"):
        assert f"<h2>{title}</h2>" in page
    assert "http" not in page.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    losses = [h["eval_loss"] for h in history if "eval_loss" in h]
    assert f"held out</span> {losses[0]:.3g} → {losses[-1]:.3g}" in page


def test_curves_are_drawn_where_the_numbers_say() -> None:
    history = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": 2.0},
               {"step": 50, "loss": 2.0}, {"step": 50, "eval_cIoU": 0.25}]  # fmt: skip
    page = convergence_page(history, "a <run>")
    assert "a &lt;run&gt;" in page and "50 steps" in page
    training, held_out, ciou = re.findall(r'points="([^"]+)"', page)
    x, y = zip(*(map(float, point.split(",")) for point in training.split()), strict=True)
    assert x == pytest.approx((46, 46 + (352 - 46) / 4, 352), abs=0.06)
    assert y == pytest.approx((8, 144, 76), abs=0.06), "3 at the top, 1 at the bottom"
    assert [float(n) for n in held_out.split(",")] == pytest.approx([122.5, 76], abs=0.06)
    assert len(ciou.split()) == 1 and "Box Acc" not in page


def test_an_adapter_over_the_embedded_base_names_no_folder(tmp_path: Path) -> None:
    (conversation, *_) = conversations(_examples()[:1], PQPP)
    recipe = replace(PRESETS["small"].learning, rank=2)
    train(embedded.MLLM, [conversation], tmp_path / "out", recipe, PQPP, device="cpu")
    for file in (tmp_path / "out").glob("*.*"):
        assert str(embedded.MLLM).encode() not in file.read_bytes(), file
    found = load_mllm(adapter=str(tmp_path / "out"), device="cpu")
    assert found.name == f"embedded + {tmp_path / 'out'}"


def test_a_saved_adapter_gives_the_same_logits(base: Path, adapters: tuple[Path, Path]) -> None:
    from peft import PeftModel

    encoder = ConversationEncoder(load_processor(base), PQPP)
    (conversation, *_) = conversations(_examples()[:1], PQPP)
    inputs = encoder.encode(conversation)[0].inputs
    plain = load_model(base, choose_placement("cpu", "float32"))
    with torch.no_grad():
        before = plain(**inputs).logits
        live = PeftModel.from_pretrained(plain, str(adapters[0])).eval()(**inputs).logits
        again = load_model(base, choose_placement("cpu", "float32"))
        ours = load_adapter(again, str(adapters[0]), merge=False).eval()(**inputs).logits
    assert torch.equal(live, ours)
    assert (live - before).abs().max() > 1e-3
    about = json.loads((adapters[0] / "sam4mllm.json").read_text())
    assert about["format"] == "sam4mllm"
    assert about["base_model"] == str(base)
    needs_nothing_else = load_mllm(adapter=str(adapters[0]), device="cpu")
    assert needs_nothing_else.name == f"{base} + {adapters[0]}"
    assert needs_nothing_else.format_name == "sam4mllm"
    assert about["data"]["seed"] == PQPP.seed
    assert about["lora"]["rank"] == 4


def test_training_goes_on_in_the_dialogue_of_the_adapter(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """A template beside the adapter is trained with, kept beside the new one, and asked with."""
    own = load_processor(base).chat_template
    assert (adapters[0] / "chat_template.jinja").read_text() == own
    start = shutil.copytree(adapters[0], tmp_path / "start")
    other = own.replace("part['text'] }}", "'\n\n' ~ part['text'] }}", 1)
    assert other != own
    (start / "chat_template.jinja").write_text(other)
    found = list(conversations(_examples()[:1], PQPP))
    recipe = LoraRecipe(rank=4, alpha=4, epochs=1, projector="full", bf16=False,
                        checkpointing=False)  # fmt: skip
    out = train(base, found, tmp_path / "out", recipe, PQPP, device="cpu", start=start)
    assert (out / "chat_template.jinja").read_text() == other
    asked = load_mllm(adapter=str(out), device="cpu").encoder.processor
    assert asked.chat_template == other
