"""Initial weights of the embedded MLLM: what can be written down need not be learnt.

A model of a few million weights hardly finds out by gradient descent how a coordinate in the text
looks at its place in the picture. So the decoder starts with such circuits in place, built from
plain attention weights: numbers and places share one Fourier code; a ``y`` token fetches its
``x``, looks at their patch and is counted; an answer finds the point it answers; a box's number
finds the patches that fit the expression and copies their box. The projector is folded from the
dense heads of :mod:`sam4mllm_tool.training.base_vision`. Training refines all of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sam4mllm_tool.scenes.sprites import plurals
from sam4mllm_tool.training.base_model import BACKGROUND, IMAGE, START, BaseShape
from sam4mllm_tool.training.base_vision import (
    CELLS,
    CODE,
    FLAGS,
    DenseHeads,
    Questions,
    fourier,
    number_codes,
)

WORD_WIDTH = 62  # two heads of 31 value channels; the 32nd carries a quarter of a patch
STRENGTH = 4.0  # a flag's value in an embedding
LENGTH = 128.0  # squared norm of every embedding, so that flags weigh the same after the norm
TYPICAL = (5.66, 5.3, 4.5)  # a flag's value after the norm, about, in the first three layers
SENSES: dict[str, tuple[str, ...]] = {
    "left": ("left", "leftmost"),
    "right": ("right", "rightmost"),
    "top": ("top", "topmost", "highest", "upper", "higher", "above"),
    "bottom": ("bottom", "bottommost", "lowest", "lower", "below"),
    "biggest": ("biggest", "largest", "bigger", "larger", "big"),
    "smallest": ("smallest", "tiniest", "smaller", "small", "little"),
    "middle across": ("second",),
    "middle down": ("second",),
    "only": ("only",),
    "one of two": ("two", "both"),
    "one of three": ("three",),
}
"""Words that begin with one meaning, by the flag of stage 1 that they name."""


class Layout:
    """Which channels of the decoder keep what."""

    number = slice(0, CODE)
    place = slice(CODE, 3 * CODE)
    place_x = slice(CODE, 2 * CODE)
    place_y = slice(2 * CODE, 3 * CODE)
    box = slice(3 * CODE, 7 * CODE)
    word = slice(7 * CODE, 7 * CODE + WORD_WIDTH)
    relation = slice(word.stop, word.stop + 48)
    quarter = slice(relation.stop, relation.stop + 4)
    cells = slice(quarter.stop, quarter.stop + CELLS**2)
    flags = cells.stop
    names = (
        "text", "number", "comma", "paren", "point", "anchor", "newline", "answer", "image",
        "start", "word", "slot", "open", "open2", "open4", "open6", "found",
        "count0", "count1", "count2", "count3",
    )  # fmt: skip
    # Where an answer keeps what its point sees: channels that only other tokens need.
    seen_word = slice(CODE, CODE + WORD_WIDTH)
    seen_box = slice(seen_word.stop, seen_word.stop + WORD_WIDTH)

    @classmethod
    def flag(cls, name: str) -> int:
        """Channel of a flag."""
        return cls.flags + cls.names.index(name)

    @classmethod
    def edge(cls, index: int) -> slice:
        """Channels of the code of one edge of the box of the object seen."""
        return slice(cls.box.start + index * CODE, cls.box.start + (index + 1) * CODE)


@dataclass(frozen=True)
class Meanings:
    """Orthogonal directions in the word channels, one a concept."""

    concepts: tuple[str, ...]
    directions: Tensor  # (concepts, WORD_WIDTH), norm sqrt(WORD_WIDTH)
    spare: Tensor  # directions of no concept, same norm

    def of(self, concept: str) -> Tensor:
        """The direction of a concept."""
        return self.directions[self.concepts.index(concept)]


@torch.no_grad()
def init_vision(model: Any, shape: BaseShape) -> None:
    """Give each patch the code of its place, in the code the numbers use."""
    tower = model.model.vision_tower
    places = tower.embeddings.position_embedding.weight
    places.normal_(0, 0.02)
    places[:, : 2 * CODE] = place_codes(shape)
    pixels = tower.embeddings.patch_embedding.weight
    pixels.normal_(0, pixels[0].numel() ** -0.5)


def place_codes(shape: BaseShape) -> Tensor:
    """Codes of x and y of the patches' middles: (patches, 2 * CODE)."""
    middles = (torch.arange(shape.grid) + 0.5) / shape.grid
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    return torch.cat([fourier(x.flatten()), fourier(y.flatten())], -1)


