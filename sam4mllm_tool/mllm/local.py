"""A local MLLM: any image-text-to-text checkpoint, each image read once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.formats import DialogueFormat, format_for
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.mllm import loading
from sam4mllm_tool.mllm.budget import ByteBudget
from sam4mllm_tool.mllm.decoding import (
    Leads,
    Spoken,
    answer_slots,
    no_lead,
    speak,
    speak_alternates,
    speak_freely,
)
from sam4mllm_tool.mllm.encoding import DialogueEncoder, Encoded, ImageInputs
from sam4mllm_tool.mllm.engine import Engine
from sam4mllm_tool.mllm.files import find_checkpoint, read_json
from sam4mllm_tool.mllm.grammar_tokens import TokenGrammar, YesNoTokens, yes_no_tokens
from sam4mllm_tool.mllm.placement import USUAL_CACHE, cache_room, choose_placement
from sam4mllm_tool.mllm.reading import Decoding, Spot, together
from sam4mllm_tool.mllm.sampling import speak_spread
from sam4mllm_tool.mllm.thoughts import thinking_of
from sam4mllm_tool.protocols import (
    NO_NOTES,
    CheckpointNotes,
    Dialogue,
    Question,
    Reply,
    YesNoWords,
)
from sam4mllm_tool.types import RgbImage, YesNo

T = TypeVar("T")
LONGEST_REPLY = 4096
_USUAL_REPLY = 64
PREPROCESSOR_FILE = "preprocessor_config.json"


class LocalMllm:
    """Dialogues about images with a transformers model on this machine.

    The image is encoded and prefilled once and cached; every later question continues from
    there. Replies and probabilities equal those of a full recompute, within the rounding of the
    dtype (float32: 1e-4). Thread-safe: forward passes take turns.

    Attributes:
        own_format: the format of a stock checkpoint with its processor's own limits, ``None``
            where ``format_name`` says it all.

    Args:
        model: image-text-to-text model in eval mode.
        processor: its processor, with a chat template.
        name: for traces.
        format_name: dialogue format.
        notes: what the checkpoint states about itself.
        cache_bytes: bound for kept keys and values; those of dialogues in progress have a separate
            bound of the same size.
        thought_budget: tokens that a thinking model may think before it answers; 0 closes its
            thoughts at once.
        packed: whether dialogues, of one call or of several, share passes.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        format_name: str = "sam4mllm",
        notes: CheckpointNotes = NO_NOTES,
        cache_bytes: int = USUAL_CACHE,
        thought_budget: int = 4096,
        packed: bool = True,
    ) -> None:
        self.name = name
        self.format_name = format_name
        self.own_format: DialogueFormat | None = None
        self.notes = notes
        self.model = model
        self.encoder = DialogueEncoder(processor)
        self.engine = Engine(model, cache_bytes, packed)
        self.under_way = ByteBudget(cache_bytes)
        self.end_ids = _end_ids(model, self.encoder)
        self.thinking = thinking_of(self.encoder, thought_budget)
        self._image_inputs = lru_cache(maxsize=4)(self.encoder.image_inputs)
        self._grammar = lru_cache(maxsize=32)(self._token_grammar)
        self._words = lru_cache(maxsize=32)(self._yes_no_tokens)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        adapter: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        quantization: str | None = None,
        device_map: Any = None,
        merge_adapter: bool = False,
        compile: bool = False,
        cache_bytes: int | None = None,
        reserve_bytes: int = 0,
        thought_budget: int = 4096,
        packed: bool = True,
        name: str | None = None,
    ) -> Self:
        """Load a checkpoint directory or hub id, with an optional PEFT adapter.

        Args:
            checkpoint: directory or hub id; safetensors only, no remote code.
            adapter: directory or hub id of a LoRA adapter over it; a ``chat_template.jinja``
                beside it replaces the checkpoint's.
            device: ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
            dtype: ``"auto"`` (:func:`~sam4mllm_tool.mllm.placement.usual_dtype`) or a name.
            attn_implementation: as in transformers (``"sdpa"``, ``"flash_attention_2"``, …).
            quantization: ``"4bit"`` or ``"8bit"`` where bitsandbytes is installed.
            device_map: as in transformers, to spread a model over devices.
            merge_adapter: fold the adapter into the weights (faster, same within rounding).
            compile: run forward passes through ``torch.compile``.
            cache_bytes: bound for kept keys and values of images and dialogues, and another of the
                same size for dialogues in progress; by default 4 GiB, or a quarter of what the
                device has left beside the weights.
            reserve_bytes: memory of the device to leave free for other uses.
            thought_budget, packed: as in the constructor.
            name: what reports call it, instead of checkpoint and adapter.

        Raises:
            CheckpointError: missing, corrupt or of the wrong kind.
            DeviceOutOfMemory: the device is too small for it.
        """
        folder = find_checkpoint(str(checkpoint))
        adapted = None if adapter is None else find_checkpoint(str(adapter))
        placement = choose_placement(
            device,
            dtype,
            quantization=quantization,
            device_map=device_map,
            attn_implementation=attn_implementation,
        )
        cache_bytes = cache_room(folder, placement, cache_bytes, reserve_bytes)
        processor = loading.load_processor(folder, adapted)
        model = loading.load_model(folder, placement)
        if adapted is not None:
            model = loading.load_adapter(model, str(adapted), merge=merge_adapter)
        if compile:
            model.forward = torch.compile(model.forward, dynamic=True)
        notes = _read_notes(folder)
        if adapted is not None:
            # Published adapters have no notes; their dialogue is the paper's, which has no question
            # for verification.
            papers = {"format": "sam4mllm", "verification": "posterior"}
            notes = {**papers, **notes, **_read_notes(adapted)}
        stock = format_for(model.config.model_type, read_json(folder / PREPROCESSOR_FILE))
        found = cls(
            model.eval(),
            processor,
            name=name or str(checkpoint) + (f" + {adapter}" if adapter is not None else ""),
            format_name=notes.get("format", stock.name),
            notes=_checkpoint_notes(notes, folder),
            cache_bytes=cache_bytes,
            thought_budget=thought_budget,
            packed=packed,
        )
        found.own_format = None if "format" in notes else stock
        return found

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """Greedy reply to the last user turn, restricted to ``grammar`` if one is given.

        Thoughts count neither as part of the reply nor towards ``max_new_tokens``.

        Raises:
            ThoughtCutOff: the model thought for longer than it may.
            CallCancelled, DeviceOutOfMemory.
        """
        rules = None if grammar is None else self._grammar(grammar)

        def said(spot: Spot) -> Decoding[Spoken]:
            spot = yield from self._begun(spot)
            if rules is not None:
                return (yield from speak(spot, rules, LONGEST_REPLY))
            return (
                yield from self._thought_out(
                    spot, lambda at, leads: speak_freely(at, self.end_ids, max_new_tokens, leads)
                )
            )

        with self._dialogues([(image, dialogue)], max_new_tokens) as (spot,):
            spoken = self.engine.run(said(spot))
            self.engine.keep(spoken.spot)
        free = len(spoken.ids if rules is None else spoken.forks)
        return self._reply(spoken, free, spoken.spot.passes)

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """Up to ``count`` different likely replies over the same prefix, best first, scored.

        The first one is the greedy reply of :meth:`generate`; the others differ from it at one
        choice and are greedy afterwards, so each costs only its own tail.
        """
        return self._several(image, dialogue, grammar, count, speak_alternates)

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """``count`` replies as often as the model would give them; see :mod:`.sampling`."""
        return self._several(image, dialogue, grammar, count, speak_spread)

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """Answers to the last user turn's ``count`` questions, given in one reply.

        Each slot is conditioned on the answers before it, each the likelier of yes and no.
        Probabilities are full-vocabulary softmax values, summed over the words' spellings. A model
        that thinks first does so, and is read where its answer begins.

        Raises:
            ThoughtCutOff: the model thought for longer than it may.
            CheckpointError: the tokenizer has no single token for one of the words.
        """
        (answers,) = self.answer_each([Question(image, dialogue, count)], words=words)
        return answers

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """:meth:`answer_yes_no` of each, in passes that they share. Raises as it does."""
        asked = [one for one in questions if one.count > 0]
        if not asked:
            return [[] for _ in questions]
        tokens = self._words(words)

        def answered(spot: Spot, count: int) -> Decoding[tuple[list[YesNo], Spot]]:
            can_cut = self.engine.can_cut
            spot = yield from self._begun(spot)
            return (
                yield from self._thought_out(
                    spot, lambda at, leads: answer_slots(at, tokens, count, can_cut, leads)
                )
            )

        longest = max(one.count for one in asked)
        with self._dialogues([(one.image, one.dialogue) for one in asked], longest) as spots:
            pairs = zip(spots, asked, strict=True)
            found = self.engine.run(together([answered(spot, one.count) for spot, one in pairs]))
            for _, after in found:
                self.engine.keep(after)
        answers = iter(found)
        return [next(answers)[0] if one.count > 0 else [] for one in questions]

    def next_token_logits(self, image: RgbImage, dialogue: Dialogue) -> Tensor:
        """Float32 logits of the reply's first token: shape (vocabulary,); for check-ups."""
        with self._dialogues([(image, dialogue)], 1) as (spot,):
            spot = self.engine.run(self._begun(spot))
            return self.engine.read(spot, ())[1][-1]

    def yes_no_tokens(self, words: YesNoWords) -> YesNoTokens:
        """The single tokens that spell yes and no.

        Raises:
            CheckpointError: the tokenizer has no single token for one of the words.
        """
        return self._words(words)

    @contextmanager
    def _dialogues(
        self, asked: Sequence[tuple[RgbImage, Dialogue]], reply: int
    ) -> Iterator[list[Spot]]:
        """The ends of dialogues, once there is room for them and ``reply`` tokens more each.

        The pictures are prepared first, before the call waits for the model or for room.
        """
        encoded = [(image.digest, *self._encoded(image, dialogue)) for image, dialogue in asked]
        own, shared = 0, dict[Hashable, int]()
        for digest, ids, _ in encoded:
            longest = reply
            if self.thinking is not None and self.thinking.is_open(ids.ids):
                longest += self.thinking.budget
            own += len(ids.ids) - ids.image_end + longest
            shared[digest, ids.ids[: ids.image_end]] = ids.image_end
        with self._room(own, shared), self.engine.turns.under_way():
            yield [self.engine.open(*one) for one in encoded]

    def _room(self, own: int, shared: Mapping[Hashable, int]) -> AbstractContextManager[None]:
        """Room for that many tokens; those of pictures and headers count once for all callers."""
        each = self.engine.token_bytes
        if each is None:
            # Before the first read, the size of a token is not known: one dialogue at a time.
            return self.under_way.held(self.under_way.max_bytes)
        return self.under_way.held(
            each * own, {key: each * tokens for key, tokens in shared.items()}
        )

    def _several(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        grammar: Grammar,
        count: int,
        speak_several: Callable[[Spot, TokenGrammar, int, int], Decoding[list[Spoken]]],
    ) -> list[Reply]:
        """``count`` replies to one question, which is read once."""
        rules = self._grammar(grammar)
        with self._dialogues([(image, dialogue)], count * _USUAL_REPLY) as (spot,):
            spot = self.engine.run(self._begun(spot))
            replies = self.engine.run(speak_several(spot, rules, LONGEST_REPLY, count))
            self.engine.keep(replies[0].spot)
        return [self._reply(r, len(r.forks), r.spot.passes) for r in replies]

    def _begun(self, spot: Spot) -> Decoding[Spot]:
        """The place where the reply begins: after the thought that the template has opened."""
        if self.thinking is not None and self.thinking.is_open(spot.ids):
            spot = yield from self.thinking.past(spot, self.end_ids)
        return spot

    def _thought_out(
        self, spot: Spot, speak: Callable[[Spot, Leads], Decoding[T | None]]
    ) -> Decoding[T]:
        """The result of ``speak`` at ``spot``, or after the thought that the model opens there."""
        spoken = yield from speak(spot, no_lead if self.thinking is None else self.thinking.leads)
        if spoken is None and self.thinking is not None:
            opened = yield from self.thinking.opened(spot)
            if opened is not None:
                spot = yield from self.thinking.past(opened, self.end_ids)
            spoken = yield from speak(spot, no_lead)
        assert spoken is not None
        return spoken

    def _encoded(self, image: RgbImage, dialogue: Dialogue) -> tuple[Encoded, ImageInputs]:
        inputs = self._image_inputs(image)
        return self.encoder.encode(dialogue, inputs), inputs

    def _reply(self, spoken: Spoken, free: int, passes: int) -> Reply:
        text = self.encoder.decode_continuation(spoken.ids)
        return Reply(text, spoken.score, free, passes)

    def _token_grammar(self, grammar: Grammar) -> TokenGrammar:
        return TokenGrammar(grammar, self.encoder, self.end_ids)

    def _yes_no_tokens(self, words: YesNoWords) -> YesNoTokens:
        return yes_no_tokens(self.encoder, words.yes, words.no)


