"""The full-recompute oracle: every question starts over with plain ``model.generate``.

This is the procedure of SAM4MLLM's authors: each round encodes the image, reads the whole
prompt and decodes token by token (with a key-value cache within the call). The engine must say
the same; tests and the benchmark hold it to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sam4mllm_tool.errors import ThoughtCutOff
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.mllm.decoding import Fork, other_ways
from sam4mllm_tool.mllm.encoding import Encoded, ImageInputs
from sam4mllm_tool.mllm.engine import finite
from sam4mllm_tool.mllm.grammar_tokens import Place, TokenGrammar
from sam4mllm_tool.mllm.local import LONGEST_REPLY, LocalMllm
from sam4mllm_tool.mllm.sampling import divided, even_codes
from sam4mllm_tool.mllm.thoughts import ANSWER, CLOSE
from sam4mllm_tool.protocols import Dialogue, Question, Reply, YesNoWords
from sam4mllm_tool.types import RgbImage, YesNo


class RecomputeMllm(LocalMllm):
    """A :class:`LocalMllm` that reuses nothing between calls."""

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """Greedy reply, by one ``model.generate``."""
        if grammar is None:
            ids, logits = self._run(image, dialogue, None, max_new_tokens)
            score = sum(float(r.log_softmax(-1)[t]) for t, r in zip(ids, logits, strict=True))
            free = [token for token in ids if token not in self.end_ids]
            return Reply(self.encoder.decode_continuation(free), score, len(free), len(ids))
        reply, forks = self._run_grammar(image, dialogue, self._grammar(grammar))
        return self._scored(reply, forks, 0.0)

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The greedy reply and others, each by a ``model.generate`` of its own."""
        tokens = self._grammar(grammar)
        ids, forks = self._run_grammar(image, dialogue, tokens)
        found = {ids: self._scored(ids, forks, 0.0)}
        for score, fork, choice in other_ways(forks, tokens, count):
            if len(found) >= count:
                break
            start = (*fork.before, int(fork.tokens[choice]))
            ids, after = self._run_grammar(image, dialogue, tokens, start)
            found.setdefault(ids, self._scored(ids, after, score))
        greedy, *others = found.values()
        return [greedy, *sorted(others, key=lambda r: -(r.log_probability or 0.0))]

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """A reply for each code, each by a ``model.generate`` of its own."""
        tokens = self._grammar(grammar)
        found = []
        for code in even_codes(count):
            only = _AtCode(tokens, (), code=code)
            ids, logits = self._run(image, dialogue, only, LONGEST_REPLY)
            reply = tuple(token for token in ids if not tokens.is_end(token))
            found.append(self._scored(reply, [*_free_choices(tokens, ids, logits, 0)], 0.0))
        return found

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """Answers one by one, by one ``model.generate``."""
        if count < 1:
            return []
        tokens = self._words(words)
        only = _OnlyTokens([(*tokens.yes, *tokens.no)] * count)
        _, logits = self._run(image, dialogue, only, count)
        rows = logits.softmax(-1)
        p_yes = rows[:, list(tokens.yes)].sum(-1).tolist()
        p_no = rows[:, list(tokens.no)].sum(-1).tolist()
        return [YesNo(y, n) for y, n in zip(p_yes, p_no, strict=True)]

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """One question after the other."""
        return [
            self.answer_yes_no(one.image, one.dialogue, words=words, count=one.count)
            for one in questions
        ]

    def _run(
        self, image: RgbImage, dialogue: Dialogue, processor: LogitsProcessor | None, limit: int
    ) -> tuple[list[int], Tensor]:
        """New ids (end of turn included) and the float32 logits each was chosen from."""
        encoded, inputs = self._encoded(image, dialogue)
        ends = list(self.end_ids)
        if self.thinking is not None:
            encoded = replace(encoded, ids=encoded.ids + self._thought(encoded, inputs))
        return self._generate(
            encoded, inputs, [] if processor is None else [processor], limit, ends
        )

    def _thought(self, encoded: Encoded, inputs: ImageInputs) -> tuple[int, ...]:
        """A thought, closed, and what stands between it and the answer; nothing if there is none.

        Raises:
            ThoughtCutOff: as of the engine.
        """
        thinking = self.thinking
        assert thinking is not None

        def more(ids: tuple[int, ...], limit: int, ends: list[int]) -> list[int]:
            longer = replace(encoded, ids=encoded.ids + ids)
            return self._generate(longer, inputs, [], limit, ends)[0]

        begun: tuple[int, ...] = ()
        if not thinking.is_open(encoded.ids):
            first = more((), 8, [thinking.open, *self.end_ids])
            if first[-1] != thinking.open or self.encoder.decode_continuation(first[:-1]).strip():
                return ()
            begun = tuple(first)
        if thinking.budget == 0:
            return begun + tuple(self.encoder.encode_continuation(f"\n{CLOSE}\n\n"))
        ids = more(begun, thinking.budget + 1, [thinking.close, *self.end_ids])
        if ids[-1] != thinking.close:
            raise ThoughtCutOff(raw_reply=self.encoder.decode_continuation(ids), budget=len(ids))
        thought = (*begun, *ids)
        longest = 8 + len(self.encoder.encode_continuation(ANSWER))
        answer = self.encoder.decode_continuation(more(thought, longest, list(self.end_ids)))
        lead = answer[: len(answer) - len(answer.lstrip())]
        if answer.lstrip().startswith(ANSWER):
            lead += ANSWER
        return thought + tuple(self.encoder.encode_continuation(lead))

    def _generate(
        self,
        encoded: Encoded,
        inputs: ImageInputs,
        processors: list[LogitsProcessor],
        limit: int,
        ends: list[int],
    ) -> tuple[list[int], Tensor]:
        """One plain ``model.generate``."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=ends,
            pad_token_id=self.end_ids[0],
            return_dict_in_generate=True,
            output_logits=True,
        )
        with self.engine.turn.taken(), self.engine.memory_guard(), torch.inference_mode():
            out = self.model.generate(
                **self.engine.image_arguments(inputs, encoded.ids, encoded.image_end),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Finite(), *processors]),
            )
        ids = out.sequences[0, len(encoded.ids) :].tolist()
        return ids, torch.cat(out.logits).float()

    def _run_grammar(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        grammar: TokenGrammar,
        start: tuple[int, ...] = (),
    ) -> tuple[tuple[int, ...], tuple[Fork, ...]]:
        """Reply ids, and its free choices behind ``start``."""
        ids, logits = self._run(image, dialogue, _OnlyGrammar(grammar, start), LONGEST_REPLY)
        reply = tuple(token for token in ids if not grammar.is_end(token))
        return reply, tuple(_free_choices(grammar, ids, logits, len(start)))

    def _scored(self, ids: tuple[int, ...], forks: Sequence[Fork], before: float) -> Reply:
        score = before + sum(float(f.log_probabilities[f.chosen]) for f in forks)
        return Reply(self.encoder.decode_continuation(ids), score, len(forks), len(ids))


class _Finite(LogitsProcessor):
    """Lets only finite logits pass."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return finite(scores)


