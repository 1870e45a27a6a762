"""Checks of a local MLLM: its tokens, its logits, and the engine against plain Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sam4mllm_tool.checkup.findings import Finding, Verdict, graded
from sam4mllm_tool.formats import DialogueFormat
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.types import Box, Point, RgbImage, TargetCount

_HALF_STEP = {torch.float32: 1e-3}
"""Largest difference of probabilities that rounding explains; for 16-bit dtypes it is 0.05."""


def mllm_findings(mllm: LocalMllm, speech: DialogueFormat, image: RgbImage) -> Iterator[Finding]:
    """All checks of the model by itself, on one picture."""
    opening, points = _dialogues(speech, image)
    yield _prompt(mllm, opening, image)
    yield _words(mllm, speech)
    logits = mllm.next_token_logits(image, opening)
    yield _finite(logits)
    yield _against_plain(mllm, image, opening, logits)
    yield _answer_share(mllm, speech, mllm.next_token_logits(image, points))


def _dialogues(speech: DialogueFormat, image: RgbImage) -> tuple[Dialogue, Dialogue]:
    """A question of round 1, and one of round 2 that follows a stated box."""
    first = (Turn("system", speech.system_prompt),) if speech.system_prompt else ()
    question = speech.ask_boxes("the star", TargetCount.ONE, image.size)
    opening = (*first, Turn("user", question))
    box = Box(0.2 * image.width, 0.3 * image.height, 0.7 * image.width, 0.9 * image.height)
    reply = Turn("assistant", speech.write_boxes([box], image.size))
    asked = speech.ask_points("the star", box, [Point(*box.centre)], image.size)
    return opening, (*opening, reply, Turn("user", asked))


def _prompt(mllm: LocalMllm, opening: Dialogue, image: RgbImage) -> Finding:
    """The first and last tokens of a prompt as the model sees them."""
    ids = mllm.encoder.text_ids(opening, mllm.encoder.image_inputs(image))
    tokens = mllm.encoder.tokenizer.convert_ids_to_tokens(ids)
    start = mllm.encoder.tokenizer.bos_token
    doubled = start is not None and tokens[:2] == [start, start]
    detail = f"begins {tokens[:4]}, ends {tokens[-5:]}; start token {start!r}"
    if doubled:
        advice = "The tokenizer and the chat template both add it: remove it from one of them."
        return Finding("prompt", "fail", f"two start tokens: {detail}", advice)
    return Finding("prompt", "pass", detail)


def _words(mllm: LocalMllm, speech: DialogueFormat) -> Finding:
    tokens = mllm.yes_no_tokens(speech.yes_no)
    named = mllm.encoder.tokenizer.convert_ids_to_tokens
    return Finding("yes and no", "pass", f"yes {named([*tokens.yes])}, no {named([*tokens.no])}")


def _finite(logits: Tensor) -> Finding:
    spread = float(logits.std())
    return graded(
        "logits", spread, good=0.1, bad=1e-3,
        detail=f"finite, standard deviation {spread:.2f}",
        advice="The logits hardly vary: the weights were not loaded, or are damaged.",
    )  # fmt: skip


def _against_plain(mllm: LocalMllm, image: RgbImage, dialogue: Dialogue, logits: Tensor) -> Finding:
    """``model(**processor.apply_chat_template(…))``, which shares nothing with the engine."""
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in dialogue
    ]
    first = next(message for message in messages if message["role"] == "user")
    first["content"].insert(0, {"type": "image", "image": image.pil})
    inputs = mllm.encoder.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(mllm.engine.device, mllm.model.dtype)
    with torch.inference_mode():
        plain = mllm.model(**inputs).logits[0, -1].float()
    gap = float((plain.softmax(-1) - logits.softmax(-1).to(plain.device)).abs().max())
    allowed = _HALF_STEP.get(mllm.model.dtype, 0.05)
    verdict: Verdict = "pass" if gap <= allowed else "fail"
    return Finding(
        "engine against plain Hugging Face",
        verdict,
        f"probabilities differ by at most {gap:.1e} (allowed {allowed:g})",
        ""
        if verdict == "pass"
        else "Please report this with the checkpoint's name; "
        "load(…, recompute=True) avoids the engine.",
    )


def _answer_share(mllm: LocalMllm, speech: DialogueFormat, logits: Tensor) -> Finding:
    """How much probability yes and no get where the first answer stands."""
    tokens = mllm.yes_no_tokens(speech.yes_no)
    chances = logits.softmax(-1)
    share = float(chances[[*tokens.yes, *tokens.no]].sum())
    best = int(chances.argmax())
    word = mllm.encoder.tokenizer.decode([best])
    likeliest = f"likeliest token {word!r} ({float(chances[best]):.2f})"
    return graded(
        "answers begin with yes or no", share, good=0.5, bad=0.05,
        detail=f"yes and no have {share:.3f} of the probability; {likeliest}",
        advice=_advice_on(word),
    )  # fmt: skip


def _advice_on(word: str) -> str:
    if not word.strip():
        return "The reply begins with white space: the chat template is not the trained one."
    if "think" in word:
        return "The model thinks first: use a checkpoint without thoughts, or set its budget."
    return "The model does not answer with yes or no: check adapter, template and --format."
