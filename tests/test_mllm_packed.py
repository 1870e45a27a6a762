"""Passes that dialogues share say what each dialogue's own passes say, in all families."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_dialogues import FORM, answers, ask_box, ask_points, check_same, open_dialogue
from random_models import FAMILIES, build, expression, picture

from sam4mllm_tool.concurrency import CallCancelled, CallContext, call_context
from sam4mllm_tool.errors import BackendError
from sam4mllm_tool.mllm.engine import Engine
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.packing import Pack, Row
from sam4mllm_tool.mllm.prefix import common_length
from sam4mllm_tool.mllm.reading import Read
from sam4mllm_tool.protocols import Question, Reply
from sam4mllm_tool.types import RgbImage, TargetCount

ONE = FORM.box_grammar(TargetCount.ONE)
ONE_BY_ONE = {"qwen3_5", "gemma3", "gemma4"}
"""Linear attention and sliding windows: such caches hold no token apart."""

Call = Callable[[LocalMllm], Any]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llava_next", tmp_path_factory.mktemp("packed"))


@pytest.fixture
def serial(folder: Path) -> LocalMllm:
    return LocalMllm.from_pretrained(folder, device="cpu", packed=False)


def packed_twin(serial: LocalMllm, **options: Any) -> LocalMllm:
    """The same weights with an engine of its own, which packs."""
    return LocalMllm(serial.model, serial.encoder.processor, name="packed", **options)


@dataclass(frozen=True)
class APass:
    """A pass: the tokens it read, and how many pictures' dialogues shared it."""

    length: int
    pictures: int


class Passes:
    """All passes within the block."""

    def __init__(self, model: Any) -> None:
        self.seen: list[APass] = []
        self.hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append(APass(kwargs["input_ids"].shape[1], len(kwargs.get("parts", [0]))))

    def __enter__(self) -> list[APass]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def a_call(rng: random.Random, pictures: list[RgbImage]) -> Call:
    """Something that a caller may ask, at random."""
    image = rng.choice(pictures)
    opening = ask_box(expression(rng), image)

    def points(count: int) -> Any:
        return ask_points(opening, "[101,052,800,907]", image, count, rng.randint(0, 99))

    match rng.randrange(5):
        case 0:
            return lambda mllm: mllm.generate(image, opening, grammar=ONE)
        case 1:
            return lambda mllm: mllm.generate(image, opening, max_new_tokens=5)
        case 2:
            return lambda mllm: mllm.alternates(image, opening, grammar=ONE, count=3)
        case 3:
            question = points(6)
            return lambda mllm: answers(mllm, image, question, 6)
        case _:
            each = [Question(image, points(n), n) for n in (4, 1, 0, 3)]
            return lambda mllm: mllm.answer_each(each, words=FORM.yes_no)


def about_each(rng: random.Random, pictures: list[RgbImage]) -> Call:
    """One call with a question about every picture."""
    asked = [(image, ask_box(expression(rng), image)) for image in pictures]
    each = [
        Question(image, ask_points(opening, "[101,052,800,907]", image, 6, rng.randint(0, 99)), 6)
        for image, opening in asked
    ]
    return lambda mllm: mllm.answer_each(each, words=FORM.yes_no)


def check_alike(said: Any, truth: Any) -> None:
    match said:
        case Reply():
            assert said.text == truth.text and said.tokens == truth.tokens
            assert abs(said.log_probability - truth.log_probability) < 1e-3
        case [list(), *_]:
            for some, others in zip(said, truth, strict=True):
                if others:
                    check_same(some, others)
                assert len(some) == len(others)
        case [Reply(), *_]:
            for one, other in zip(said, truth, strict=True):
                check_alike(one, other)
        case _:
            check_same(said, truth)


def at_once(mllm: LocalMllm, calls: list[Call]) -> list[Any]:
    """All calls at the same time, each in a thread of its own."""
    start = threading.Barrier(len(calls))

    def call(one: Call) -> Any:
        start.wait(60)
        return one(mllm)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_mixture_of_callers_gets_what_each_gets_alone(family: str, tmp_path: Path) -> None:
    serial = LocalMllm.from_pretrained(build(family, tmp_path), device="cpu", packed=False)
    packed = packed_twin(serial)
    rng = random.Random(family)
    pictures = [picture(seed) for seed in (3, 4)]
    for _ in range(2):
        calls = [about_each(rng, pictures), *(a_call(rng, pictures) for _ in range(5))]
        with Passes(serial.model) as alone:
            truth = [call(serial) for call in calls]
        with Passes(serial.model) as together:
            said = at_once(packed, calls)
        for one, other in zip(said, truth, strict=True):
            check_alike(one, other)
    assert packed.engine.keeps_apart is (None if family in ONE_BY_ONE else True)
    if family not in ONE_BY_ONE:
        assert len(together) < len(alone)
        assert max(one.pictures for one in together) == len(pictures)


