"""Sampled replies come as often as the model would give them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from mllm_dialogues import FORM, ask_box
from random_models import build, picture

from sam4mllm_tool.grammar import Choice, Literal
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.oracle import RecomputeMllm
from sam4mllm_tool.mllm.sampling import divided, even_codes
from sam4mllm_tool.types import TargetCount

TWO_WORDS = (Choice(((Literal("Yes"),), (Literal("No"),), (Literal("box"),))),) * 2
WORDS = ("Yes", "No", "box")
LIKELY = 11.0
"""Nats: some 16 of the 20 bits that a probability in float32 holds."""

pytestmark = pytest.mark.usefixtures("one_thread")


def soften(mllm: LocalMllm, scale: float) -> None:
    """Random weights are sure of one reply; smaller logits make several likely."""
    mllm.model.get_output_embeddings().weight.data *= scale


def test_codes_fall_on_choices_as_often_as_they_are_likely() -> None:
    likely = torch.tensor([0.125, 0.0, 0.625, 0.25]).log()
    found = dict(divided(likely, even_codes(16)))
    assert {choice: len(codes) for choice, codes in found.items()} == {0: 2, 2: 10, 3: 4}
    # Within its choice a code says how far it was: evenly spread again.
    for codes in found.values():
        assert codes == pytest.approx(even_codes(len(codes)))
    assert [choice for choice, _ in divided(likely, (math.nextafter(1.0, 0.0),))] == [3]


@pytest.mark.parametrize("family", ["llava_next", "qwen3_5"])  # qwen3_5's cache cannot be cut
def test_each_reply_comes_as_often_as_plain_passes_say(family: str, tmp_path: Path) -> None:
    mllm = LocalMllm.from_pretrained(build(family, tmp_path), device="cpu")
    soften(mllm, 0.05)
    image = picture(3, (90, 60))
    dialogue = ask_box("it", image)
    count = 200
    drawn = mllm.sample(image, dialogue, grammar=TWO_WORDS, count=count)
    times = Counter(reply.text for reply in drawn)
    probabilities = {
        first + second: p * q
        for first, p in _plain(mllm, image, dialogue, "").items()
        for second, q in _plain(mllm, image, dialogue, first).items()
    }
    assert sum(probabilities.values()) == pytest.approx(1)
    for text, p in probabilities.items():
        assert abs(times[text] - p * count) <= 1 + 1e-3, text
    assert len(times) >= 6, "no single reply is sure"
    for reply in drawn:
        assert reply.log_probability is not None
        assert math.exp(reply.log_probability) == pytest.approx(probabilities[reply.text], abs=1e-4)
        assert reply.tokens == 2
    again = mllm.sample(image, dialogue, grammar=TWO_WORDS, count=count)
    assert [one.text for one in again] == [one.text for one in drawn]


def _plain(mllm: LocalMllm, image, dialogue, begun: str) -> dict[str, float]:
    """The words' probabilities among themselves after a begun reply, by one plain pass."""
    encoded, inputs = mllm._encoded(image, dialogue)
    words = {word: mllm.encoder.encode_continuation(word) for word in WORDS}
    assert all(len(ids) == 1 for ids in words.values())
    ids = (*encoded.ids, *(words[begun] if begun else ()))
    arguments = mllm.engine.image_arguments(inputs, ids, encoded.image_end)
    with torch.inference_mode():
        logits = mllm.model(**arguments).logits[0, -1].float()
    among = logits[[ids[0] for ids in words.values()]].softmax(-1).tolist()
    return dict(zip(words, among, strict=True))


def test_boxes_are_those_of_decoding_each_code_alone(tmp_path: Path) -> None:
    folder = build("llava_next", tmp_path)
    mllm, oracle = (cls.from_pretrained(folder, device="cpu") for cls in (LocalMllm, RecomputeMllm))
    image = picture(5, (70, 110))
    dialogue = ask_box("a thing", image, TargetCount.ONE)
    grammar = FORM.box_grammar(TargetCount.ONE)
    ours, theirs = (
        side.sample(image, dialogue, grammar=grammar, count=8) for side in (mllm, oracle)
    )
    assert [one.tokens for one in ours] == [one.tokens for one in theirs] == [4] * 8
    # What a code has left after unlikely choices is rounding: likely replies are compared.
    pairs = [
        (one, other)
        for one, other in zip(ours, theirs, strict=True)
        if (one.log_probability or 0) > -LIKELY
    ]
    assert len({one.text for one, _ in pairs}) >= 2
    for one, other in pairs:
        assert one.text == other.text
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)
