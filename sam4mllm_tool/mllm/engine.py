"""Forward passes over prefixes: read the image once, then only what is new, of several at once.

One form of call serves all supported families: after the prefill, ``model(input_ids=new,
position_ids=…, cache=branch, logits_to_keep=k)`` with neither pixels nor mask.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sam4mllm_tool.concurrency import FairLock
from sam4mllm_tool.errors import BackendError, DeviceOutOfMemory
from sam4mllm_tool.mllm.encoding import Encoded, ImageInputs, model_inputs
from sam4mllm_tool.mllm.packing import Pack, Row, attention_by_picture
from sam4mllm_tool.mllm.prefix import Prefix
from sam4mllm_tool.mllm.reading import Decoding, Read, Readout, Spot, read
from sam4mllm_tool.mllm.store import PrefixStore
from sam4mllm_tool.mllm.turns import Turns

T = TypeVar("T")
_MOST_TOKENS = 2048
"""Tokens read in one pass, where several dialogues share it."""

_BOTH_WAYS = ("paligemma",)


def cache_argument(model: Any) -> str:
    """The name of the key-value cache in the installed transformers' arguments and outputs.

    Older versions call it ``past_key_values``, newer ones ``cache``. A name that ``forward`` does
    not know disappears in its ``**kwargs``, and the model would answer without image and question.
    """
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def finite(logits: Tensor) -> Tensor:
    """The logits, shape (rows, vocabulary), if each row has a finite largest value and no NaN.

    Raises:
        BackendError: they do not. (Every comparison with NaN is false, so what is read from such
            logits would look like an answer.)
    """
    if not bool(logits.amax(-1).isfinite().all()):
        raise BackendError(
            "the model's logits are not finite",
            hint="Load it in another dtype (dtype='float32' or 'bfloat16'); if they stay so, its "
            "weights are damaged.",
        )
    return logits


class Engine:
    """Runs one model, one pass at a time, for all callers.

    Args:
        model: a transformers image-text-to-text model in eval mode.
        cache_bytes: bound for kept keys and values.
        packed: whether dialogues may share passes.

    Attributes:
        reads_both_ways: every token of a prompt attends to all others (PaliGemma's prefix), so the
            cache of one prompt cannot be used for another.
        can_cut: whether the cache can be shortened to any length.
        keeps_apart: whether the model keeps dialogues that share a pass separate; ``None`` before
            the first such pass.
        token_bytes: bytes of one token's keys and values, as measured on the first image read.
    """

    def __init__(self, model: Any, cache_bytes: int, packed: bool = True) -> None:
        self.model = model
        self.store = PrefixStore(cache_bytes)
        self.turns: Turns[Read, Readout] = Turns(self._pass, self._shares)
        self.turn = FairLock()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.token_bytes: int | None = None
        self._cache_name = cache_argument(model)
        self._text = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=self._text).layers
        self.reads_both_ways = model.config.model_type in _BOTH_WAYS
        self.can_cut = not self.reads_both_ways and all(type(x) is DynamicLayer for x in layers)
        self.keeps_apart: bool | None = None
        # Shared passes attend by sdpa: what runs by another attention may need just that one.
        self._may_pack = packed and self.can_cut and self._text._attn_implementation == "sdpa"

    def open(self, digest: str, encoded: Encoded, inputs: ImageInputs) -> Spot:
        """The end of a dialogue, with as much of it read as the store has kept."""
        # The key holds the ids up to the image's last token: system prompt and header come before
        # the image and change its keys and values.
        trunk = len(encoded.ids) if self.reads_both_ways else encoded.image_end
        key = (digest, encoded.ids[:trunk])
        prefix = self.store.find(key, encoded.ids)
        unread = encoded.ids[0 if prefix is None else len(prefix.ids) :]
        return Spot(key, inputs, prefix, unread)

    def read(self, spot: Spot, ids: Sequence[int], keep: int = 1) -> Readout:
        """Read the unread ids of ``spot``, then ``ids``. Raises as :meth:`run`."""
        return self.run(read(spot, ids, keep))

    def run(self, decoding: Decoding[T]) -> T:
        """Do the reads that a decoding yields; returns its result.

        Raises:
            CallCancelled: the current call is no longer wanted.
            DeviceOutOfMemory: the device is too small for this image.
            BackendError: the logits are not finite, or the installed transformers did not take
                or fill the cache.
        """
        try:
            wanted = next(decoding)
            while True:
                wanted = decoding.send(self.turns.take(wanted))
        except StopIteration as end:
            found: T = end.value
            return found

    def keep(self, spot: Spot) -> None:
        """Keep what was read, for dialogues that begin alike."""
        if spot.prefix is not None:
            image_end = len(spot.key[1])
            trunk = self.store.find(spot.key, spot.key[1], 0) or spot.prefix
            # The trunk may have been evicted meanwhile. A prefix that cannot be cut cannot give it
            # back, and would serve no other question about the image.
            if len(trunk.ids) != image_end and not trunk.can_be_cut:
                return
            self.store.keep(spot.key, trunk.cut(image_end), spot.prefix)

    def _shares(self, one: Read) -> bool:
        """Whether it may share a pass: a picture's first read is a pass of its own."""
        known = one.spot.prefix is not None or self.store.holds(one.spot.key)
        return self._may_pack and known

    def _pass(self, reads: Sequence[Read]) -> list[Readout | Exception | None]:
        """Read the first, and in the same pass what can share it; ``None`` for all others."""
        with self.turn.taken(), torch.inference_mode():
            rows = self._rows(reads) if len(reads) > 1 else {}
            if len(rows) > 1 and self._packs(reads[0]):
                found = self._read_rows([reads[index] for index in rows], list(rows.values()))
                outcomes = dict(zip(rows, found, strict=True))
            else:
                outcomes = {0: self._outcome(reads[0])}
        return [outcomes.get(index) for index in range(len(reads))]

    def _rows(self, reads: Sequence[Read]) -> dict[int, Row]:
        """Those that can share a pass with the first one, by their index; picture by picture."""
        rows: dict[int, Row] = {}
        room = _MOST_TOKENS
        for index, one in enumerate(reads):
            known = one.spot.prefix or self.store.find(one.spot.key, one.unread, one.keep)
            if known is None:
                continue
            ids = (one.spot.ids + one.ids)[len(known.ids) :]
            room -= len(ids)
            if room >= 0 or not rows:
                rows[index] = Row(one.spot.key, known, ids, one.keep)
        by_picture = sorted(rows.items(), key=lambda row: reads[row[0]].spot.key)
        return dict(by_picture) if 0 in rows else {}

    def _read_rows(
        self, reads: Sequence[Read], rows: Sequence[Row]
    ) -> Sequence[Readout | Exception]:
        """One pass for all; if it fails, one pass for each, so that each caller gets its own error.

        All of them must be read again: a key that is NaN spoils every row, masked or not.
        """
        try:
            with self.memory_guard():
                found = self._read_packed(rows)
        except Exception:
            return [self._outcome(one) for one in reads]
        return [
            (replace(one.spot, prefix=prefix, unread=(), passes=one.spot.passes + 1), logits)
            for one, (prefix, logits) in zip(reads, found, strict=True)
        ]

    def _outcome(self, one: Read) -> Readout | Exception:
        """The outcome of one read in a separate pass."""
        spot = one.spot
        try:
            with self.memory_guard():
                if spot.prefix is None:
                    return self._read_with_image(spot, one.unread, one.keep)
                prefix, logits = self._read_on(spot.prefix, one.unread, one.keep)
        except Exception as error:
            return error
        return replace(spot, prefix=prefix, unread=(), passes=spot.passes + 1), logits

    def _packs(self, one: Read) -> bool:
        """Whether this model keeps dialogues that share a pass separate; tested once.

        A model that builds its attention mask differently from others would mix them up.
        """
        if self.keeps_apart is None:
            ids = (one.spot.ids + one.ids)[len(one.spot.key[1]) :]  # words of a question
            self.keeps_apart = self._tried((ids[:4], ids[3::-1]), (ids[1:4], ids[:1:-1][:5]))
        return self.keeps_apart

    def _tried(self, starts: Sequence[tuple[int, ...]], texts: Sequence[tuple[int, ...]]) -> bool:
        try:
            nothing = ImageInputs((), {}, {})
            rows = []
            for start in starts:  # as if each were a picture
                prefix, _ = self._prefill(nothing, start, 0, 1)
                rows += [Row(start, prefix, ids, 1) for ids in texts]
            alone = [self._read_on(row.prefix, row.ids, 1)[1] for row in rows]
            packed = self._read_packed(rows)
        except Exception:
            return False
        gap = max(float((a - b).abs().max()) for a, (_, b) in zip(alone, packed, strict=True))
        return gap < 0.05 * float((alone[0] - alone[1]).abs().max())

    def _read_packed(self, rows: Sequence[Row]) -> list[tuple[Prefix, Tensor]]:
        pack = Pack.of(rows)
        arguments = pack.arguments(self.device, self.model.dtype)
        with attention_by_picture(self._text):
            out = self.model(use_cache=True, **arguments, **{self._cache_name: pack.cache})
        self._check_filled(pack.cache, sum(group.held for group in pack.groups))
        logits = finite(out.logits[0].float())
        return list(zip(pack.prefixes(), logits.split([row.keep for row in rows]), strict=True))

    def _read_with_image(self, spot: Spot, ids: tuple[int, ...], keep: int) -> tuple[Spot, Tensor]:
        # Another caller may have read the image while this one waited for its turn.
        known = self.store.find(spot.key, ids, keep)
        passes = spot.passes + 1
        if known is None:
            image_end = len(spot.key[1])
            # One pass reads image and question together, and the image's part is cut out of its
            # cache. A cache that cannot be cut needs a pass of its own for the image.
            if self.can_cut:
                prefix, logits = self._prefill(spot.inputs, ids, image_end, keep)
                # The question too: other dialogues begin with the same words, and share this part.
                self.store.keep(spot.key, prefix.cut(image_end), prefix)
                return replace(spot, prefix=prefix, unread=(), passes=passes), logits
            known, logits = self._prefill(spot.inputs, ids[:image_end], image_end, 1)
            self.store.keep(spot.key, known)
            if len(ids) == image_end:
                return replace(spot, prefix=known, unread=(), passes=passes), logits
            passes += 1
        prefix, logits = self._read_on(known, ids[len(known.ids) :], keep)
        return replace(spot, prefix=prefix, unread=(), passes=passes), logits

    def _prefill(
        self, inputs: ImageInputs, ids: tuple[int, ...], image_end: int, keep: int
    ) -> tuple[Prefix, Tensor]:
        """The one pass that sees pixels."""
        arguments = self.image_arguments(inputs, ids, image_end)
        out = self.model(use_cache=True, logits_to_keep=keep, **arguments)
        # The model's own copy is overwritten by the next image; ours stays with the prefix.
        deltas = getattr(getattr(self.model, "model", None), "rope_deltas", None)
        shift = int(self.reads_both_ways)  # PaliGemma counts positions from 1
        if deltas is not None:
            shift = int(deltas.reshape(-1)[0])
        read = Prefix(ids, getattr(out, self._cache_name), shift)
        prefix, logits = self._checked(read, out.logits, keep)
        if self.token_bytes is None:
            self.token_bytes = math.ceil(prefix.own_bytes() / len(ids))
        return prefix, logits

    def image_arguments(
        self, inputs: ImageInputs, ids: tuple[int, ...], image_end: int
    ) -> dict[str, Any]:
        """The model's arguments for reading ``ids`` with the image among them, on its device."""
        arguments = model_inputs(inputs, ids, image_end)
        return {name: self._on_device(tensor) for name, tensor in arguments.items()}

    def _read_on(self, prefix: Prefix, ids: tuple[int, ...], keep: int) -> tuple[Prefix, Tensor]:
        start = len(prefix.ids)
        cache = prefix.branch()
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=positions + prefix.position_shift,
            use_cache=True,
            logits_to_keep=keep,
            **{self._cache_name: cache},
        )
        read = Prefix(prefix.ids + ids, cache, prefix.position_shift)
        return self._checked(read, out.logits, keep)

    def _checked(self, prefix: Prefix, logits: Tensor, keep: int) -> tuple[Prefix, Tensor]:
        """A pass's outcome, after making sure that the cache holds what was read before it."""
        self._check_filled(prefix.cache, len(prefix.ids))
        return prefix, finite(logits[0, -keep:].float())

    def _check_filled(self, cache: Any, length: int) -> None:
        held = cache.get_seq_length() if isinstance(cache, Cache) else 0
        if held != length:
            raise BackendError(
                f"{type(self.model).__name__} has read {length} tokens, but its cache "
                f"holds {held}: transformers {transformers.__version__} does not take the cache as "
                f"{self._cache_name!r}",
                hint="Install a version of transformers that sam4mllm-tool was tested with.",
            )

    def _on_device(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.to(self.device, self.model.dtype)
        return tensor.to(self.device)

    @contextmanager
    def memory_guard(self) -> Iterator[None]:
        """Turn running out of memory into an error with a hint, and free what is kept."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.store.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise DeviceOutOfMemory(
                f"the device ran out of memory: {error}",
                hint="Use a smaller image or checkpoint, quantization='4bit', or more devices "
                "with device_map='auto'.",
                retryable=True,
            ) from error