def make_meanings(questions: Questions, seed: int = 0) -> Meanings:
    """Directions for names, colours and senses of a world."""
    senses = [words[0] for words in SENSES.values()]
    concepts = tuple(dict.fromkeys([*questions.names, *questions.colours, *senses, BACKGROUND]))
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WORD_WIDTH, WORD_WIDTH, generator=generator))[0]
    basis = basis * math.sqrt(WORD_WIDTH)
    return Meanings(concepts, basis[: len(concepts)], basis[len(concepts) :])


@torch.no_grad()
def init_language(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: Questions,
    meanings: Meanings,
) -> None:
    """Embeddings, output rows and the circuits of the first three layers."""
    for name, weight in model.model.language_model.layers.named_parameters():
        if weight.ndim == 2:
            quiet = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            weight.normal_(0, quiet / math.sqrt(weight.shape[1]))
    _init_embeddings(model, tokenizer, questions, meanings)
    layers = model.model.language_model.layers
    for layer, loudness in zip(layers, (0.1, 0.1, 0.1, 0.3), strict=False):
        layer.mlp.down_proj.weight *= loudness
    for layer in layers[3:]:
        layer.self_attn.o_proj.weight *= 0.3
    theta = model.config.text_config.rope_parameters["rope_theta"]
    _init_reading(Heads(layers[0].self_attn, theta, TYPICAL[0]))
    _init_looking(Heads(layers[1].self_attn, theta, TYPICAL[1]), model.config.vision_config)
    _init_finding(Heads(layers[2].self_attn, theta, TYPICAL[2]), meanings)


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
    """Scale word channels until all embeddings are equally long; the start token keeps silent.

    Heads with nothing to look at look at the start token, so what they copy must be zero there;
    its length is made up in channels that nothing copies.
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
    """Word → the concept it begins with: the last word of a name and of its plural, and so on."""
    found = {word: words[0] for words in SENSES.values() for word in words}
    found |= {colour: colour for colour in questions.colours}
    for name in questions.names:
        found |= {text.split()[-1]: name for text in (name, plurals()[name])}
    return found | {BACKGROUND: BACKGROUND}


class Heads:
    """Writes circuits into one attention layer. Head ``h`` starts empty once touched."""

    def __init__(self, attention: Any, theta: float, typical: float) -> None:
        self.q, self.k = attention.q_proj.weight, attention.k_proj.weight
        self.v, self.o = attention.v_proj.weight, attention.o_proj.weight
        self.width = attention.head_dim
        self.half = self.width // 2
        self.typical = typical
        self.rates = theta ** (-torch.arange(self.half) / self.half)
        self._used: dict[int, int] = {}

    def clear(self, head: int) -> None:
        """Empty a head but for a little noise, which training can grow from."""
        rows = slice(head * self.width, (head + 1) * self.width)
        for weight in (self.q[rows], self.k[rows]):
            weight.normal_(0, 0.003)
        for weight in (self.v[rows], self.o[:, rows]):
            weight.normal_(0, 0.01)
        self._used[head] = 0

    def turn(
        self, head: int, query: int, key: int, pair: int, distance: float, score: float
    ) -> None:
        """Add ``score * cos(rate * (d - distance))``, ``d`` tokens between query and key.

        The query and key channels are flags; ``pair`` picks the rotation's rate.
        """
        row, scale = head * self.width + pair, self._scale(score)
        angle = distance * float(self.rates[pair])
        self.q[row, query] += scale * math.cos(angle) * math.copysign(1, score)
        self.q[row + self.half, query] -= scale * math.sin(angle) * math.copysign(1, score)
        self.k[row, key] += scale

    def link(self, head: int, query: int, key: int, pair: int, score: float) -> None:
        """Add ``score`` where both flags are up, whatever the distance (``pair`` must be slow)."""
        self.turn(head, query, key, pair, 0.0, score)

    def prefer(self, head: int, channels: slice, pair: int, weight: float) -> None:
        """Let what :meth:`link` looks for on this pair also grow with these channels."""
        self.k[head * self.width + pair, channels] += weight

    def match(self, head: int, rows: list[int], query: Tensor, key: Tensor) -> None:
        """Let these rows of the head compare two linear read-outs: (rows, width) each."""
        index = torch.tensor(rows) + head * self.width
        self.q[index] += query
        self.k[index] += key

    def slow_rows(self, first_pair: int, count: int) -> list[int]:
        """Rows of ``count`` pairs from ``first_pair`` on: first halves, then second halves."""
        pairs = list(range(first_pair, first_pair + count))
        return pairs + [pair + self.half for pair in pairs]

    def move(self, head: int, source: slice | int, target: slice | int, gain: float) -> None:
        """Copy channels from the token looked at to the token that looks."""
        sources = [source] if isinstance(source, int) else list(range(source.start, source.stop))
        targets = [target] if isinstance(target, int) else list(range(target.start, target.stop))
        for one, other in zip(sources, targets, strict=True):
            row = head * self.width + self._used[head]
            self._used[head] += 1
            self.v[row] = 0
            self.v[row, one] = 1
            self.o[:, row] = 0
            self.o[other, row] = gain

    def average(self, head: int, sources: dict[int, float], target: int, gain: float) -> None:
        """Bring a weighted sum of channels into one channel."""
        self.move(head, target, target, gain)
        row = head * self.width + self._used[head] - 1
        self.v[row, target] = 0
        for source, weight in sources.items():
            self.v[row, source] = weight

    def _scale(self, score: float) -> float:
        return math.sqrt(abs(score) * math.sqrt(self.width)) / self.typical


def _init_reading(heads: Heads) -> None:
    """Layer 1: a ``y`` fetches its ``x``; points and answers are counted; edges are told apart."""
    flag = Layout.flag
    text = flag("text")
    for head in range(8):
        heads.clear(head)
    for head, distance in ((0, 2), (1, 3), (6, 4), (7, 6)):
        for pair in range(4):
            heads.turn(head, text, text, pair, distance, 14.0)
    heads.move(0, Layout.number, Layout.place_x, 0.55)
    heads.move(0, flag("open"), flag("open2"), 0.75)
    heads.move(1, flag("paren"), flag("point"), 0.6)
    heads.move(6, flag("open"), flag("open4"), 0.75)
    heads.move(7, flag("open"), flag("open6"), 0.75)
    for head, (pair, quarter_turn) in zip(
        range(2, 6), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True
    ):
        back = quarter_turn * math.pi / 2
        # Answers: i tokens after the newline. Points: 4 + 5 i tokens after the colon.
        heads.turn(
            head, flag("answer"), flag("newline"), pair, back / heads.rates[pair].item(), 2.5
        )
        shift = 4 + back / heads.rates[pair + 1].item()
        heads.turn(head, flag("number"), flag("anchor"), pair + 1, shift, 2.5)
        for query, key, slow in (("answer", "newline", 8), ("number", "anchor", 9)):
            heads.link(head, flag(query), flag(key), slow, 14.0)
            heads.link(head, flag(query), flag("start"), slow, 14.0)
        # Of several newlines the nearest counts.
        for pair_of_decay, score in ((2, 6.0), (3, 10.0)):
            heads.turn(head, flag("answer"), flag("newline"), pair_of_decay, 0, score)
        heads.link(head, flag("answer"), flag("start"), 10, 16.0)
        count = flag(f"count{head - 2}")
        heads.move(head, flag("newline"), count, 0.5)
        heads.move(head, flag("anchor"), count, 0.5)
        heads.move(head, flag("start"), count, -0.5)


def _init_looking(heads: Heads, vision: Any) -> None:
    """Layer 2: four heads look at the quarters of the patch under a point; two gather words."""
    flag = Layout.flag
    grid = vision.image_size // vision.patch_size
    width = heads.q.shape[1]
    chosen = torch.arange(2, 7)  # of the frequencies: the slowest say little, the fastest alias
    half = CODE // 2
    picks = torch.cat([chosen, chosen + half])
    for head in range(4):
        heads.clear(head)
        query, key = torch.zeros(20, width), torch.zeros(20, width)
        offsets = ((head % 2 - 0.5) / 2 / grid, (head // 2 - 0.5) / 2 / grid)
        for axis, (start, offset) in enumerate(
            zip((Layout.place_x.start, Layout.place_y.start), offsets, strict=True)
        ):
            turn = _shift(offset)
            # Sine and cosine of one frequency share a rotating pair: 5 pairs an axis.
            here = torch.arange(axis * 5, axis * 5 + 5)
            here = torch.cat([here, here + 10])
            query[here, start + picks] = 1.9
            key[here, start : start + CODE] = 1.9 * turn[picks]
        heads.match(head, heads.slow_rows(5, 10), query, key)
        heads.link(head, flag("point"), flag("image"), 15, 20.0)
        heads.link(head, flag("text"), flag("start"), 4, 20.0)
        heads.average(head, _cells_of_quarter(head), Layout.quarter.start + head, 0.6)
        part = (Layout.word if head < 2 else Layout.box).start + 31 * (head % 2)
        heads.move(head, slice(part, part + 31), slice(part, part + 31), 0.6)
    for head in (6, 7):
        heads.clear(head)
    for head in (4, 5):
        heads.clear(head)
        heads.link(head, flag("slot"), flag("word"), 6, 12.0)
        heads.link(head, flag("text"), flag("start"), 7, 2.0)
        part = Layout.word.start + 31 * (head - 4)
        heads.move(head, slice(part, part + 31), slice(part, part + 31), 0.6)


def _cells_of_quarter(quarter: int) -> dict[int, float]:
    """Channels of the cells in a quarter of a patch, with the share of it they fill."""
    across, down = quarter % 2, quarter // 2
    shares = ((2 / 3, 1 / 3, 0.0), (0.0, 1 / 3, 2 / 3))
    return {
        Layout.cells.start + row * CELLS + column: shares[down][row] * shares[across][column]
        for row in range(CELLS)
        for column in range(CELLS)
    }


def _shift(offset: float) -> Tensor:
    """Matrix that turns the code of v into the code of v + offset: (CODE, CODE)."""
    rates = 0.25 * 32 ** (torch.arange(CODE // 2) / (CODE // 2 - 1))
    cosine, sine = (
        torch.diag((2 * math.pi * offset * rates).cos()),
        torch.diag((2 * math.pi * offset * rates).sin()),
    )
    return torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)], 0)


def _init_finding(heads: Heads, meanings: Meanings) -> None:
    """Layer 3: an answer finds its point; a box's number finds what fits the words."""
    flag = Layout.flag
    width = heads.q.shape[1]
    counts = [flag(f"count{n}") for n in range(4)]
    for head in range(4):
        heads.clear(head)
        query = torch.zeros(4, width)
        query[torch.arange(4), counts] = 1.0
        heads.match(head, [5, 6, 7, 8], query * 2.6, query * 2.6)
        heads.link(head, flag("answer"), flag("point"), 9, 24.0)
        heads.link(head, flag("text"), flag("start"), 10, 14.0)
        heads.move(head, Layout.quarter.start + head, Layout.quarter.start + head, 1.0)
        begin = (Layout.word if head < 2 else Layout.box).start + 31 * (head % 2)
        end = (Layout.seen_word if head < 2 else Layout.seen_box).start + 31 * (head % 2)
        heads.move(head, slice(begin, begin + 31), slice(end, end + 31), 1.0)
    for edge, (head, slot) in enumerate(
        zip(range(4, 8), ("open", "open2", "open4", "open6"), strict=True)
    ):
        heads.clear(head)
        mix = torch.linalg.qr(torch.randn(len(meanings.concepts), 22))[0].T
        read = torch.zeros(22, width)
        read[:, Layout.word] = mix @ (meanings.directions / math.sqrt(WORD_WIDTH))
        heads.match(head, heads.slow_rows(5, 11), read * 1.4, read * 1.4)
        heads.link(head, flag(slot), flag("image"), 4, 12.0)
        heads.prefer(head, Layout.cells, 4, 0.2)  # patches well covered know their box best
        heads.prefer(head, slice(flag("text"), flag("text") + 1), 4, -5.5)  # not the words
        heads.link(head, flag("text"), flag("start"), 3, 10.0)
        heads.move(head, Layout.edge(edge), Layout.number, 2.0)
        if edge == 0:
            heads.link(head, flag("newline"), flag("image"), 4, 15.0)
            heads.move(head, flag("image"), flag("found"), 1.0)


