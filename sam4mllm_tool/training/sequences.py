"""Conversations as the sequences of tokens that a model is trained on.

They are encoded by the encoder that asks questions (``mllm/encoding.py``), so that a reply is
learnt after exactly the token ids that the model reads at inference.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sam4mllm_tool.errors import DatasetError, ImageError
from sam4mllm_tool.evaluation.run import UNREADABLE_LIMIT
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.mllm.encoding import DialogueEncoder, ImageInputs, Transcript, model_inputs
from sam4mllm_tool.protocols import Turn
from sam4mllm_tool.training.dialogues import Conversation, Recipe
from sam4mllm_tool.types import RgbImage

_log = logging.getLogger(__name__)
IGNORED = -100
"""The label of tokens without a loss."""


@dataclass(frozen=True)
class Learnt:
    """One sequence of a conversation, with the labels that the model is trained on.

    Attributes:
        inputs: the model's arguments, without padding; ``input_ids`` is 1 x L.
        labels: 1 x L; the token itself in the assistant's replies, else -100.
        text: number of tokens, those of the picture counted as one.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    text: int


class ConversationEncoder:
    """Encodes conversations, with labels on the replies.

    A conversation is one sequence, or several where the chat template writes an earlier reply
    differently from what the model generates (:meth:`DialogueEncoder.transcripts`).
    """

    def __init__(self, processor: Any, recipe: Recipe, longest: int | None = None) -> None:
        self.encoder, self.longest = DialogueEncoder(processor), longest
        system = get_format(recipe.format).system_prompt
        self._opening = () if system is None else (Turn("system", system),)

    def fit(self, conversation: Conversation) -> tuple[Learnt, ...]:
        """As many of its questions as the limit of tokens per sequence allows, one at least."""
        encoded = self.encode(conversation)
        while self.longest and max(one.text for one in encoded) > self.longest:
            if len(conversation.topics) == 1:
                break
            conversation = conversation.shortened()
            encoded = self.encode(conversation)
        return encoded

    def encode(self, conversation: Conversation) -> tuple[Learnt, ...]:
        """The whole conversation; each reply has labels in one of the sequences."""
        image = self.encoder.image_inputs(conversation.image)
        # Templates may trim earlier replies, so replies are learnt trimmed.
        turns = (replace(turn, text=turn.text.strip()) if turn.role == "assistant" else turn
                 for turn in conversation.turns)  # fmt: skip
        transcripts = self.encoder.transcripts((*self._opening, *turns), image)
        return tuple(_learnt(transcript, image) for transcript in transcripts)


def _learnt(transcript: Transcript, image: ImageInputs) -> Learnt:
    inputs = model_inputs(image, transcript.ids, transcript.image_end)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for start, end in transcript.replies:
        labels[0, start:end] = inputs["input_ids"][0, start:end]
    return Learnt(inputs, labels, len(transcript.ids) - len(image.ids) + 1)


class ConversationSet(Dataset[tuple[Learnt, ...]]):
    """Conversations for the trainer, encoded when asked for.

    One whose picture cannot be read is replaced by the next one; a warning names the file, and
    more than ``UNREADABLE_LIMIT`` of them end the run with a :class:`DatasetError`.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        encoder: ConversationEncoder,
        picture: tuple[int, int] | None = None,
    ) -> None:
        self._conversations, self._encoder, self._picture = conversations, encoder, picture
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> tuple[Learnt, ...]:
        conversation = self._readable(index)
        if self._picture is not None:
            resized = conversation.image.pil.resize(self._picture)
            conversation = replace(conversation, image=RgbImage.from_pil(resized))
        return self._encoder.fit(conversation)

    def _readable(self, index: int) -> Conversation:
        while True:
            try:
                return self._conversations[index]
            except (ImageError, DatasetError) as error:
                self._unreadable.add(index)
                _log.warning("%s The next conversation is used instead.", error.message)
                if len(self._unreadable) > min(UNREADABLE_LIMIT, len(self) - 1):
                    raise DatasetError(
                        f"{len(self._unreadable)} conversations cannot be read, the last: "
                        f"{error.message}",
                        hint="Download the pictures again, then continue with --resume.",
                    ) from error
                index = (index + 1) % len(self)


class Collator:
    """Pads the sequences of a batch of conversations on the right, and stacks their pictures.

    Pictures with fewer tiles are padded with zeros, as the families' processors do.
    """

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, batch: Sequence[Sequence[Learnt]]) -> dict[str, Tensor]:
        """One dictionary for the model's forward."""
        sequences = [one for conversation in batch for one in conversation]
        out = {"labels": _padded([one.labels for one in sequences], IGNORED)}
        for key in sequences[0].inputs:
            filler = self._pad if key == "input_ids" else 0
            out[key] = _padded([one.inputs[key] for one in sequences], filler)
        return out


def _padded(values: Sequence[Tensor], filler: int) -> Tensor:
    """Tensors joined along their first dimension, the others brought to the largest size."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    grown = []
    for value in values:
        missing = [(0, most - size) for most, size in zip(shape, value.shape[1:], strict=True)]
        flat = [end for pair in reversed(missing) for end in pair]  # the last dimension first
        grown.append(torch.nn.functional.pad(value, flat, value=filler))
    return torch.cat(grown)
