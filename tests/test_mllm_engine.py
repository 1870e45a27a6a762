"""The engine under threads, cancellation, adapters, and its decoding's odd cases."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_dialogues import FORM, answers, ask_box, ask_points, check_same, compare
from peft import LoraConfig, get_peft_model
from random_models import HEADS, KV_HEADS, LAYERS, WIDTH, build, picture

from sam4mllm_tool.concurrency import (
    CallCancelled,
    CallContext,
    FairLock,
    call_context,
    run_in_thread,
)
from sam4mllm_tool.errors import DeviceOutOfMemory
from sam4mllm_tool.mllm.budget import ByteBudget
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.oracle import RecomputeMllm
from sam4mllm_tool.types import TargetCount

ONE = FORM.box_grammar(TargetCount.ONE)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llava_next", tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def mllm(folder: Path) -> LocalMllm:
    return LocalMllm.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LocalMllm:
    return RecomputeMllm.from_pretrained(folder, device="cpu")


def test_threads_get_the_answers_they_would_get_alone(folder: Path, mllm: LocalMllm) -> None:
    jobs = [(seed % 5, f"thing {seed}") for seed in range(20)]
    pictures = [picture(seed) for seed in range(5)]

    def ask(side: LocalMllm, job: tuple[int, str]) -> Any:
        image = pictures[job[0]]
        opening = ask_box(job[1], image)
        said = side.generate(image, opening, grammar=ONE)
        question = ask_points(opening, said.text, image, 5, job[0])
        return said.text, answers(side, image, question, 5)

    alone = [ask(RecomputeMllm.from_pretrained(folder, device="cpu"), j) for j in jobs]
    small = LocalMllm(mllm.model, mllm.encoder.processor, name="small", cache_bytes=400_000)
    for side in (mllm, small):
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda job, side=side: ask(side, job), jobs))
        for (text, said), (true_text, truth) in zip(together, alone, strict=True):
            assert text == true_text
            check_same(said, truth)


def test_qwen_threads_keep_each_pictures_own_positions(tmp_path: Path) -> None:
    """The model's own copy of the rotary shift is that of the last picture read."""
    folder = build("qwen2_5_vl", tmp_path)
    mllm = LocalMllm.from_pretrained(folder, device="cpu")
    oracle = RecomputeMllm.from_pretrained(folder, device="cpu")
    pictures = [picture(seed, size) for seed, size in enumerate([(60, 160), (160, 60), (150, 150)])]
    shifts = set()
    for turn in range(6):
        compare(mllm, oracle, pictures[turn % 3], seed=turn, points=4)
        with torch.inference_mode():
            shifts.add(int(mllm.model.model.rope_deltas.reshape(-1)[0]))
    assert len(shifts) > 1


def test_a_cancelled_call_frees_its_turn(mllm: LocalMllm) -> None:
    image = picture(30)
    context = CallContext()
    passes = _before_each_pass(mllm, lambda n: context.cancelled.set() if n == 2 else None)
    with passes, call_context(context), pytest.raises(CallCancelled):
        mllm.generate(image, ask_box("abc", image), max_new_tokens=1000)
    assert passes.count == 2
    done = mllm.generate(image, ask_box("abc", image), grammar=ONE)
    assert done.text.startswith("[")


async def test_a_cancelled_task_lets_the_next_one_in(mllm: LocalMllm) -> None:
    image = picture(31)
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    passes = _before_each_pass(mllm, lambda n: loop.call_soon_threadsafe(begun.set))
    with passes:
        dialogue = ask_box("abc", image)
        task = asyncio.create_task(
            run_in_thread(mllm.generate, image, dialogue, max_new_tokens=100_000)
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        said = await asyncio.wait_for(
            run_in_thread(mllm.generate, image, dialogue, grammar=ONE), timeout=30
        )
    assert said.text.startswith("[")


def test_the_lock_is_fair_and_cancelled_callers_pass_it_on() -> None:
    turn, order = FairLock(), []
    gone = CallContext()

    def wait(name: int) -> None:
        with turn.taken():
            order.append(name)

    def leave() -> None:
        with call_context(gone), pytest.raises(CallCancelled), turn.taken():
            order.append(-1)

    with turn.taken():
        threads = []
        for name in range(5):
            thread = threading.Thread(target=wait, args=(name,))
            threads.append(threading.Thread(target=leave) if name == 2 else thread)
            threads[-1].start()
            while turn.waiting < name + 1:
                time.sleep(0.001)
        gone.cancelled.set()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 3, 4]


