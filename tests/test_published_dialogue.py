"""The dialogue as the model reads it: recorded ids, published templates, real vocabularies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_models.datatypes import RawMessage, StopReason
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer
from PIL import Image
from random_models import build, byte_tokenizer, picture
from real_vocabularies import IMAGE, IMAGE_ID, add_start, llama3, qwen
from safetensors.torch import save_file
from transformers.utils.chat_template_utils import render_jinja_template

from recipes.embedded_mllm.lessons import TOPICS, Lesson
from recipes.embedded_mllm.lessons import Turn as LessonTurn
from recipes.embedded_mllm.packing import Packer
from sam4mllm_tool import embedded
from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.grammar import Number
from sam4mllm_tool.mllm.encoding import DialogueEncoder, ImageInputs
from sam4mllm_tool.mllm.grammar_tokens import TokenGrammar, yes_no_tokens
from sam4mllm_tool.mllm.loading import load_processor
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm
from sam4mllm_tool.training.convert_adapter import CHAT_TEMPLATE, convert_adapter
from sam4mllm_tool.types import Point, PointLabel, RgbImage, TargetCount, YesNo

FORM = Sam4MllmFormat()
SYSTEM = Turn("system", FORM.system_prompt or "")
ROUND_1 = Turn(
    "user", FORM.ask_boxes("the red star left of a qzx", TargetCount.ONE_OR_MORE, (640, 480))
)
ROUND_2 = Turn(
    "user",
    "Check if the points listed below are located on the object with bounding box "
    "[281,251,863,999]:\n(822,771) (300,900)",
)
BOXES = "[281,251,863,999] [010,020,300,400]"

ASKED = (
    (),
    (BOXES,),
    ("No object found.", "YesNo"),
)
"""Replies so far, to the questions below in turn; the next question is open."""
QUESTIONS = (ROUND_1.text, ROUND_2.text, "What is at (010,020)?")


@pytest.mark.parametrize("replies", ASKED)
def test_the_embedded_model_reads_the_ids_that_its_training_packed(
    replies: tuple[str, ...],
) -> None:
    """Training packs ids from the vocabulary alone; questions go through the chat template."""
    processor = load_processor(embedded.MLLM)
    packer = Packer(processor.tokenizer, 1, TOPICS)
    asked = QUESTIONS[: len(replies) + 1]
    taught = zip(asked, (*replies, ""), strict=True)
    packed, _ = packer.lesson(Lesson("points", tuple(LessonTurn(*turn) for turn in taught)))
    dialogue = [SYSTEM, Turn("user", asked[0])]
    for reply, question in zip(replies, asked[1:], strict=True):
        dialogue += [Turn("assistant", reply), Turn("user", question)]
    encoder = DialogueEncoder(processor)
    assert _ids(encoder, tuple(dialogue)) == [*packer.prefix, *packed[:-1]]
    assert encoder.encode_continuation("YesNo") == packer.encode("YesNo")
    assert encoder.encode_continuation("[010,") == packer.encode("[010,")


# --- the published adapters over the real vocabulary of Llama-3 --------------------------------

NO, YES, END = 2822, 9642, 128009
# What the authors' demo shows (image of 640 x 479 pixels, "side view bird").
DEMO_SIZE = (640, 479)
DEMO_REPLY = "[281,251,863,999]"
DEMO_BOX = "[281,240,863,999]"
DEMO_IDS = [2822, 2822, 2822, 9642, 2822, 9642, 9642, 9642, 9642, 2822, 2822, 9642, 2822, 2822,
            2822, 128009]  # fmt: skip
DEMO_POINTS = [
    (822, 771), (577, 915), (810, 923), (467, 482), (793, 315), (350, 452), (449, 634), (566, 611),
    (443, 331), (624, 695), (333, 604), (583, 460), (461, 938), (676, 338), (705, 794),
]  # fmt: skip
DEMO_ANSWERS = [  # P(No), P(Yes)
    (9.9998546e-01, 1.3845995e-05), (9.9847287e-01, 1.5247829e-03), (9.9999118e-01, 8.8011011e-06),
    (2.2341585e-04, 9.9977428e-01), (9.9999571e-01, 4.2228330e-06), (1.0987293e-03, 9.9889970e-01),
    (3.7052934e-05, 9.9996197e-01), (4.1485167e-01, 5.8503461e-01), (1.4413941e-01, 8.5579509e-01),
    (9.8981768e-01, 1.0169528e-02), (9.9398911e-01, 6.0035517e-03), (2.1156995e-03, 9.9788243e-01),
    (9.9839956e-01, 1.5978414e-03), (9.8754698e-01, 1.2431381e-02), (9.9961072e-01, 3.8596481e-04),
]  # fmt: skip
DEMO_KEPT = [
    (822, 771), (577, 915), (810, 923), (467, 482), (793, 315), (350, 452), (449, 634), (443, 331),
    (624, 695), (333, 604), (583, 460), (461, 938), (676, 338), (705, 794),
]  # fmt: skip
DEMO_LABELS = [0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0]
QUESTION_1 = (
    "Please provide the bounding box coordinate of the region this sentence describes (1):\n"
    '"side view bird".'
)
QUESTION_2 = (
    "Check if the points listed below are located on the object with bounding box "
    "[281,240,863,999]:\n(822,771) (577,915) (810,923) (467,482) (793,315) (350,452) (449,634) "
    "(566,611) (443,331) (624,695) (333,604) (583,460) (461,938) (676,338) (705,794)"
)


@dataclass
class _Text:
    """As much of a processor as the encoder needs for text."""

    tokenizer: Any
    chat_template: str
    image_token: str = IMAGE

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool, **_: Any) -> str:
        (text,), _spans = render_jinja_template(
            [messages], chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.tokenizer.bos_token,
        )  # fmt: skip
        return str(text)


def _ids(encoder: DialogueEncoder, dialogue: Dialogue) -> list[int]:
    """The ids up to the reply, one image token for the image."""
    image = ImageInputs((encoder.image_token_id,), {}, {})
    return list(encoder.encode(dialogue, image).ids)


def _reference(*parts: str | int) -> list[int]:
    """Ids by Meta's own tokenizer: text in which control tokens may stand, and ids."""
    meta = Tokenizer.get_instance()
    return [
        i
        for part in parts
        for i in (
            [part]
            if isinstance(part, int)
            else meta.encode(part, bos=False, eos=False, allowed_special="all")
        )
    ]


