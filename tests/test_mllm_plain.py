"""The engine's logits are plain Hugging Face's: ``model(**processor.apply_chat_template(…))``.

Nothing of ours takes part on that side: the processor tokenises the whole dialogue with its image
inside, and the model reads it in one pass without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mllm_dialogues import FORM, answers, ask_box, ask_points, open_dialogue
from random_models import FAMILIES, build, picture

from sam4mllm_tool.formats import get_format
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.types import RgbImage

TOLERANCE = 1e-4
GENERIC = get_format("generic")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def mllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalMllm:
    folder = build(request.param, tmp_path_factory.mktemp(request.param))
    return LocalMllm.from_pretrained(folder, device="cpu")


def plain_inputs(mllm: LocalMllm, image: RgbImage, dialogue: Dialogue) -> dict[str, Any]:
    """The processor's own inputs for a dialogue about a picture."""
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in dialogue
    ]
    first = next(m for m in messages if m["role"] == "user")
    first["content"].insert(0, {"type": "image", "image": image.pil})
    inputs: dict[str, Any] = mllm.encoder.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs


def plain_logits(mllm: LocalMllm, image: RgbImage, dialogue: Dialogue) -> torch.Tensor:
    """Logits behind the generation prompt, shape (vocabulary,)."""
    with torch.inference_mode():
        logits: torch.Tensor = mllm.model(**plain_inputs(mllm, image, dialogue)).logits[0, -1]
    return logits


def engine_logits(mllm: LocalMllm, image: RgbImage, dialogue: Dialogue) -> torch.Tensor:
    """The same by the engine, which then keeps what it has read."""
    spot, logits = mllm.engine.read(open_dialogue(mllm, image, dialogue), ())
    mllm.engine.keep(spot)
    return logits[-1]


def test_logits_are_those_of_plain_hugging_face(mllm: LocalMllm) -> None:
    one, other = picture(1, (120, 70)), picture(2, (61, 133))
    opening = ask_box("a small cup", one)
    dialogues = [
        (one, (Turn("user", "Where is it?"),)),
        (one, opening),  # goes on from what was kept, or starts with other ids before the image
        (other, opening),
        (one, ask_points(opening, "[010,020,300,400]", one, 5, 0)),
        (one, ask_box("a large cup", one)),
        (other, ask_points(opening, "[500,020,700,400]", other, 9, 1)),
    ]
    for image, dialogue in dialogues:
        expected = plain_logits(mllm, image, dialogue)
        found = engine_logits(mllm, image, dialogue)
        assert found.std() > 0.1, "logits that do not vary prove nothing"
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_answers_read_in_one_pass_are_those_of_plain_hugging_face(mllm: LocalMllm) -> None:
    """Each slot by a pass of its own, the likeliest yes or no then put behind the dialogue."""
    image = picture(3, (90, 110))
    opening = ask_box("a cup", image)
    question = ask_points(opening, "[010,020,300,400]", image, 4, 2)
    inputs = plain_inputs(mllm, image, question)
    tokens = mllm._yes_no_tokens(FORM.yes_no)
    either = torch.tensor([*tokens.yes, *tokens.no])
    for answer in answers(mllm, image, question, 4):
        with torch.inference_mode():
            row = mllm.model(**inputs).logits[0, -1]
        chances = row.softmax(-1)
        assert answer.p_yes == pytest.approx(float(chances[list(tokens.yes)].sum()), abs=TOLERANCE)
        assert answer.p_no == pytest.approx(float(chances[list(tokens.no)].sum()), abs=TOLERANCE)
        inputs = longer(inputs, [int(either[row[either].argmax()])])


def longer(inputs: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Inputs with more text tokens behind them."""
    fillers = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    shape = inputs["input_ids"].shape
    return {
        name: torch.cat([value, value.new_tensor([fillers.get(name, [0] * len(ids))])], 1)
        if value.shape == shape else value
        for name, value in inputs.items()
    }  # fmt: skip


# --- PaliGemma: one question, read both ways ------------------------------------------------------


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def one_question(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LocalMllm:
    folder = build(request.param, tmp_path_factory.mktemp(request.param))
    assert not list(folder.glob("chat_template*")), "as published"
    return LocalMllm.from_pretrained(folder, device="cpu")


def paligemma_inputs(mllm: LocalMllm, image: RgbImage, text: str) -> dict[str, Any]:
    """As its model card has it: text and picture to the processor, without a chat template."""
    inputs = mllm.encoder.processor(text=f"<image>{text}", images=image.pil, return_tensors="pt")
    return {name: value for name, value in inputs.items() if name != "labels"}


def test_paligemmas_logits_are_those_of_plain_hugging_face(one_question: LocalMllm) -> None:
    mllm = one_question
    assert mllm.format_name == "paligemma"
    one, other = picture(1, (120, 70)), picture(2, (61, 133))
    asked = "detect a small cup"
    for image, text in [(one, asked), (one, asked + "s"), (other, asked), (one, asked)]:
        with torch.inference_mode():
            expected = mllm.model(**paligemma_inputs(mllm, image, text)).logits[0, -1]
        found = engine_logits(mllm, image, (Turn("user", text),))
        assert found.std() > 0.1
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_paligemma_replies_as_plain_generate(one_question: LocalMllm) -> None:
    """Replies are read one way: with their own positions, behind a prompt read both ways."""
    mllm, image = one_question, picture(4, (80, 80))
    for text in ("detect cup", "answer en is mark 1 on the cup?"):
        inputs = paligemma_inputs(mllm, image, text)
        with torch.inference_mode():
            plain = mllm.model.generate(
                **inputs, do_sample=False, max_new_tokens=8, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        ids = plain.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        said = mllm.generate(image, (Turn("user", text),), max_new_tokens=8)
        again = mllm.generate(image, (Turn("user", text),), max_new_tokens=8)
        ours = [token for token in ids if token not in mllm.end_ids]
        assert said.text == again.text == mllm.encoder.decode_continuation(ours)
        words = GENERIC.yes_no
        tokens = mllm._yes_no_tokens(words)
        row = plain.logits[0][0].softmax(-1)
        answer = mllm.answer_yes_no(image, (Turn("user", text),), words=words, count=1)[0]
        assert answer.p_yes == pytest.approx(float(row[list(tokens.yes)].sum()), abs=TOLERANCE)
        assert answer.p_no == pytest.approx(float(row[list(tokens.no)].sum()), abs=TOLERANCE)