def test_two_adapters_live_and_merged_agree(folder: Path, tmp_path: Path) -> None:
    image = picture(32)
    opening = ask_box("abc", image)
    question = ask_points(opening, "[001,002,800,900]", image, 6, 0)
    said = []
    for seed in (1, 2):
        adapter = _make_adapter(folder, tmp_path / str(seed), seed)
        live = LocalMllm.from_pretrained(folder, adapter, device="cpu")
        merged = LocalMllm.from_pretrained(folder, adapter, device="cpu", merge_adapter=True)
        again = RecomputeMllm.from_pretrained(folder, adapter, device="cpu")
        one, other, truth = (answers(m, image, question, 6) for m in (live, merged, again))
        check_same(one, truth)
        check_same(one, other)
        assert live.generate(image, opening, grammar=ONE).text == (
            merged.generate(image, opening, grammar=ONE).text
        )
        assert str(adapter) in live.name
        said.append(one)
    assert said[0] != said[1]


def test_answers_of_any_number(mllm: LocalMllm, oracle: LocalMllm) -> None:
    image = picture(33)
    opening = ask_box("abc", image)
    for count in (1, 2, 3, 40):
        question = ask_points(opening, "[001,002,800,900]", image, count, count)
        check_same(answers(mllm, image, question, count), answers(oracle, image, question, count))
    assert answers(mllm, image, opening, 0) == []


def test_answering_never_takes_more_passes_than_answers(mllm: LocalMllm) -> None:
    image = picture(34)
    opening = ask_box("abc", image)
    mllm.generate(image, opening, grammar=ONE)
    question = ask_points(opening, "[001,002,800,900]", image, 30, 0)
    passes = _before_each_pass(mllm, lambda n: None)
    with passes:
        answers(mllm, image, question, 30)
    assert 1 <= passes.count <= 30


def test_a_box_of_three_digit_tokens_takes_four_passes(mllm: LocalMllm) -> None:
    image = picture(35)
    said = mllm.generate(image, ask_box("abc", image), grammar=ONE)
    assert (said.tokens, said.forward_passes) == (4, 4)


def test_a_reply_has_a_limit(mllm: LocalMllm, oracle: LocalMllm) -> None:
    image = picture(36)
    dialogue = ask_box("abc", image)
    said, truth = (m.generate(image, dialogue, max_new_tokens=5) for m in (mllm, oracle))
    assert said.text == truth.text and said.tokens <= 5


def test_running_out_of_memory_frees_what_is_kept(folder: Path) -> None:
    mllm = LocalMllm.from_pretrained(folder, device="cpu")
    image = picture(37)
    mllm.generate(image, ask_box("abc", image), grammar=ONE)
    assert mllm.engine.store.nbytes > 0

    def fail(n: int) -> None:
        raise torch.OutOfMemoryError("planted")

    with _before_each_pass(mllm, fail), pytest.raises(DeviceOutOfMemory) as caught:
        mllm.generate(image, ask_box("def", image), grammar=ONE)
    assert caught.value.hint and mllm.engine.store.nbytes == 0
    assert mllm.generate(image, ask_box("def", image), grammar=ONE).text


