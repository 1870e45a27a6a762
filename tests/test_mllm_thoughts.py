"""Thinking models: the answer is what stands behind the thought, or there is none.

The models are random ones whose head is scripted: after each token of the script the next one is
by far the likeliest, in the engine's passes as in plain ``generate``. The templates end as the
published ones do: Qwen3-VL-Thinking's opens the thought, GLM-4.1V's leaves that to the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_server import TestServer, running
from mllm_dialogues import check_same
from random_models import build, picture
from test_mllm_plain import longer, plain_inputs

from sam4mllm_tool.errors import DialogueError, EndpointError, ThoughtCutOff
from sam4mllm_tool.formats import FORMATS, get_format
from sam4mllm_tool.mllm.endpoint import OpenAIEndpointMllm
from sam4mllm_tool.mllm.endpoint_check import PROBE, PROBE_DIALOGUE
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.oracle import RecomputeMllm
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.types import RgbImage, YesNo

IMAGE = picture(80, (90, 60))
BOX = '[{"bbox_2d": [100, 200, 300, 400]}]'
OTHER = "[001, 002, 003, 004] no object"  # what the thought considers
FORM = get_format("generic")


@pytest.fixture(scope="module", params=["qwen3_vl", "glm4v"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def thinker(folder: Path, kind: type[LocalMllm] = LocalMllm, budget: int = 200) -> LocalMllm:
    """With the two tokens of thinking checkpoints, and a template that ends as theirs."""
    loaded = LocalMllm.from_pretrained(folder, device="cpu")
    processor, model = loaded.encoder.processor, loaded.model
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(processor.tokenizer) + 3)
    if model.config.model_type == "qwen3_vl":
        template = processor.chat_template
        processor.chat_template = template.replace(
            "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
        )
        assert processor.chat_template != template
    return kind(model, processor, name="thinker", format_name="generic", thought_budget=budget)


@contextmanager
def scripted(
    mllm: LocalMllm, dialogue: Dialogue, text: str, image: RgbImage = IMAGE
) -> Iterator[list[int]]:
    """Let the model say that text first, token by token; gives the tokens.

    Which token comes next hangs on how many were read, in one pass or in many.
    """
    script = mllm.encoder.encode_continuation(text)
    prompt = len(mllm._encoded(image, dialogue)[0].ids)
    read: list[int] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache")
        past = 0 if cache is None else cache.get_seq_length()
        read[:] = range(past, past + kwargs["input_ids"].shape[1])

    def after(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        for row, index in enumerate(read[-logits.shape[1] :]):
            if 0 <= (step := index - prompt + 1) < len(script):
                logits[0, row, script[step]] += 50.0
        return logits

    hooks = (
        mllm.model.register_forward_pre_hook(before, with_kwargs=True),
        mllm.model.get_output_embeddings().register_forward_hook(after),
    )
    try:
        yield script
    finally:
        for hook in hooks:
            hook.remove()


def said(mllm: LocalMllm, thought: str, before: str = "") -> str:
    """The thought as this model says it: with its opening, unless the template writes that."""
    if mllm.model.config.model_type == "qwen3_vl":
        return thought
    return f"{before}<think>\n{thought}"


WHERE: Dialogue = (Turn("user", "Where is the cup?"),)
ON_IT: Dialogue = (Turn("user", "Is the point [10, 20] on the cup?"),)


@pytest.mark.parametrize("kind", [LocalMllm, RecomputeMllm])
@pytest.mark.parametrize("before", ["", "\n"])
def test_a_reply_is_what_stands_behind_the_thought(
    folder: Path, kind: type[LocalMllm], before: str
) -> None:
    """GLM-4.6V's generation prompt ends before the line break that its replies begin with."""
    mllm = thinker(folder, kind)
    text = said(mllm, f"Hm. {OTHER}\n</think>\n\n{BOX}", before)
    end = mllm.encoder.tokenizer.convert_ids_to_tokens(mllm.end_ids[0])
    with scripted(mllm, WHERE, text + end):
        reply = mllm.generate(IMAGE, WHERE, max_new_tokens=64)
    assert reply.text.strip() == BOX
    assert reply.log_probability == pytest.approx(0.0, abs=1e-3), "of the answer alone"
    boxes = FORM.read_boxes(reply.text, IMAGE.size).boxes
    assert [tuple(box) for box in boxes] == [(9.0, 12.0, 27.0, 24.0)]


@pytest.mark.parametrize("kind", [LocalMllm, RecomputeMllm])
@pytest.mark.parametrize("lead", ["\n\n", "", "\n<answer>"])
def test_yes_or_no_is_read_behind_the_thought(
    folder: Path, kind: type[LocalMllm], lead: str
) -> None:
    """Its probability is that of plain Hugging Face behind the closed thought."""
    mllm = thinker(folder, kind)
    text = said(mllm, f"Yes or no? {OTHER}</think>{lead}", before=lead[:1].strip("<"))
    with scripted(mllm, ON_IT, text) as script:
        answer = mllm.answer_yes_no(IMAGE, ON_IT, words=FORM.yes_no, count=1)
    inputs = plain_inputs(mllm, IMAGE, ON_IT)
    with torch.inference_mode():
        row = mllm.model(**longer(inputs, script)).logits[0, -1].softmax(-1)
    tokens = mllm._yes_no_tokens(FORM.yes_no)
    expected = [YesNo(*(float(row[list(ids)].sum()) for ids in (tokens.yes, tokens.no)))]
    check_same(answer, expected)


