"""The question workflow beside the one-shot tool and its strategy ``propose``, over questions.

Run ``python -m benchmarks.question_workflow --seed N --limit 200`` for "what is it for?" questions
about unseen scenes, or ``--reasonseg FOLDER --split val`` for ReasonSeg. Without ``--chat`` the
local MLLM does all the thinking; ``--chat openai:gpt-5`` takes any LangChain chat model. With
``--candidates 8`` the workflow proposes and selects instead of locating.
Tokens are those the models wrote (and, of a chat model, also those it read).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sam4mllm_integrations.langgraph_workflow import QuestionSettings, question_graph

from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.evaluation.benchmark import benchmark_cases
from sam4mllm_tool.evaluation.bootstrap import Bootstrap
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.outcome import Outcome, compare_masks
from sam4mllm_tool.evaluation.scenes import scene_cases
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.pipeline.model import Sam4MLLM, load
from sam4mllm_tool.protocols import (
    CheckpointNotes,
    Dialogue,
    Mllm,
    Reply,
    YesNoWords,
    sample_replies,
)
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import Mask, RgbImage, YesNo

SCENE_LIMIT = 1_000_000


@dataclass
class CountingMllm:
    """An MLLM, and how many tokens it has written."""

    inner: Mllm
    tokens: int = 0

    @property
    def name(self) -> str:
        """Of the MLLM."""
        return self.inner.name

    @property
    def format_name(self) -> str:
        """Of the MLLM."""
        return self.inner.format_name

    @property
    def notes(self) -> CheckpointNotes:
        """Of the MLLM."""
        return self.inner.notes

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """The MLLM's reply."""
        reply = self.inner.generate(image, dialogue, grammar=grammar, max_new_tokens=max_new_tokens)
        self.tokens += reply.tokens
        return reply

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The MLLM's replies."""
        replies = self.inner.alternates(image, dialogue, grammar=grammar, count=count)
        self.tokens += sum(reply.tokens for reply in replies)
        return replies

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The MLLM's replies."""
        replies = sample_replies(self.inner, image, dialogue, grammar=grammar, count=count)
        self.tokens += sum(reply.tokens for reply in replies)
        return replies

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """The MLLM's answers, one token each."""
        self.tokens += count
        return self.inner.answer_yes_no(image, dialogue, words=words, count=count)


@dataclass
class Tally:
    """The result of one way of answering."""

    outcomes: list[Outcome] = field(default_factory=list)
    tool_calls: int = 0
    tokens: int = 0
    unread: int = 0


Answer = tuple[list[Mask], int, int]
"""Masks, tool calls, tokens of a chat model."""


def one_shot(toolbox: Toolbox, case: Case, image_id: str, strategy: str | None = None) -> Answer:
    """``segment_object`` with the question as the expression."""
    arguments = {"image": image_id, "expression": case.expression, "count": "0+",
                 "strategy": strategy}  # fmt: skip
    return list(toolbox.call("segment_object", arguments).masks.values()), 1, 0


def workflow(graph: Any, toolbox: Toolbox, case: Case, image_id: str, local: bool) -> Answer:
    """The question workflow."""
    state = graph.invoke({"question": case.expression, "image": image_id})
    found = [toolbox.workspace.object(object_id).mask for object_id in state["object_ids"]]
    tokens = 0 if local else state["tokens"]  # a local thinker's are counted at the MLLM
    return [mask for mask in found if mask is not None], state["tool_calls"], tokens


def run(
    model: Sam4MLLM,
    cases: Iterable[Case],
    chat: Any = None,
    settings: QuestionSettings | None = None,
) -> dict[str, Tally]:
    """All ways over all cases, each with a workspace of its own."""
    counter = CountingMllm(model.mllm)
    counted = replace(model, mllm=counter)
    first, second, third = Toolbox(counted), Toolbox(counted), Toolbox(counted)
    graph = question_graph(second, chat, settings=settings)
    ways: dict[str, tuple[Toolbox, Callable[[Case, str], Answer]]] = {
        "one-shot": (first, lambda case, image: one_shot(first, case, image)),
        "one-shot, propose": (
            third, lambda case, image: one_shot(third, case, image, "propose")
        ),
        "workflow": (
            second, lambda case, image: workflow(graph, second, case, image, chat is None)
        ),
    }  # fmt: skip
    tallies = {name: Tally() for name in ways}
    for number, case in enumerate(cases):
        # The first to see a picture pays for reading it, so they take turns at being first.
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            toolbox, answer = ways[name]
            image_id = toolbox.workspace.open_image(case.open_image().pil).image_id
            _answer(tallies[name], case, partial(answer, case, image_id), counter)
    return tallies


