"""A dialogue as token ids, in which nothing but the chat template writes control tokens.

Inference and training share this encoder.

For harmless text the ids are those of ``processor.apply_chat_template``. Text that spells a
control token (``</s>``, ``<image>``, ``<|im_end|>``, …) would end the turn or ask for an image
there; such text is encoded in pieces in which no control token can be found.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.types import RgbImage

_MARK = "\ue0a5{}\ue0a6"  # private-use characters: survive templates, belong to no vocabulary
_READ = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class ImageInputs:
    """The processor's output for one image.

    Attributes:
        ids: the tokens that replace the template's one image token.
        tensors: the model's arguments about the image (``pixel_values``, sizes, grids), on the CPU.
        per_token: the model's arguments with one value per token, such as ``mm_token_type_ids``
            or Gemma 3's ``token_type_ids``: the values at ``ids``, all others are 0.
        before, after: plain text that the processor writes around the image, part of the turn.
        first, last: ids that the processor, not the template, puts before and after everything
            (a start token; PaliGemma's line break).
    """

    ids: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    per_token: dict[str, torch.Tensor]
    before: str = ""
    after: str = ""
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """A dialogue up to the place where the reply begins.

    Attributes:
        ids: all token ids, the image's tokens included.
        image_end: number of leading ids up to and including the image's last token.
    """

    ids: tuple[int, ...]
    image_end: int


@dataclass(frozen=True)
class Transcript:
    """A dialogue with its replies, as a training sequence.

    Attributes:
        ids: all token ids, the image's tokens included.
        image_end: number of leading ids up to and including the image's last token.
        replies: (start, end) of the ids of each reply to learn, with its end of turn. The ids
            before ``start`` are exactly those that the model reads at inference.
    """

    ids: tuple[int, ...]
    image_end: int
    replies: tuple[tuple[int, int], ...]


def model_inputs(image: ImageInputs, ids: Sequence[int], image_end: int) -> dict[str, torch.Tensor]:
    """The model's arguments for reading ``ids`` (a batch of one) with the image among them."""
    tokens = torch.tensor([list(ids)])
    arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **image.tensors}
    for name, values in image.per_token.items():
        arguments[name] = torch.zeros_like(tokens)
        arguments[name][0, image_end - len(values) : image_end] = values
    return arguments