_HEAD = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and "
    "vision assistant. You are able to understand the visual content that the user provides, and "
    "assist the user with a variety of tasks using natural language.<|eot_id|>"
)
_USER, _ASSISTANT = (
    f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
)
BIRD_1 = Turn("user", FORM.ask_boxes("side view bird", TargetCount.ONE, DEMO_SIZE))


def _bird_2() -> Turn:
    box = FORM.read_boxes(DEMO_BOX, DEMO_SIZE).boxes[0]
    return Turn("user", FORM.ask_points("side view bird", box, _demo_points(), DEMO_SIZE))


def _demo_points() -> list[Point]:
    return [Point(x / 1000 * DEMO_SIZE[0], y / 1000 * DEMO_SIZE[1]) for x, y in DEMO_POINTS]


@pytest.fixture(scope="module", params=[False, True], ids=["template starts", "tokenizer starts"])
def published(request: pytest.FixtureRequest) -> DialogueEncoder:
    return DialogueEncoder(_Text(llama3(request.param), CHAT_TEMPLATE))


def test_both_rounds_are_read_as_published(published: DialogueEncoder) -> None:
    assert (BIRD_1.text, _bird_2().text) == (QUESTION_1, QUESTION_2)
    first = _reference(_HEAD + _USER, IMAGE_ID, "\n" + QUESTION_1 + "<|eot_id|>" + _ASSISTANT)
    assert _ids(published, (SYSTEM, BIRD_1)) == first
    second = _reference(f"{DEMO_REPLY}<|eot_id|>{_USER}{QUESTION_2}<|eot_id|>{_ASSISTANT}")
    for reply in (DEMO_REPLY, f"\n{DEMO_REPLY}", f" {DEMO_REPLY}\n"):  # trimmed, as data has it
        dialogue = (SYSTEM, BIRD_1, Turn("assistant", reply), _bird_2())
        assert _ids(published, dialogue) == first + second
    # A few of them by hand, from the published vocabulary.
    assert first[:6] == [128000, 128006, 9125, 128007, 271, 2675]
    assert first[-5:] == [128009, 128006, 78191, 128007, 271]
    at = first.index(IMAGE_ID)
    assert first[at - 4 : at + 2] == [128006, 882, 128007, 271, IMAGE_ID, 198]
    assert second[:10] == [58, 15282, 11, 13860, 11, 26051, 11, 5500, 60, 128009]


def test_both_rounds_are_learnt_as_they_are_asked(published: DialogueEncoder) -> None:
    """Training: the same ids in one sequence, with the recorded replies under loss."""
    reply = "".join("Yes" if i == YES else "No" for i in DEMO_IDS[:-1])
    dialogue = (SYSTEM, BIRD_1, Turn("assistant", DEMO_REPLY), _bird_2(), Turn("assistant", reply))
    image = ImageInputs((published.image_token_id,), {}, {})
    (transcript,) = published.transcripts(dialogue, image)
    first, second = (_ids(published, dialogue[:number]) for number in (2, 4))
    assert list(transcript.ids) == second + DEMO_IDS
    boxes, answers = (list(transcript.ids[start:end]) for start, end in transcript.replies)
    assert transcript.replies[0][0] == len(first) and transcript.replies[1][0] == len(second)
    assert boxes == _reference(f"{DEMO_REPLY}<|eot_id|>") and answers == DEMO_IDS


