"""What is learnt is what is asked: one encoder gives the ids of training and of inference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import FAMILIES, build, picture
from tokenizers import processors

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.mllm.encoding import DialogueEncoder, Transcript
from sam4mllm_tool.mllm.grammar_tokens import TokenGrammar, yes_no_tokens
from sam4mllm_tool.mllm.loading import load_processor
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.training.dialogues import Conversation, Recipe
from sam4mllm_tool.training.sequences import IGNORED, Collator, ConversationEncoder
from sam4mllm_tool.types import TargetCount

FORM = Sam4MllmFormat()
IMAGE = picture(3, (150, 90))
TURNS = (
    Turn("user", FORM.ask_boxes("the dog", TargetCount.ONE_OR_MORE, IMAGE.size)),
    Turn("assistant", "[281,251,863,999] [001,020,300,400]"),
    Turn("user", "Check if the points listed below are located on the object with bounding box "
                 "[281,251,863,999]:\n(822,771) (300,900) (001,002)"),
    Turn("assistant", "YesNoNo"),
    Turn("user", FORM.ask_boxes("a bus", TargetCount.ZERO_OR_MORE, IMAGE.size)),
    Turn("assistant", "No object found."),
)  # fmt: skip
SYSTEM = Turn("system", FORM.system_prompt or "")
TEMPLATES = {
    "own": "",
    "trims": "{{ p['text'] | trim }}",
    "newline before every text": "{{ '\n' ~ p['text'] }}",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def _processor(folder: Path, template: str, adds_start: bool) -> Any:
    """A family's processor with another way to write texts, or a tokenizer that adds a start."""
    processor = load_processor(folder)
    if template != "own":
        written = re.compile(r"\{\{ p\['text'\].*?\}\}")
        assert written.search(processor.chat_template)
        processor.chat_template = written.sub(
            lambda _: TEMPLATES[template], processor.chat_template
        )
    if adds_start:
        start = processor.tokenizer.bos_token
        processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, processor.tokenizer.bos_token_id)]
        )
    return processor