class DialogueEncoder:
    """Encodes dialogues with a processor's own chat template. Thread-safe."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # A fast tokenizer raises "Already borrowed" when two threads use it at once. Pictures take
        # long, so they have a tokenizer of their own, and dialogues do not wait for them.
        self._lock, self._picture_lock = threading.RLock(), threading.Lock()
        self._picture_processor = copy.deepcopy(processor)
        self._skeletons: dict[tuple[str, ...], list[int]] = {}
        self.image_token_id = self._find_image_token()
        self.control_ids = self._find_control_ids()

    def encode(self, dialogue: Dialogue, image: ImageInputs) -> Encoded:
        """Ids of a dialogue about one image, ready for the reply."""
        ids = [*image.first, *self.text_ids(dialogue, image)]
        at = ids.index(self.image_token_id)
        before, after = tuple(ids[:at]), tuple(ids[at + 1 :])
        return Encoded(before + image.ids + after + image.last, at + len(image.ids))

    def transcripts(self, dialogue: Dialogue, image: ImageInputs) -> tuple[Transcript, ...]:
        """A dialogue for training: each prompt as :meth:`encode` gives it, then the reply's ids as
        the model generates them.

        It is one transcript if the template writes earlier replies just as they are generated.
        Where it writes them differently (with a space or newline of its own, without their
        thoughts, without an end of turn), the next reply begins another transcript.
        """
        found: list[Transcript] = []
        for number, turn in enumerate(dialogue):
            if turn.role != "assistant":
                continue
            asked = self.encode(dialogue[:number], image)
            reply = self._reply_ids(turn.text)
            here = (len(asked.ids), len(asked.ids) + len(reply))
            before = found.pop() if found else None
            if before is not None and asked.ids[: len(before.ids)] != before.ids:
                found.append(before)
                before = None
            earlier = before.replies if before else ()
            found.append(Transcript(asked.ids + reply, asked.image_end, (*earlier, here)))
        return tuple(found)

    def _reply_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a whole reply and its end of turn; control tokens in the text stay text."""
        with self._lock:
            ids = self.encode_continuation(text)
            if self._controls(ids):
                ids = self._encode_plain(text)
        ends = self.end_of_turn_ids() or [self.tokenizer.eos_token_id]
        return (*ids, ends[0])

    def text_ids(self, dialogue: Dialogue, image: ImageInputs) -> list[int]:
        """Ids of a dialogue with a single token for the image."""
        with self._lock:
            ids = self._tokenize(self._render(dialogue, image))
            if self._controls(ids) == self._skeleton(dialogue):
                return ids
            return self._encode_guarded(dialogue, image)

    def image_inputs(self, image: RgbImage) -> ImageInputs:
        """Process an image's pixels, and find out which tokens it takes.

        Raises:
            CheckpointError: the processor writes anything but one image into the text.
        """
        turn = (Turn("user", _MARK.format(0)),)
        with self._picture_lock:
            inputs = self._processed(_as_messages(turn, image=image.pil))
        with self._lock:
            before, after = self._text_around(inputs.pop("text_replacement_offsets", None))
            around = ImageInputs((), {}, {}, before, after)
            plain = self._tokenize(self._render(turn, around))
        full = inputs["input_ids"][0].tolist()
        first = full[:1] if full[0] != plain[0] and full[1] == plain[0] else []
        plain = [*first, *plain]
        at = plain.index(self.image_token_id)
        behind = plain[at + 1 :]
        end = _last_place(behind, full)
        if full[:at] != plain[:at] or end <= at:
            raise _not_by_tokens("the processor rewrites the text around the image")
        shape = inputs["input_ids"].shape
        per_token = {k: v for k, v in inputs.items() if v.shape == shape and k not in _READ}
        if any(v[0, :at].any() or v[0, end:].any() for v in per_token.values()):
            raise _not_by_tokens(f"the processor marks text in {', '.join(per_token)}")
        return replace(
            around,
            ids=tuple(full[at:end]),
            tensors={k: v for k, v in inputs.items() if v.shape != shape},
            per_token={k: v[0, at:end] for k, v in per_token.items()},
            first=tuple(first),
            last=tuple(full[end + len(behind) :]),
        )

    def _processed(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The processor's inputs, and the text that replaced the image token."""
        asked = hasattr(self.processor, "get_text_with_replacements")
        inputs = self._picture_processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"return_text_replacement_offsets": True} if asked else {},
        )
        return dict(inputs)

    def _text_around(self, replacements: Any) -> tuple[str, str]:
        """Plain text before and after the special tokens that replace the image token.

        It must be tokenised together with its neighbours: Gemma 3 writes two newlines on either
        side, which make one token with the newline of the template.
        """
        if not replacements or not replacements[0]:
            return "", ""
        written = str(replacements[0][0]["replacement"])
        special = (self.tokenizer.convert_ids_to_tokens(i) for i in self._special_ids())
        spans = [m.span() for m in re.finditer("|".join(map(re.escape, special)), written)]
        return (written[: spans[0][0]], written[spans[-1][1] :]) if spans else ("", "")

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of reply text, as they come in the middle of a reply (no start token or space)."""
        with self._lock:
            anchor = self.tokenizer.encode("0", add_special_tokens=False)
            ids = self.tokenizer.encode("0" + text, add_special_tokens=False)
            if ids[: len(anchor)] == anchor:
                return list(ids[len(anchor) :])
            return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Text of reply ids, including the leading space that a first token may have."""
        with self._lock:
            anchor = self.tokenizer.encode("0", add_special_tokens=False)
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            start = self.tokenizer.decode(anchor, **options)
            text: str = self.tokenizer.decode([*anchor, *ids], **options)
            return text[len(start) :]

    def end_of_turn_ids(self) -> list[int]:
        """Control tokens that the template writes directly after a reply."""
        turns = (Turn("user", "a"), Turn("assistant", _MARK.format(1)), Turn("user", "b"))
        with self._lock:
            tail = self._render(turns).partition(_MARK.format(1))[2]
            ids = self.tokenizer.encode(tail, add_special_tokens=False)
        first = ids[:1]
        return [i for i in first if i in self._special_ids()]

    def _render(self, dialogue: Dialogue, image: ImageInputs | None = None) -> str:
        text: str = self.processor.apply_chat_template(
            _as_messages(dialogue), add_generation_prompt=True, tokenize=False
        )
        if image is None or not (image.before or image.after):
            return text
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        return text.replace(token, image.before + token + image.after, 1)

    def _tokenize(self, text: str) -> list[int]:
        start = self.tokenizer.bos_token
        add = not (start and text.startswith(start))  # as processors do
        return list(self.tokenizer(text, add_special_tokens=add)["input_ids"])

    def _encode_guarded(self, dialogue: Dialogue, image: ImageInputs) -> list[int]:
        """Template and text encoded separately, so that text cannot spell the template's tokens."""
        marked = _marked(dialogue)
        rendered = self._render(marked, image)
        ids: list[int] = []
        for index, turn in enumerate(marked):
            if turn.text not in rendered:
                continue  # a template of one question only
            before, rendered = rendered.split(turn.text, 1)
            ids += self._encode_fixed(before) if ids else self._tokenize(before)
            ids += self._encode_plain(dialogue[index].text)
        return ids + self._encode_fixed(rendered)

    def _encode_fixed(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of text without any control token; a text that spells one is encoded in pieces."""
        spelled = [self.tokenizer.convert_ids_to_tokens(i) for i in sorted(self.control_ids)]
        pieces = [text]
        for token in spelled:
            pieces = [part for piece in pieces for part in _cut_inside(piece, token)]
        return [i for piece in pieces for i in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._encode_fixed(piece)
        if not self._controls(ids):
            return ids
        # A tokenizer that normalises text may still find one (from full-width brackets, say).
        by_letter = [self._encode_fixed(letter) for letter in piece]
        return [i for ids in by_letter for i in ids if i not in self.control_ids]

    def _controls(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if i in self.control_ids]

    def _skeleton(self, dialogue: Dialogue) -> list[int]:
        """The control tokens that the template alone writes for turns of these roles."""
        roles = tuple(turn.role for turn in dialogue)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._controls(self._tokenize(self._render(_marked(dialogue))))
        return self._skeletons[roles]

    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {i for i, t in added.items() if t.special} | set(self.tokenizer.all_special_ids)

    def _find_control_ids(self) -> frozenset[int]:
        """Special tokens, and other added tokens that the template itself writes."""
        turns = (Turn("system", "a"), Turn("user", "b"), Turn("assistant", "c"), Turn("user", "d"))
        written: set[int] = set()
        for dialogue in (turns, turns[1:]):
            written |= set(self._tokenize(self._render(dialogue)))
        added = self.tokenizer.added_tokens_decoder
        visible = {i for i, t in added.items() if not t.content.isspace()}
        return frozenset(self._special_ids() | (written & visible))

    def _find_image_token(self) -> int:
        image_id = getattr(self.processor, "image_token_id", None)
        if image_id is None:
            token = getattr(self.processor, "image_token", None)
            image_id = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        try:
            found = self._tokenize(self._render((Turn("user", "a"),)))
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint's chat template cannot be used: {error}",
                hint="The folder needs the processor's files with a chat template for images.",
            ) from error
        if image_id is None or found.count(image_id) != 1:
            raise CheckpointError(
                "the chat template does not place one image token",
                hint="The checkpoint must be an image-text-to-text chat model.",
            )
        return int(image_id)


def _last_place(some: Sequence[int], ids: Sequence[int]) -> int:
    """The last index at which ``some`` occur in ``ids``; -1 if they do not."""
    places = range(len(ids) - len(some), -1, -1)
    return next((i for i in places if ids[i : i + len(some)] == some), -1)


def _not_by_tokens(message: str) -> CheckpointError:
    return CheckpointError(
        message,
        hint="This family is not supported by the local engine; serve it behind an "
        "OpenAI-compatible endpoint instead.",
    )


def _as_messages(dialogue: Dialogue, image: Any = None) -> list[dict[str, Any]]:
    """Messages in the form chat templates expect, the image first in the first user turn."""
    messages: list[dict[str, Any]] = []
    placed = False
    for turn in dialogue:
        content: list[dict[str, Any]] = []
        if turn.role == "user" and not placed:
            content.append(
                {"type": "image"} if image is None else {"type": "image", "image": image}
            )
            placed = True
        content.append({"type": "text", "text": turn.text})
        messages.append({"role": turn.role, "content": content})
    return messages


def _marked(dialogue: Dialogue) -> Dialogue:
    return tuple(Turn(turn.role, _MARK.format(i)) for i, turn in enumerate(dialogue))


def _cut_inside(text: str, token: str) -> list[str]:
    """``text`` cut after the first character of every ``token`` in it."""
    first, rest = token[:1], token[1:]
    parts = text.split(token)
    if not rest or len(parts) == 1:
        return [text]
    middle = [rest + part for part in parts[1:]]
    whole = [parts[0], *middle]
    return [piece + first for piece in whole[:-1]] + [whole[-1]]