@torch.no_grad()
def fold_projector(
    model: Any,
    heads: DenseHeads,
    questions: Questions,
    meanings: Meanings,
    features: Tensor,
    shape: BaseShape,
) -> dict[str, float]:
    """Make the projector say in the decoder's channels what the dense heads say.

    LLaVA's projector is ``linear, gelu, linear``; ``gelu(x + 3) - 3`` is nearly ``x``.

    Args:
        model: whose projector is written.
        heads: trained with the tower.
        questions: what the heads answer.
        meanings: directions of the words.
        features: (pictures, patches, width) of the tower on training pictures, to fit the
            read-out of a patch's own place, which training fades.
        shape: of the model.

    Returns:
        share of the place code's variance that the fitted read-out explains.
    """
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    for weight in (first.weight, second.weight):
        weight.normal_(0, 0.1 / math.sqrt(weight.shape[1]))
    first.bias.zero_()
    second.bias.zero_()
    second.weight[:, : 6 * CODE + questions.count + 1] = 0

    def pass_on(rows: slice, target: slice, weight: Tensor, bias: Tensor) -> None:
        first.weight[rows], first.bias[rows] = weight, bias + 3
        second.weight[target, rows] = torch.eye(weight.shape[0])
        second.bias[target] = -3

    place, constant, explained = _fit_places(features, place_codes(shape))
    pass_on(slice(0, 2 * CODE), Layout.place, place, constant)
    codes = heads.boxes(features)
    loud = codes.pow(2).mean().sqrt()
    pass_on(
        slice(2 * CODE, 6 * CODE), Layout.box, heads.boxes.weight / loud, heads.boxes.bias / loud
    )
    start, groups = 6 * CODE, questions.groups
    rows = slice(start, start + questions.count)
    first.weight[rows], first.bias[rows] = 0.4 * heads.answers.weight, 0.4 * heads.answers.bias
    words = [
        *questions.names,
        *questions.colours,
        *(SENSES[f][0] if f in SENSES else f for f in FLAGS),
    ]
    for index, word in enumerate(words):
        loudness = 0.18 if word in questions.colours else 0.3  # colours are surest of themselves
        second.weight[Layout.word, start + index] = loudness * meanings.of(word)
    relations = groups["relations"]
    count = min(relations.stop - relations.start, Layout.relation.stop - Layout.relation.start)
    for index in range(count):
        second.weight[Layout.relation.start + index, start + relations.start + index] = 1.0
    cells = slice(start + groups["cells"].start, start + groups["cells"].stop)
    first.bias[cells] += 3
    second.weight[Layout.cells, cells] = 0.6 * torch.eye(CELLS**2)
    second.bias[Layout.cells] = -3 * 0.6
    empty = start + questions.count  # background: all cells deny
    first.weight[empty] = -0.5 * heads.answers.weight[groups["cells"]].mean(0)
    first.bias[empty] = -0.5 * heads.answers.bias[groups["cells"]].mean()
    second.weight[Layout.word, empty] = 0.25 * meanings.of(BACKGROUND)
    second.bias[Layout.flag("image")] = STRENGTH
    return {"place": explained}


def _fit_places(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, float]:
    """Least squares, with intercept, from features to the codes of the patches' places."""
    x = features.flatten(0, 1).double()
    y = codes.double().repeat(len(features), 1)
    centre = x.mean(0)
    moved = x - centre
    covariance = moved.T @ moved / len(x)
    ridge = 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + ridge.double(), moved.T @ y / len(x)).T
    constant = y.mean(0) - weight @ centre
    residual = y - x @ weight.T - constant
    explained = 1 - residual.pow(2).mean() / (y - y.mean(0)).pow(2).mean()
    return weight.float(), constant.float(), float(explained)