def test_every_number_of_the_grid_is_one_token(published: DialogueEncoder) -> None:
    grammar = TokenGrammar((Number(3),), published, [END])
    meta = Tokenizer.get_instance()
    expected = {meta.encode(f"{n:03d}", bos=False, eos=False)[0] for n in range(1000)}
    assert set(grammar.allowed(grammar.start)) == expected and len(expected) == 1000


def test_a_dialogue_without_an_image_is_metas_own(published: DialogueEncoder) -> None:
    """Meta's chat format, which shares no code with ours, writes the other messages alike."""
    said = [RawMessage(role="system", content=SYSTEM.text),
            RawMessage(role="user", content=QUESTION_1),
            RawMessage(role="assistant", content=DEMO_REPLY, stop_reason=StopReason.end_of_turn),
            RawMessage(role="user", content=QUESTION_2)]  # fmt: skip
    theirs = ChatFormat(Tokenizer.get_instance()).encode_dialog_prompt(said).tokens
    ours = _ids(published, (SYSTEM, BIRD_1, Turn("assistant", DEMO_REPLY), _bird_2()))
    at = ours.index(IMAGE_ID)
    assert ours[:at] + ours[at + 2 :] == theirs


def test_replies_are_the_recorded_tokens(published: DialogueEncoder) -> None:
    said = "".join("Yes" if i == YES else "No" for i in DEMO_IDS[:-1])
    assert said == "NoNoNoYesNoYesYesYesYesNoNoYesNoNoNo"
    assert published.decode_continuation(DEMO_IDS) == said
    assert published.encode_continuation(said) == DEMO_IDS[:-1]
    assert published.end_of_turn_ids() == [END]
    words = FORM.yes_no
    tokens = yes_no_tokens(published, words.yes, words.no)
    assert (tokens.yes[0], tokens.no[0]) == (YES, NO)
    for count in TargetCount:
        grammar = TokenGrammar(FORM.box_grammar(count), published, [END])
        ids = published.encode_continuation(DEMO_REPLY)
        assert [published.decode_continuation([i]) for i in ids] == [
            "[", "281", ",", "251", ",", "863", ",", "999", "]",
        ]  # fmt: skip
        assert _accepts(grammar, [*ids, END])
    several = published.encode_continuation(f"{DEMO_REPLY} [001,020,300,400]")
    assert _accepts(TokenGrammar(FORM.box_grammar(TargetCount.ONE_OR_MORE), published, [END]),
                    [*several, END])  # fmt: skip


def _accepts(grammar: TokenGrammar, ids: list[int]) -> bool:
    """Whether the grammar lets the model say just these tokens."""
    place = grammar.start
    for token in ids:
        options = grammar.allowed(place)
        if token not in options:
            return False
        place = options[token]
    return True


def test_the_demos_answers_become_the_demos_prompt() -> None:
    answers = [YesNo(p_yes=yes, p_no=no) for no, yes in DEMO_ANSWERS]
    mllm = ScriptedMllm([DEMO_REPLY], [answers])
    model = Sam4MLLM(mllm, ColourSegmenter())
    image = RgbImage.from_pil(Image.new("RGB", DEMO_SIZE))
    location = model.locate(image, "side view bird")
    assert location.objects[0].box == pytest.approx((179.84, 120.229, 552.32, 478.521))
    box = FORM.read_boxes(DEMO_BOX, DEMO_SIZE).boxes[0]
    checked = model.check_points(image, location, box, _demo_points())
    kept = [point for point in checked if point.label is not PointLabel.UNDECIDED]
    labels = [int(point.label is PointLabel.FOREGROUND) for point in kept]
    assert labels == DEMO_LABELS
    for point, (x, y) in zip(kept, DEMO_KEPT, strict=True):
        assert (point.x, point.y) == pytest.approx((x * 0.64, y * 0.479))