def base_of(adapter: str) -> str | None:
    """The base that an adapter names in its notes.

    Raises:
        CheckpointError: no such adapter.
    """
    folder = find_checkpoint(adapter)
    ours, pefts = _read_notes(folder), read_json(folder / "adapter_config.json")
    named = ours.get("base_model") or pefts.get("base_model_name_or_path")
    return str(named) if named else None


def _end_ids(model: Any, encoder: DialogueEncoder) -> tuple[int, ...]:
    """Every token that ends a turn: by configuration, and by the chat template."""
    found = dict.fromkeys(encoder.end_of_turn_ids())
    for source in (model.generation_config, model.config, encoder.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(dict.fromkeys([ids] if isinstance(ids, int) else ids or []))
    if not found:
        raise CheckpointError(
            "the checkpoint names no end-of-turn token",
            hint="Set eos_token_id in its generation_config.json.",
        )
    return tuple(found)


def _checkpoint_notes(notes: dict[str, Any], folder: Path) -> CheckpointNotes:
    """Raises CheckpointError with the name of a key that makes no sense."""
    try:
        return CheckpointNotes.model_validate(notes)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False)
        raise CheckpointError(
            f"the notes of {folder} (sam4mllm.json): {first['loc'][0]}: {first['msg']}",
            hint="Correct that key, or remove it.",
        ) from error


def _read_notes(folder: Path) -> dict[str, Any]:
    """The notes that the project's own checkpoints have beside their weights."""
    return read_json(folder / "sam4mllm.json")
