"""The local engine says what starting over in each round says, on every family it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mllm_dialogues import FORM, answers, ask_box, ask_points, check_same, compare, open_dialogue
from random_models import FAMILIES, build, picture

from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.oracle import RecomputeMllm
from sam4mllm_tool.protocols import Turn
from sam4mllm_tool.types import TargetCount

Sides = tuple[LocalMllm, LocalMllm]

pytestmark = pytest.mark.usefixtures("one_thread")


# Architectures that read as another one here does are left to test_mllm_plain.py.
VARIANTS = {"gemma4", "qwen2_vl", "qwen3_vl_moe"}


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in VARIANTS])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    folder = build(request.param, tmp_path_factory.mktemp(request.param))
    return (
        LocalMllm.from_pretrained(folder, device="cpu"),
        RecomputeMllm.from_pretrained(folder, device="cpu"),
    )


def test_interleaved_dialogues_about_several_pictures(sides: Sides) -> None:
    pictures = [picture(seed) for seed in range(3)]
    for turn in range(6):
        compare(*sides, pictures[turn % 3], seed=turn)


def test_round_two_branches_off_round_one(sides: Sides) -> None:
    mllm, oracle = sides
    image = picture(7)
    opening = ask_box("abc", image)
    reply = mllm.generate(image, opening, grammar=FORM.box_grammar(TargetCount.ONE)).text
    other = "[001,002,998,999]"
    for said, seed in ((reply, 1), (other, 2), (reply, 3), (reply, 1)):
        question = ask_points(opening, said, image, 6, seed)
        check_same(*(answers(side, image, question, 6) for side in sides))
    again = ask_box("abc", image)
    assert mllm.generate(image, again, max_new_tokens=12).text == (
        oracle.generate(image, again, max_new_tokens=12).text
    )


def test_a_second_object_reads_the_picture_no_second_time(sides: Sides) -> None:
    mllm, _ = sides
    image = picture(8)
    grammar = FORM.box_grammar(TargetCount.ONE)
    seen = _count_pixels(mllm)
    for text in ("first", "second", "third"):
        mllm.generate(image, ask_box(text, image), grammar=grammar)
    assert seen == [True]
    mllm.generate(picture(9), ask_box("first", picture(9)), grammar=grammar)
    assert seen == [True, True]


def test_alternates_are_scored_like_the_oracles(sides: Sides) -> None:
    mllm, oracle = sides
    image = picture(10)
    dialogue = ask_box("some thing", image)
    grammar = FORM.box_grammar(TargetCount.ONE)
    ours = mllm.alternates(image, dialogue, grammar=grammar, count=4)
    theirs = oracle.alternates(image, dialogue, grammar=grammar, count=4)
    assert ours[0].text == mllm.generate(image, dialogue, grammar=grammar).text
    assert [r.text for r in ours] == [r.text for r in theirs]
    assert len({r.text for r in ours}) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)
    scores = [r.log_probability or 0.0 for r in ours[1:]]
    assert scores == sorted(scores, reverse=True)


def test_a_tiny_cache_evicts_and_changes_nothing(sides: Sides) -> None:
    mllm, oracle = sides
    room = _bytes_of_one(mllm)
    small = LocalMllm(mllm.model, mllm.encoder.processor, name="small", cache_bytes=room)
    pictures = [picture(seed) for seed in (20, 21)]
    for turn in range(4):
        compare(small, oracle, pictures[turn % 2], seed=30 + turn, points=4)
        assert small.engine.store.nbytes <= room
    nothing = LocalMllm(mllm.model, mllm.encoder.processor, name="nothing", cache_bytes=0)
    compare(nothing, oracle, pictures[0], seed=40, points=4)
    assert nothing.engine.store.nbytes == 0


def test_what_others_read_meanwhile_shifts_no_answers(sides: Sides) -> None:
    """Two callers ask the same; the second one waits for its turn while the first one answers."""
    mllm = LocalMllm(sides[0].model, sides[0].encoder.processor, name="shared")
    engine, image = mllm.engine, picture(12)
    question = ask_points(ask_box("abc", image), "[001,002,998,999]", image, 6, 0)
    tokens = mllm._words(FORM.yes_no)
    guesses = (tokens.yes[0], tokens.no[0], tokens.no[0]) * 2
    waiting = open_dialogue(mllm, image, question)  # nothing is read yet
    first, expected = engine.read(waiting, guesses, keep=7)
    engine.keep(first)  # what is kept now reaches into the answers
    _, found = engine.read(waiting, guesses, keep=7)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_ids_are_those_of_the_processor(sides: Sides) -> None:
    encoder = sides[0].encoder
    image = picture(11)
    dialogue = (
        *ask_points(ask_box("a big bag", image), "[010,020,300,400]", image, 4, 0),
        Turn("assistant", "\nYesNoNoYes"),
        Turn("user", 'and "this", 50% of it?\nor ünïcödé 图'),
    )
    messages = [{"role": t.role, "content": [{"type": "text", "text": t.text}]} for t in dialogue]
    messages[1]["content"].insert(0, {"type": "image", "image": image.pil})  # type: ignore[arg-type]
    expected = encoder.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    assert list(encoder.encode(dialogue, encoder.image_inputs(image)).ids) == list(expected)


def _count_pixels(mllm: LocalMllm) -> list[bool]:
    """Grows by one for each pass that sees pixels."""
    seen: list[bool] = []

    def look(module: object, args: object, kwargs: dict[str, object]) -> None:
        if kwargs.get("pixel_values") is not None:
            seen.append(True)

    mllm.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def _bytes_of_one(mllm: LocalMllm) -> int:
    """Room for about one picture and its dialogue."""
    fresh = LocalMllm(mllm.model, mllm.encoder.processor, name="fresh")
    image = picture(20)
    fresh.generate(image, ask_box("abc", image), grammar=FORM.box_grammar(TargetCount.ONE))
    return fresh.engine.store.nbytes * 3 // 2


def test_hub_folder_types(tmp_path: Path) -> None:
    folder = build("llava", tmp_path / "as text")
    assert LocalMllm.from_pretrained(str(folder), device="cpu").name == str(folder)