def _learnt(transcripts: tuple[Transcript, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(what is read before, what is said) of each reply that is learnt."""
    return [(t.ids[:start], t.ids[start:end]) for t in transcripts for start, end in t.replies]


@pytest.mark.parametrize("adds_start", [False, True], ids=["", "start token added"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_training_reads_and_says_the_ids_of_inference(
    family: Path, template: str, adds_start: bool
) -> None:
    processor = _processor(family, template, adds_start)
    encoder = DialogueEncoder(processor)
    if adds_start and "molmo2" in str(family):  # its processor adds one as well
        with pytest.raises(CheckpointError, match="processor rewrites"):
            encoder.image_inputs(IMAGE)
        return
    image = encoder.image_inputs(IMAGE)
    conversation = Conversation("x", IMAGE, TURNS, ("box", "points", "box"), {})
    sequences = ConversationEncoder(processor, Recipe()).encode(conversation)
    dialogue: Dialogue = (SYSTEM, *TURNS)
    pairs = _learnt(encoder.transcripts(dialogue, image))
    assert len(pairs) == 3
    ends = encoder.end_of_turn_ids()
    for number, (read, said) in zip((2, 4, 6), pairs, strict=True):
        assert read == encoder.encode(dialogue[:number], image).ids
        assert said[-1] in ends
    # The first prompt is what the processor itself makes of the messages.
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM.text}]},
        {"role": "user", "content": [{"type": "image", "image": IMAGE.pil},
                                     {"type": "text", "text": TURNS[0].text}]},
    ]  # fmt: skip
    plain = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert pairs[0][0] == tuple(plain["input_ids"][0].tolist())
    # Replies are what a grammar lets the engine say, and its answers of yes and no.
    for count, (_, said) in ((TargetCount.ONE_OR_MORE, pairs[0]), (TargetCount.ZERO_OR_MORE,
                                                                  pairs[2])):  # fmt: skip
        place = (grammar := TokenGrammar(FORM.box_grammar(count), encoder, ends)).start
        for token in said:
            assert token in grammar.allowed(place)
            place = grammar.allowed(place)[token]
    words = yes_no_tokens(encoder, FORM.yes_no.yes, FORM.yes_no.no)
    yes, no, other, _ = pairs[1][1]
    assert yes in words.yes and {no, other} <= set(words.no)
    # The trainer's tensors hold just these.
    under_loss = [row.labels[row.labels != IGNORED].tolist() for row in sequences]
    assert [i for row in under_loss for i in row] == [i for _, said in pairs for i in said]
    for row in sequences:
        last = int((row.labels[0] != IGNORED).nonzero()[-1])
        assert last == row.labels.shape[1] - 1
        assert any(tuple(row.inputs["input_ids"][0].tolist()) == r + s for r, s in pairs)


def test_how_many_sequences_a_template_needs(tmp_path: Path) -> None:
    """One where earlier replies are written as they are said, else one for each reply."""
    found = {}
    for family in ("llava_next", "qwen2_5_vl", "llava"):
        folder = build(family, tmp_path / family)
        for template in TEMPLATES:
            encoder = DialogueEncoder(_processor(folder, template, False))
            transcripts = encoder.transcripts((SYSTEM, *TURNS), encoder.image_inputs(IMAGE))
            found[family, template] = len(transcripts)
    # LLaVA-1.5 writes a space before an earlier reply.
    assert found == {
        ("llava_next", "own"): 1, ("llava_next", "trims"): 1,
        ("llava_next", "newline before every text"): 3,
        ("qwen2_5_vl", "own"): 1, ("qwen2_5_vl", "trims"): 1,
        ("qwen2_5_vl", "newline before every text"): 3,
        ("llava", "own"): 3, ("llava", "trims"): 3, ("llava", "newline before every text"): 3,
    }  # fmt: skip


def test_control_tokens_in_text_are_not_learnt_as_such(family: Path) -> None:
    encoder = DialogueEncoder(load_processor(family))
    image = encoder.image_inputs(IMAGE)
    spelled = "".join(encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.control_ids))[:6])
    kinds = []
    for text in ("harmless", spelled):
        dialogue = (
            Turn("user", f"Say {text}."), Turn("assistant", f"It is {text}, yes."),
            Turn("user", f"Again {text}?"), Turn("assistant", "No."),
        )  # fmt: skip
        pairs = _learnt(encoder.transcripts(dialogue, image))
        for number, (read, said) in zip((1, 3), pairs, strict=True):
            assert read == encoder.encode(dialogue[:number], image).ids
            assert [i for i in said if i in encoder.control_ids] == [said[-1]]
        controls = encoder.control_ids | {encoder.image_token_id}
        kinds.append([[i for i in read if i in controls] for read, _ in pairs])
    assert kinds[0] == kinds[1]


def test_a_training_pass_sees_what_the_engine_sees(family: Path) -> None:
    """Logits at every learnt token, against the engine that reads the prompt and then the reply."""
    torch.set_num_threads(1)
    mllm = LocalMllm.from_pretrained(family, device="cpu")
    encoder = ConversationEncoder(mllm.encoder.processor, Recipe())
    conversation = Conversation("x", IMAGE, TURNS, ("box", "points", "box"), {})
    rows = encoder.encode(conversation)
    transcripts = mllm.encoder.transcripts((SYSTEM, *TURNS), mllm.encoder.image_inputs(IMAGE))
    image = mllm.encoder.image_inputs(IMAGE)
    replies = 0
    for row, transcript in zip(rows, transcripts, strict=True):
        with torch.inference_mode():
            logits = mllm.model(**row.inputs).logits[0]
        for start, end in transcript.replies:
            prompt = mllm.encoder.encode((SYSTEM, *TURNS[: 2 * replies + 1]), image)
            spot = mllm.engine.open(IMAGE.digest, prompt, image)
            _, seen = mllm.engine.read(spot, transcript.ids[start : end - 1], end - start)
            # Linear attention is summed in another order in one pass (3e-4).
            torch.testing.assert_close(logits[start - 1 : end - 1], seen, atol=1e-3, rtol=1e-3)
            replies += 1
    assert replies == 3


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "qwen2_5_vl", "internvl"])
def test_pictures_of_different_shapes_share_a_batch(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    mllm = LocalMllm.from_pretrained(build(name, tmp_path), device="cpu")
    encoder = ConversationEncoder(mllm.encoder.processor, Recipe())
    rows = [
        encoder.encode(Conversation("x", picture(n, size), TURNS[:2], ("box",), {}))
        for n, size in enumerate([(150, 50), (60, 60)])
    ]
    pad = mllm.encoder.tokenizer.pad_token_id
    batch = Collator(pad)(rows)
    labels = batch.pop("labels")
    with torch.inference_mode():
        together = mllm.model(**batch).logits
        for number, (row,) in enumerate(rows):
            alone = mllm.model(**row.inputs).logits[0]
            chosen = (row.labels[0] != IGNORED).nonzero()[:, 0]
            torch.testing.assert_close(
                together[number][chosen - 1], alone[chosen - 1], atol=2e-4, rtol=2e-4
            )
            assert torch.equal(labels[number][chosen], row.labels[0][chosen])
