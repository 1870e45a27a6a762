"""Forward passes over prefixes: read the image once, then only what is new.

One form of call serves all supported families: after the prefill, ``model(input_ids=new,
position_ids=…, cache=branch, logits_to_keep=k)`` with neither pixels nor mask.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sam4mllm_tool.concurrency import FairLock
from sam4mllm_tool.errors import BackendError, DeviceOutOfMemory
from sam4mllm_tool.mllm.encoding import Encoded, ImageInputs, model_inputs
from sam4mllm_tool.mllm.prefix import Prefix
from sam4mllm_tool.mllm.store import ImageKey, PrefixStore

_BOTH_WAYS = ("paligemma",)


@dataclass(frozen=True, eq=False)
class Spot:
    """A place in a dialogue from which the model can read on; a value, like its prefix.

    Attributes:
        key: image and header that the dialogue begins with.
        inputs: the image's model inputs, if they are needed after all.
        prefix: what was read, ``None`` before the image was.
        unread: ids that come before anything else is read.
        passes: model calls spent to get here.
    """

    key: ImageKey
    inputs: ImageInputs = field(repr=False)
    prefix: Prefix | None
    unread: tuple[int, ...]
    passes: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids up to here."""
        return (() if self.prefix is None else self.prefix.ids) + self.unread

    def cut(self, length: int) -> Spot:
        """The place after the first ``length`` ids, all of them read."""
        assert self.prefix is not None and not self.unread
        return replace(self, prefix=self.prefix.cut(length))


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

    Attributes:
        reads_both_ways: every token of a prompt attends to all others (PaliGemma's prefix), so the
            cache of one prompt cannot be used for another.
        can_cut: whether the cache can be shortened to any length.
        token_bytes: bytes of one token's keys and values, as measured on the first image read.
    """

    def __init__(self, model: Any, cache_bytes: int) -> None:
        self.model = model
        self.store = PrefixStore(cache_bytes)
        self.turn = FairLock()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.token_bytes: int | None = None
        self._cache_name = cache_argument(model)
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        self.reads_both_ways = model.config.model_type in _BOTH_WAYS
        self.can_cut = not self.reads_both_ways and all(type(x) is DynamicLayer for x in layers)

    def open(self, digest: str, encoded: Encoded, inputs: ImageInputs) -> Spot:
        """The end of a dialogue, with as much of it read as the store has kept."""
        # The key holds the ids up to the image's last token: system prompt and header come before
        # the image and change its keys and values.
        trunk = len(encoded.ids) if self.reads_both_ways else encoded.image_end
        key = (digest, encoded.ids[:trunk])
        prefix = self.store.find(key, encoded.ids)
        unread = encoded.ids[0 if prefix is None else len(prefix.ids) :]
        return Spot(key, inputs, prefix, unread)

    def read(self, spot: Spot, ids: Sequence[int], keep: int = 1) -> tuple[Spot, Tensor]:
        """Read the unread ids of ``spot``, then ``ids``.

        Returns:
            The new place, and float32 logits of shape (keep, vocabulary) after the last
            ``keep`` ids.

        Raises:
            CallCancelled: the current call is no longer wanted.
            DeviceOutOfMemory: the device is too small for this image.
            BackendError: the logits are not finite, or the installed transformers did not take
                or fill the cache.
        """
        with self.turn.taken(), self.memory_guard(), torch.inference_mode():
            unread = (*spot.unread, *ids)
            if spot.prefix is None:
                return self._read_with_image(spot, unread, keep)
            prefix, logits = self._read_on(spot.prefix, unread, keep)
        return replace(spot, prefix=prefix, unread=(), passes=spot.passes + 1), logits

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
                self.store.keep(spot.key, prefix.cut(image_end))
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
        held = prefix.cache.get_seq_length() if isinstance(prefix.cache, Cache) else 0
        if held != len(prefix.ids):
            raise BackendError(
                f"{type(self.model).__name__} has read {len(prefix.ids)} tokens, but its cache "
                f"holds {held}: transformers {transformers.__version__} does not take the cache as "
                f"{self._cache_name!r}",
                hint="Install a version of transformers that sam4mllm-tool was tested with.",
            )
        return prefix, finite(logits[0, -keep:].float())

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