def test_dialogues_under_way_are_bounded(mllm: LocalMllm) -> None:
    """Eight callers with eight pictures; keys and values of three dialogues have room."""
    mllm.generate(picture(39), ask_box("abc", picture(39)), grammar=ONE)
    each = mllm.engine.token_bytes
    assert each == 2 * LAYERS * KV_HEADS * (WIDTH // HEADS) * 4, "what a llama's layers keep"
    image = picture(60, (80, 80))
    tokens = len(mllm._encoded(image, ask_box("thing 0", image))[0].ids) + 70
    bounded = LocalMllm(
        mllm.model, mllm.encoder.processor, name="bounded", cache_bytes=3 * each * tokens
    )
    seen: list[int] = []
    callers: list[int] = []

    def look(_: int) -> None:
        seen.append(bounded.under_way.nbytes)
        callers.append(len(bounded.under_way._held))

    def ask(number: int) -> str:
        image = picture(60 + number, (80, 80))
        dialogue = ask_box(f"thing {number}", image)
        return bounded.generate(image, dialogue, max_new_tokens=60).text

    bounded.generate(image, ask_box("thing 0", image), max_new_tokens=1)
    with _before_each_pass(bounded, look), ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(ask, range(8)))) == 8
    assert max(seen) <= bounded.under_way.max_bytes
    assert 1 < max(callers) <= 3
    assert bounded.under_way.nbytes == 0


def test_a_dialogue_larger_than_the_bound_is_let_in_alone() -> None:
    budget, order, gone = ByteBudget(10), [], CallContext()

    def hold(name: str, nbytes: int) -> None:
        with budget.held(nbytes):
            order.append(name)

    def leave() -> None:
        with call_context(gone), pytest.raises(CallCancelled), budget.held(5):
            order.append("never")

    with budget.held(1000):
        threads = [
            threading.Thread(target=leave),
            threading.Thread(target=hold, args=("large", 11)),
            threading.Thread(target=hold, args=("small", 1)),
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        assert order == []
        gone.cancelled.set()
        threads[0].join(10)
    for thread in threads:
        thread.join(10)
    assert order == ["large", "small"] and budget.nbytes == 0


def test_a_picture_is_prepared_while_others_ask(mllm: LocalMllm) -> None:
    """A large picture takes the processor seconds: neither turn nor tokenizer wait for it."""
    begun, finish = threading.Event(), threading.Event()
    shared = LocalMllm(mllm.model, mllm.encoder.processor, name="shared")
    known, fresh = picture(70), picture(71)
    shared.generate(known, ask_box("abc", known), grammar=ONE)
    prepare = shared.encoder._processed

    def slowly(messages: Any) -> Any:
        begun.set()
        assert finish.wait(30)
        return prepare(messages)

    shared.encoder._processed = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(shared.generate, fresh, ask_box("abc", fresh), grammar=ONE)
        assert begun.wait(10)
        other = pool.submit(shared.generate, known, ask_box("def", known), grammar=ONE)
        try:
            assert other.result(20).text
            assert not waiting.done()
        finally:
            finish.set()
        assert waiting.result(20).text


def test_a_kept_prefix_is_never_changed(mllm: LocalMllm) -> None:
    image = picture(38)
    dialogue = ask_box("abc", image)
    inputs = mllm.encoder.image_inputs(image)
    encoded = mllm.encoder.encode(dialogue, inputs)
    first, logits = mllm.engine.read(mllm.engine.open(image.digest, encoded, inputs), (), 1)
    assert first.prefix is not None
    before = [layer.keys.clone() for layer in first.prefix.cache.layers]
    again = [mllm.engine.read(first, (5, 6, seed), 1)[1] for seed in (7, 8, 7)]
    cut = first.cut(len(first.ids) - 3)
    _, same = mllm.engine.read(cut, first.ids[-3:], 1)
    torch.testing.assert_close(same, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(again[0], again[2])
    assert (again[0] - again[1]).abs().max() > 1e-2
    for layer, keys in zip(first.prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


class _before_each_pass:
    """Calls a function with the number of each forward pass, and counts them."""

    def __init__(self, mllm: LocalMllm, function: Callable[[int], Any]) -> None:
        self.model, self.function, self.count = mllm.model, function, 0

    def __enter__(self) -> Any:
        def look(*_: Any) -> None:
            self.count += 1
            self.function(self.count)

        self.hook = self.model.register_forward_pre_hook(look)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def _make_adapter(folder: Path, target: Path, seed: int) -> Path:
    """A random LoRA adapter, as peft saves it."""
    model = LocalMllm.from_pretrained(folder, device="cpu").model
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0.0, 0.2, generator=generator)
    adapted.save_pretrained(target)
    return target