@pytest.mark.parametrize("kind", [LocalMllm, RecomputeMllm])
@pytest.mark.parametrize("end", ["", "<end>"])
def test_a_thought_that_was_cut_off_is_no_answer(
    folder: Path, kind: type[LocalMllm], end: str
) -> None:
    """Neither when its budget is spent, nor when the model ends its turn inside it."""
    mllm = thinker(folder, kind, budget=40)
    closing = mllm.encoder.tokenizer.convert_ids_to_tokens(mllm.end_ids[0])
    text = said(mllm, OTHER + end.replace("<end>", closing) + " and so on" * 20)
    for dialogue, ask in (
        (WHERE, lambda: mllm.generate(IMAGE, WHERE, max_new_tokens=64)),
        (ON_IT, lambda: mllm.answer_yes_no(IMAGE, ON_IT, words=FORM.yes_no, count=1)),
    ):
        with scripted(mllm, dialogue, text), pytest.raises(ThoughtCutOff) as caught:
            ask()
        assert "thought_budget" in caught.value.hint and not caught.value.retryable
        assert "001, 002" in caught.value.raw_reply


@pytest.mark.parametrize("kind", [LocalMllm, RecomputeMllm])
def test_without_a_budget_a_thought_is_closed_at_once(folder: Path, kind: type[LocalMllm]) -> None:
    mllm = thinker(folder, kind, budget=0)
    opening = said(mllm, "")[: len("<think>")]
    with scripted(mllm, WHERE, opening):
        assert mllm.generate(IMAGE, WHERE, max_new_tokens=4).text is not None
        answers = mllm.answer_yes_no(IMAGE, WHERE, words=FORM.yes_no, count=1)
    assert 0 < sum(answers[0]) <= 1


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "sam4mllm"])
@pytest.mark.parametrize("thought", [f"<think>{OTHER}", f"Hm.</think><think>\n{BOX}"])
def test_no_format_reads_a_thought_that_was_cut_off(name: str, thought: str) -> None:
    """Wherever it comes from: a backend of somebody's own, a recorded trace."""
    with pytest.raises(DialogueError, match="inside a thought"):
        FORMATS[name].read_boxes(thought, IMAGE.size)


def test_a_model_that_does_not_think_is_asked_as_ever(tmp_path: Path) -> None:
    """GLM-4V and Qwen3-VL-Instruct have the tokens too, and do not use them."""
    folder = build("glm4v", tmp_path)
    mllm, plain = thinker(folder), thinker(folder)
    plain.thinking = None
    with scripted(mllm, WHERE, BOX):
        first = mllm.generate(IMAGE, WHERE, max_new_tokens=40)
    with scripted(plain, WHERE, BOX):
        second = plain.generate(IMAGE, WHERE, max_new_tokens=40)
    assert (first.text, first.forward_passes) == (second.text, second.forward_passes)
    with scripted(mllm, WHERE, "\n" + BOX):  # a line break alone is no thought
        assert mllm.generate(IMAGE, WHERE, max_new_tokens=40).text.startswith("\n" + BOX)
    with scripted(mllm, ON_IT, "\n"):
        first_answers = mllm.answer_yes_no(IMAGE, ON_IT, words=FORM.yes_no, count=3)
    with scripted(plain, ON_IT, "\n"):
        check_same(first_answers, plain.answer_yes_no(IMAGE, ON_IT, words=FORM.yes_no, count=3))


def test_a_served_model_is_read_behind_its_thought(folder: Path) -> None:
    mllm = thinker(folder)
    opening = said(mllm, "", before="\n")
    server = TestServer(mllm)
    with running(server) as url:
        remote = OpenAIEndpointMllm(url, thought_budget=100)
        with scripted(mllm, PROBE_DIALOGUE, opening, PROBE):
            assert remote._served().thinks
        remote._tokens(FORM.yes_no)  # the examination's questions are not those of the scripts

        with scripted(mllm, ON_IT, f"{opening}Hm. {OTHER}</think>\n\nYes"):
            answers = remote.answer_yes_no(IMAGE, ON_IT, words=FORM.yes_no, count=1)
            assert answers[0].p_yes > 0.99
            with pytest.raises(EndpointError, match="one question at a time"):
                remote.answer_yes_no(IMAGE, ON_IT, words=FORM.yes_no, count=2)
        with scripted(mllm, ON_IT, opening + OTHER * 9), pytest.raises(ThoughtCutOff):
            remote.answer_yes_no(IMAGE, ON_IT, words=FORM.yes_no, count=1)
        with scripted(mllm, WHERE, f"{opening}{OTHER}</think>\n\n{BOX}"):
            reply = remote.generate(IMAGE, WHERE, max_new_tokens=40)
        assert reply.text.startswith(BOX)
        with scripted(mllm, WHERE, opening + OTHER * 99), pytest.raises(ThoughtCutOff):
            remote.generate(IMAGE, WHERE, max_new_tokens=40)