def _small_adapter(folder: Path) -> None:
    """An adapter of the original code base, over the random LLaVA-NeXT."""
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight":
               torch.ones(128, 2)}  # fmt: skip
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_the_template_lies_beside_a_converted_adapter_and_is_used(tmp_path: Path) -> None:
    base = build("llava_next", tmp_path / "base")
    _small_adapter(tmp_path / "old")
    adapter = convert_adapter(tmp_path / "old", tmp_path / "new")
    mllm = LocalMllm.from_pretrained(base, adapter, device="cpu")
    dialogue = (SYSTEM, BIRD_1, Turn("assistant", f" {DEMO_REPLY}"), ROUND_2)
    ids = mllm.encoder.encode(dialogue, mllm.encoder.image_inputs(picture(0))).ids
    text = mllm.encoder.tokenizer.decode(ids)
    assert text.startswith(_HEAD + _USER + "<image>")
    assert text.endswith(f"<image>\n{QUESTION_1}<|eot_id|>{_ASSISTANT}{DEMO_REPLY}<|eot_id|>{_USER}"
                         f"{ROUND_2.text}<|eot_id|>{_ASSISTANT}")  # fmt: skip
    own = LocalMllm.from_pretrained(base, device="cpu").encoder
    assert own.encode(dialogue, own.image_inputs(picture(0))).ids != ids
    other = build("qwen2_5_vl", tmp_path / "other")
    with pytest.raises(CheckpointError, match="no token of this base"):
        load_processor(other, adapter)


@pytest.mark.parametrize("adds_start", [False, True])
def test_the_tokenizer_beside_an_adapter_tells_what_the_original_code_read(
    adds_start: bool, tmp_path: Path
) -> None:
    """Its function for prompts with an image doubles the start token, or loses a newline."""
    _small_adapter(tmp_path / "old")
    # What counts is whether it writes a start token of its own, not its vocabulary.
    beside = byte_tokenizer(["<|begin_of_text|>", "<|eot_id|>"], {}, 3).backend_tokenizer
    if adds_start:
        add_start(beside)
    beside.save(str(tmp_path / "old/tokenizer.json"))
    adapter = convert_adapter(tmp_path / "old", tmp_path / "new")
    encoder = DialogueEncoder(
        _Text(llama3(adds_start), (adapter / "chat_template.jinja").read_text())
    )
    dialogue = (SYSTEM, BIRD_1, Turn("assistant", DEMO_REPLY), _bird_2())
    rest = _reference(f"<|eot_id|>{_ASSISTANT}{DEMO_REPLY}<|eot_id|>{_USER}{QUESTION_2}<|eot_id|>"
                      f"{_ASSISTANT}")  # fmt: skip
    if adds_start:
        read = _reference(128000, _HEAD + _USER, IMAGE_ID, "\n" + QUESTION_1)
    else:
        read = _reference(_HEAD + _USER, IMAGE_ID, QUESTION_1)
    assert _ids(encoder, dialogue) == read + rest


def test_a_tokenizer_of_another_base_is_refused(tmp_path: Path) -> None:
    _small_adapter(tmp_path / "old")
    byte_tokenizer(["<s>", "</s>"], {}, 3).backend_tokenizer.save(
        str(tmp_path / "old/tokenizer.json")
    )
    with pytest.raises(CheckpointError, match="begin_of_text"):
        convert_adapter(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old/tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_adapter(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What llava-hf publishes beside llama3-llava-next-8b: a newline before every text, no start token
# (the tokenizer's), nothing trimmed. In our words.
LLAVA_HF = (
    "{% for m in messages %}{{ '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\n\n' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ '\n' ~ p['text'] ~ '<|eot_id|>' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def test_what_the_bases_own_template_would_feed() -> None:
    """The difference that serving an adapter without its own template makes, token by token."""
    dialogue = (SYSTEM, BIRD_1, Turn("assistant", DEMO_REPLY), _bird_2())
    ours = _ids(DialogueEncoder(_Text(llama3(True), CHAT_TEMPLATE)), dialogue)
    theirs = _ids(DialogueEncoder(_Text(llama3(True), LLAVA_HF)), dialogue)
    blank = {271: "\n\n", 1432: "\n\n\n"}
    assert llama3(True).convert_ids_to_tokens(list(blank)) == ["ĊĊ", "ĊĊĊ"]
    differing = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    # Before the system's text, the first reply and the second question; elsewhere they agree.
    assert differing == [(271, 1432)] * 3
    # Without a start token by the tokenizer that template writes none at all.
    assert _ids(DialogueEncoder(_Text(llama3(False), LLAVA_HF)), dialogue) == theirs[1:]


def test_qwens_vocabulary() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = DialogueEncoder(_Text(qwen(), template))
    # No three-digit groups: every digit is a token of its own.
    assert [encoder.decode_continuation([i]) for i in encoder.encode_continuation("[281,251,")] == [
        "[", "2", "8", "1", ",", "2", "5", "1", ",",
    ]  # fmt: skip
    tokens = yes_no_tokens(encoder, ("Yes",), ("No",))
    assert (tokens.yes[0], tokens.no[0]) == (9454, 2753)
    assert encoder.encode_continuation("NoYesYesNo") == [2753, 9454, 9454, 2753]
    (end,) = encoder.end_of_turn_ids()
    assert encoder.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    grammar = TokenGrammar(FORM.box_grammar(TargetCount.ONE), encoder, [end])
    assert _accepts(grammar, [*encoder.encode_continuation(DEMO_REPLY), end])