def test_only_the_pictures_themselves_are_read_one_by_one(serial: LocalMllm) -> None:
    """Eight dialogues about a picture each: as many passes as the longest of them, and the first
    reads of the seven others."""
    rng, pictures = random.Random(3), [picture(seed) for seed in range(20, 28)]
    packed = packed_twin(serial)
    about_each(rng, pictures[:2])(packed)  # tries out whether the model packs
    packed.engine.store.clear()
    call = about_each(rng, pictures)
    with Passes(serial.model) as alone:
        truth = call(serial)
    with Passes(serial.model) as together:
        check_alike(call(packed), truth)
    rounds = len(together) - 8
    assert rounds >= 1 and len(alone) - 8 >= 3 * rounds
    assert [one.pictures for one in together[:9]] == [1] * 8 + [8]


def test_thirty_marks_take_one_pass_and_the_pictures(serial: LocalMllm) -> None:
    image = picture(5)
    questions = [Question(image, ask_box(f"mark {n}?", image)) for n in range(30)]
    packed = packed_twin(serial)
    packed.answer_each(questions[:3], words=FORM.yes_no)  # tries out whether the model packs
    packed.engine.store.clear()
    with Passes(serial.model) as passes:
        said = packed.answer_each(questions, words=FORM.yes_no)
    assert len(passes) == 2
    assert sum(one.length for one in passes[1:]) < 29 * 20, (
        "what the questions have in common was read with the picture"
    )
    for (one,), question in zip(said, questions, strict=True):
        check_same([one], answers(serial, image, question.dialogue, 1))