class _OnlyTokens(LogitsProcessor):
    """Allows only the given ids at each step."""

    def __init__(self, allowed: Sequence[tuple[int, ...]]) -> None:
        self.allowed, self.step = allowed, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        return _restricted(scores, self.allowed[self.step - 1])


@dataclass
class _OnlyGrammar(LogitsProcessor):
    """Allows only what a grammar allows, after a given start."""

    grammar: TokenGrammar
    start: tuple[int, ...]
    place: Place | None = None
    step: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.place is None:
            self.place = self.grammar.start
        else:
            self.place = self.grammar.allowed(self.place)[int(input_ids[0, -1])]
        self.step += 1
        if self.step <= len(self.start):
            return _restricted(scores, (self.start[self.step - 1],))
        return _restricted(scores, tuple(self.grammar.allowed(self.place)))


@dataclass
class _AtCode(_OnlyGrammar):
    """Allows only the token that a code names, at each step; see :mod:`.sampling`."""

    code: float = 0.5

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = super().__call__(input_ids, scores)
        assert self.place is not None
        tokens = list(self.grammar.allowed(self.place))
        if self.grammar.at_end(self.place):
            return allowed
        ((choice, (self.code,)),) = divided(allowed[0, tokens].log_softmax(-1), (self.code,))
        return _restricted(scores, (tokens[choice],))


def _restricted(scores: Tensor, allowed: tuple[int, ...]) -> Tensor:
    kept = torch.full_like(scores, -torch.inf)
    index = list(allowed)
    kept[:, index] = scores[:, index]
    return kept


def _free_choices(grammar: TokenGrammar, ids: Sequence[int], logits: Tensor, behind: int) -> Any:
    place, score = grammar.start, 0.0
    for index, token in enumerate(ids):
        options = list(grammar.allowed(place))
        if index >= behind and len(options) > 1 and not grammar.at_end(place):
            tokens = torch.tensor(options, device=logits.device)
            among = logits[index][tokens].log_softmax(-1)
            chosen = options.index(token)
            yield Fork(None, place, tokens, among, chosen, tuple(ids[:index]), score)
            score += float(among[chosen])
        place = grammar.allowed(place)[token]
