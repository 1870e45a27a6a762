"""Initial weights of the embedded MLLM, with attention circuits built in.

A model with a few million weights hardly learns by gradient descent to attend from a coordinate in
the text to its place in the picture. So the decoder starts with circuits for this, written into its
attention weights. Numbers and places share one Fourier code. A point's ``y`` token copies its
``x``, attends to the patch at the point and gets a code of its index; an answer attends to the
point with the same index; a box's number attends to the patches that match the expression and
copies their box. The projector is built from the dense heads of
:mod:`recipes.embedded_mllm.vision`. Training refines all weights.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.embedded_mllm.circuits import (
    TYPICAL,
    Heads,
    write_finding,
    write_looking,
    write_reading,
)
from recipes.embedded_mllm.layout import SENSES, STRENGTH, Layout, Meanings
from recipes.embedded_mllm.model import IMAGE, START, BaseShape
from recipes.embedded_mllm.vision import CODE, Questions, fourier, number_codes
from sam4mllm_tool.datasets.vqa import BACKGROUND
from sam4mllm_tool.scenes.sprites import plurals

LENGTH = 128.0  # squared norm of every embedding, so that flags are equal after the norm


@torch.no_grad()
def init_vision(model: Any, shape: BaseShape) -> None:
    """Give each patch the code of its place: the same Fourier code as for numbers."""
    tower = model.model.vision_tower
    places = tower.embeddings.position_embedding.weight
    places.normal_(0, 0.02)
    places[:, : 2 * CODE] = place_codes(shape)
    pixels = tower.embeddings.patch_embedding.weight
    pixels.normal_(0, pixels[0].numel() ** -0.5)


def place_codes(shape: BaseShape) -> Tensor:
    """Codes of x and y of the patches' centres: (patches, 2 * CODE)."""
    centres = (torch.arange(shape.grid) + 0.5) / shape.grid
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.cat([fourier(x.flatten()), fourier(y.flatten())], -1)


@torch.no_grad()
def init_language(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: Questions,
    meanings: Meanings,
) -> None:
    """Initialise embeddings, output rows, and the circuits of the first three layers."""
    for name, weight in model.model.language_model.layers.named_parameters():
        if weight.ndim == 2:
            gain = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            weight.normal_(0, gain / math.sqrt(weight.shape[1]))
    _init_embeddings(model, tokenizer, questions, meanings)
    layers = model.model.language_model.layers
    for layer, gain in zip(layers, (0.1, 0.1, 0.1, 0.3), strict=False):
        layer.mlp.down_proj.weight *= gain
    for layer in layers[3:]:
        layer.self_attn.o_proj.weight *= 0.3
    theta = model.config.text_config.rope_parameters["rope_theta"]
    write_reading(Heads(layers[0].self_attn, theta, TYPICAL[0]))
    write_looking(Heads(layers[1].self_attn, theta, TYPICAL[1]), model.config.vision_config)
    write_finding(Heads(layers[2].self_attn, theta, TYPICAL[2]), meanings)


def _init_embeddings(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: Questions,
    meanings: Meanings,
) -> None:
    rows, out = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    rows.normal_(0, 0.05)
    spare = meanings.spare
    mix = torch.randn(len(rows), len(spare)) / math.sqrt(len(spare))
    rows[:, Layout.word] = mix @ spare
    rows[:, Layout.flags :] = 0
    rows[:, Layout.flag("text")] = STRENGTH
    numbers = torch.tensor(tokenizer.convert_tokens_to_ids([f"{n:03d}" for n in range(1000)]))
    codes = number_codes()
    rows[numbers, Layout.number] = codes
    rows[numbers, Layout.place_y] = codes
    rows[numbers, Layout.word] *= 0.3
    rows[numbers, Layout.flag("number")] = STRENGTH
    flagged = {
        "comma": [","], "paren": ["(", "Ġ("], "anchor": [":Ċ"], "newline": ["Ċ"],
        "answer": ["Ċ", "Yes", "No"], "start": [START], "open": ["[", "Ġ["],
        "slot": ["[", "Ġ[", ",", "Ċ", "(", "Ġ("],
    }  # fmt: skip
    for flag, tokens in flagged.items():
        rows[tokenizer.convert_tokens_to_ids(tokens), Layout.flag(flag)] = STRENGTH
    rows[tokenizer.convert_tokens_to_ids([START, IMAGE]), Layout.flag("text")] = 0
    concept_of = _concepts_of_words(questions)
    for token, index in tokenizer.get_vocab().items():
        word = token.removeprefix("Ġ")
        if not re.fullmatch(r"[a-zA-Z]{2,}", word) or word in ("Yes", "No"):
            continue
        rows[index, Layout.flag("word")] = STRENGTH / 4
        if word in concept_of:
            rows[index, Layout.flag("word")] = STRENGTH
            own = rows[index, Layout.word] * 0.2
            rows[index, Layout.word] = meanings.of(concept_of[word]) + own
    _equalise(rows, tokenizer.convert_tokens_to_ids(START))
    out.normal_(0, 0.02)
    out[:, Layout.seen_word] += 0.08 * rows[:, Layout.word]
    out[numbers] = 0.02 * torch.randn(len(numbers), out.shape[1])
    out[numbers, Layout.number] = 0.4 * codes
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    out[yes, Layout.quarter], out[no, Layout.quarter] = 0.3, -0.3


def _equalise(rows: Tensor, start: int) -> None:
    """Scale the word channels so that all embeddings have the same norm.

    Heads without a match attend to the start token, so the channels that they copy must be zero
    there; the start token gets its norm from channels that no head copies.
    """
    rows[start, : Layout.flags] = 0
    filler = torch.randn(rows[start, Layout.relation].shape)
    rows[start, Layout.relation] = filler * math.sqrt((LENGTH - STRENGTH**2) / filler.pow(2).sum())
    word = rows[:, Layout.word]
    others = rows.pow(2).sum(1) - word.pow(2).sum(1)
    scale = ((LENGTH - others).clamp(min=1.0) / word.pow(2).sum(1).clamp(min=1e-6)).sqrt()
    scale[start] = 0
    rows[:, Layout.word] = word * scale[:, None]


def _concepts_of_words(questions: Questions) -> dict[str, str]:
    """Word → its initial concept; for a name, the last words of singular and plural."""
    concepts = {word: words[0] for words in SENSES.values() for word in words}
    concepts |= {colour: colour for colour in questions.colours}
    for name in questions.names:
        concepts |= {text.split()[-1]: name for text in (name, plurals()[name])}
    return concepts | {BACKGROUND: BACKGROUND}