def whole(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of a branch's layer."""
    keys, values = zip(*layer.pieces(0), strict=True)
    return torch.cat(keys, -2), torch.cat(values, -2)


def test_rows_go_on_from_what_they_have_read(serial: LocalMllm) -> None:
    """Prefixes of different lengths, one of them inside another, one of another picture, and what
    comes of them later."""
    engine = serial.engine
    first, far = (
        engine.read(open_dialogue(serial, image, ask_box("abc", image)), ())[0]
        for image in (picture(6), picture(13))
    )
    longer, _ = engine.read(first, (7, 8, 9))
    shorter = first.cut(len(first.ids) - 5)
    spots, news = (longer, shorter, first, far), ((11, 12), (13,), (14, 15, 16), (17,))
    alone = [engine.read(spot, ids, 1) for spot, ids in zip(spots, news, strict=True)]
    rows = []
    for spot, ids in zip(spots, news, strict=True):
        assert spot.prefix is not None
        rows.append(Row(spot.key, spot.prefix, ids, 1))
    groups = Pack.of(rows).groups
    assert [(len(group.rows), group.shared) for group in groups] == [
        (3, len(shorter.ids)), (1, len(far.ids)),
    ]  # fmt: skip
    with torch.inference_mode():
        packed = engine._read_packed(rows)
    for (after, logits), (prefix, ours) in zip(alone, packed, strict=True):
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
        assert after.prefix is not None and prefix.ids == after.prefix.ids
        for layer, ours_layer in zip(after.prefix.cache.layers, prefix.cache.layers, strict=True):
            for one, other in zip(whole(layer), whole(ours_layer), strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_row_that_is_no_number_fails_alone(serial: LocalMllm) -> None:
    """Even masked, its keys would make a NaN of every row."""
    packed, image, far, poison = packed_twin(serial), picture(7), picture(14), "ZZZZ"
    (bad,) = set(serial.encoder.encode_continuation("Z"))
    table = serial.model.get_input_embeddings()
    hook = table.register_forward_hook(
        lambda module, args, out: out.masked_fill((args[0] == bad)[..., None], float("nan"))
    )
    calls: list[Call] = [
        lambda mllm, text=text, on=on: mllm.generate(on, ask_box(text, on), grammar=ONE).text
        for text in ("abc", "a red apple")
        for on in (image, far)
    ]
    truth = [call(serial) for call in calls]

    def poisoned(mllm: LocalMllm) -> str:
        with pytest.raises(BackendError, match="not finite"):
            mllm.generate(image, ask_box(poison, image), grammar=ONE)
        return "failed"

    packed.generate(image, ask_box("abc", image), grammar=ONE)
    try:
        assert at_once(packed, [*calls, poisoned]) == [*truth, "failed"]
    finally:
        hook.remove()


def test_a_cancelled_row_leaves_the_others(serial: LocalMllm) -> None:
    packed, image, far, gone = packed_twin(serial), picture(8), picture(15), CallContext()
    packed.generate(image, ask_box("abc", image), grammar=ONE)
    passes = 0

    def cancel(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            gone.cancelled.set()

    def leaves(mllm: LocalMllm) -> str:
        with call_context(gone), pytest.raises(CallCancelled):
            mllm.generate(image, ask_box("gone", image), max_new_tokens=1000)
        return "gone"

    calls: list[Call] = [
        lambda mllm, n=n, on=on: mllm.generate(on, ask_box(f"thing {n}", on), grammar=ONE).text
        for n in range(2)
        for on in (image, far)
    ]
    truth = [call(serial) for call in calls]
    hook = serial.model.register_forward_pre_hook(cancel)
    try:
        assert at_once(packed, [leaves, *calls]) == ["gone", *truth]
    finally:
        hook.remove()
    assert packed.under_way.nbytes == 0


def test_a_model_that_attends_in_its_own_way_reads_one_by_one(serial: LocalMllm) -> None:
    """Found by trying: what does not attend picture by picture would mix the dialogues up."""
    packed, image = packed_twin(serial), picture(9)
    forward, text = serial.model.forward, serial.model.config.get_text_config(decoder=True)

    def blind(*args: Any, parts: Any = None, **kwargs: Any) -> Any:
        text._attn_implementation = "sdpa"
        return forward(*args, **kwargs)

    questions = [Question(image, ask_box(text, image)) for text in ("abc", "dog", "bag")]
    truth = serial.answer_each(questions, words=FORM.yes_no)
    serial.model.forward = blind
    said = packed.answer_each(questions, words=FORM.yes_no)
    assert packed.engine.keeps_apart is False
    for one, other in zip(said, truth, strict=True):
        check_same(one, other)


def test_what_callers_share_counts_once(serial: LocalMllm) -> None:
    """Room for one picture and the texts of many dialogues is room for all of them."""
    image = picture(10)
    serial.generate(image, ask_box("abc", image), grammar=ONE)
    each = serial.engine.token_bytes
    assert each is not None
    encoded = serial._encoded(image, ask_box("thing 1", image))[0]
    text = len(encoded.ids) - encoded.image_end + 4
    room = each * (encoded.image_end + 3 * text)
    bounded = packed_twin(serial, cache_bytes=room)
    bounded.generate(image, ask_box("abc", image), max_new_tokens=4)
    held: list[tuple[int, int]] = []
    hook = serial.model.register_forward_pre_hook(
        lambda *_: held.append((bounded.under_way.nbytes, len(bounded.under_way._held)))
    )
    calls: list[Call] = [
        lambda mllm, n=n: mllm.generate(image, ask_box(f"thing {n}", image), max_new_tokens=4)
        for n in range(6)
    ]
    at_once(bounded, calls)
    hook.remove()
    assert max(nbytes for nbytes, _ in held) <= room
    assert max(callers for _, callers in held) == 3


def test_how_far_two_dialogues_are_the_same() -> None:
    rng = random.Random(0)
    for _ in range(300):
        first = tuple(rng.choices((1, 2), weights=(9, 1), k=rng.randint(0, 12)))
        second = tuple(rng.choices((1, 2), weights=(9, 1), k=rng.randint(0, 12)))
        pairs = enumerate(zip(first, second, strict=False))
        expected = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
        assert common_length(first, list(second)) == expected


def test_long_reads_do_not_all_fit_in_one_pass(
    serial: LocalMllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(11)
    packed = packed_twin(serial)
    questions = [Question(image, ask_box(f"thing {n}", image)) for n in range(9)]
    packed.answer_each(questions[:3], words=FORM.yes_no)  # tries out whether the model packs
    packed.engine.store.clear()
    monkeypatch.setattr("sam4mllm_tool.mllm.engine._MOST_TOKENS", 150)
    truth = serial.answer_each(questions, words=FORM.yes_no)
    with Passes(serial.model) as passes:
        said = packed.answer_each(questions, words=FORM.yes_no)
    assert max(one.length for one in passes[1:]) <= 150 and len(passes) < 9
    for one, other in zip(said, truth, strict=True):
        check_same(one, other)


def test_an_engine_that_does_not_pack_reads_one_by_one(serial: LocalMllm) -> None:
    image = picture(12)
    spot = serial.engine.open(image.digest, *serial._encoded(image, ask_box("abc", image)))
    assert isinstance(serial.engine, Engine)
    serial.engine.read(spot, ())
    assert not serial.engine._shares(Read(spot))