def _answer(tally: Tally, case: Case, answer: Callable[[], Answer], counter: CountingMllm) -> None:
    start, before = time.perf_counter(), counter.tokens
    masks: list[Mask] = []
    try:
        masks, calls, tokens = answer()
        tally.tool_calls += calls
        tally.tokens += tokens
    except DialogueError:
        tally.tool_calls += 1
        tally.unread += 1
    tally.tokens += counter.tokens - before
    seconds = time.perf_counter() - start
    areas = compare_masks(masks, case.truth(), case.ignore())
    tally.outcomes.append(Outcome(case.case, case.image, *areas, seconds=seconds, kind=case.kind))


def report(tallies: dict[str, Tally]) -> dict[str, dict[str, Any]]:
    """gIoU and cIoU with 95% intervals, gIoU's paired difference from the first way, and tool
    calls, tokens and seconds per question.
    """
    first = next(iter(tallies.values())).outcomes
    rows: dict[str, dict[str, Any]] = {}
    for name, tally in tallies.items():
        count = len(tally.outcomes)
        row: dict[str, Any] = {"questions": count}
        for metric in ("gIoU", "cIoU"):
            estimate = Bootstrap().estimate(tally.outcomes, METRICS[metric])
            row[metric] = [estimate.value, estimate.low, estimate.high]
        gap = Bootstrap().compare(first, tally.outcomes, METRICS["gIoU"])
        row["gIoU − first"] = [gap.value, gap.low, gap.high]
        row["tool_calls"] = tally.tool_calls / count
        row["tokens"] = tally.tokens / count
        row["seconds"] = sum(outcome.seconds for outcome in tally.outcomes) / count
        row["unread_replies"] = tally.unread
        rows[name] = row
    return rows


def scene_questions(seed: int, limit: int) -> Iterator[Case]:
    """Questions about what a thing is for, on unseen scenes."""
    found = (case for case in scene_cases(seed, SCENE_LIMIT)() if case.kind == "function")
    return islice(found, limit)


def _print(rows: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "way", "questions", "gIoU", "cIoU", "gIoU − first", "tool calls", "tokens", "seconds"
    )
    for name, row in rows.items():
        shares = [
            "–" if row[m][0] is None else "{:.1%} ({:.1%}–{:.1%})".format(*row[m])
            for m in ("gIoU", "cIoU")
        ]
        shares.append("{:+.3f} ({:+.3f} … {:+.3f})".format(*row["gIoU − first"]))
        numbers = [f"{row[m]:.2f}" for m in ("tool_calls", "tokens", "seconds")]
        table.add_row(name, str(row["questions"]), *shares, *numbers)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--reasonseg", type=Path, help="folder of ReasonSeg instead of scenes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--mllm", default="embedded")
    parser.add_argument("--adapter")
    parser.add_argument("--segmenter", default="embedded")
    parser.add_argument("--chat", help="provider:model of a LangChain chat model")
    parser.add_argument("--proposer", default="mllm", help="as the option of sam4mllm-tool")
    parser.add_argument("--candidates", type=int, default=0, help="proposed by the workflow")
    parser.add_argument("--verification", choices=("question", "posterior"))
    parser.add_argument("--attempts", type=int, default=QuestionSettings.max_attempts)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    chat = None
    if args.chat:
        from langchain.chat_models import init_chat_model

        chat = init_chat_model(args.chat)
    cases = (
        benchmark_cases("reasonseg", args.reasonseg, args.split, args.limit)()
        if args.reasonseg
        else scene_questions(args.seed, args.limit)
    )
    model = load(args.mllm, adapter=args.adapter, segmenter=args.segmenter, proposer=args.proposer)
    if args.verification:
        chosen = replace(model.settings, verification=args.verification)
        model = replace(model, settings=chosen)
    settings = QuestionSettings(max_attempts=args.attempts, candidates=args.candidates)
    rows = report(run(model, cases, chat, settings))
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
    else:
        _print(rows)


if __name__ == "__main__":
    main()
