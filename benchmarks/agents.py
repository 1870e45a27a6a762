"""What many agents cost on one model: passes they share against passes one by one.

    python -m benchmarks.agents [--json] [--agents 1 8 32] [--repeats N] [--threads N]

A LLaVA with random weights, one process, one thread per agent, all of them starting together. Three
kinds of query:

- ``new``: both rounds about one object, each agent with a picture of its own that was never read;
- ``known``: the same about one picture that all ask about and that was read before, each agent
  with an expression of its own;
- ``marks``: thirty questions about thirty marks, each agent on a marked picture of its own.

Each is asked of two engines over the same weights, ``packed=False`` (serial) and ``packed=True``,
turn and turn about, and both must say the same. Figures per query: forward passes, bytes of weights
that they read (the language model's in each pass, the vision tower's where a picture is read), CPU
seconds of the whole process; ``speed`` is the median over the pairs of serial / packed CPU seconds
(the clock that other processes disturb least), ``fairness`` the slowest agent's seconds / the
median agent's, by the wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.dialogue import random_picture
from benchmarks.random_llava import random_llava
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import Question, Turn
from sam4mllm_tool.types import Box, Point, RgbImage, TargetCount, YesNo

MARKS, POINTS = 30, 30
KINDS = ("new", "known", "marks")
FORM = Sam4MllmFormat()
Query = Callable[[LocalMllm], list[YesNo]]


@dataclass(frozen=True)
class Outcome:
    """One run of all agents on one engine."""

    passes: int
    weight_bytes: int
    cpu: float
    seconds: list[float]
    said: list[list[YesNo]]


class Passes:
    """Counts passes and the bytes of weights they read."""

    def __init__(self, model: Any) -> None:
        self.count, self.weight_bytes = 0, 0
        head = model.get_output_embeddings()
        parts = (model.model.language_model.layers, head)
        self._language = sum(_bytes_of(part) for part in parts)
        self._vision = _bytes_of(model.model.vision_tower)
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += 1
        self.weight_bytes += self._language
        self.weight_bytes += self._vision * (kwargs.get("pixel_values") is not None)


def _bytes_of(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


class Contest:
    """Two engines over the same weights."""

    def __init__(self, image_tokens: int, layers: int) -> None:
        model, processor, self.image_tokens = random_llava(image_tokens, layers=layers)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.passes = Passes(model)
        self.serial = LocalMllm(model, processor, name="serial", packed=False)
        self.packed = LocalMllm(model, processor, name="packed")
        # What is found out once per model is no part of any query.
        image = random_picture(0)
        for side in (self.serial, self.packed):
            side.answer_each([_mark(image, n) for n in (1, 2, 3)], words=FORM.yes_no)

    def pair(self, kind: str, agents: int, seed: int) -> tuple[Outcome, Outcome]:
        """(serial, packed), the first to run changing from seed to seed; both said the same."""
        queries = _queries(kind, agents, seed)
        sides = [self.serial, self.packed]
        found = {side.name: self._run(side, kind, queries, seed) for side in sides[:: (-1) ** seed]}
        serial, packed = (found[side.name] for side in sides)
        gap = (torch.tensor(serial.said) - torch.tensor(packed.said)).abs().max()
        if gap > 1e-4:
            raise SystemExit(f"{kind}, {agents} agents: probabilities differ by {gap}")
        return serial, packed

    def _run(self, side: LocalMllm, kind: str, queries: Sequence[Query], seed: int) -> Outcome:
        side.engine.store.clear()
        if kind == "known":
            image = random_picture(seed)
            side.generate(image, _opening("anything", image), max_new_tokens=1)
        start = threading.Barrier(len(queries) + 1)

        def agent(query: Query) -> tuple[float, list[YesNo]]:
            start.wait()
            begun = time.perf_counter()
            said = query(side)
            return time.perf_counter() - begun, said

        passes, weight_bytes = self.passes.count, self.passes.weight_bytes
        with ThreadPoolExecutor(len(queries)) as pool:
            waiting = [pool.submit(agent, query) for query in queries]
            cpu = time.process_time()
            start.wait()
            done = [one.result() for one in waiting]
            cpu = time.process_time() - cpu
        return Outcome(
            self.passes.count - passes,
            self.passes.weight_bytes - weight_bytes,
            cpu,
            [seconds for seconds, _ in done],
            [said for _, said in done],
        )


def _queries(kind: str, agents: int, seed: int) -> list[Query]:
    """One query per agent."""
    if kind == "known":
        image = random_picture(seed)
        return [partial(_dialogue, image=image, expression=f"object {n}") for n in range(agents)]
    ask: Callable[..., list[YesNo]] = _marks
    if kind == "new":
        ask = partial(_dialogue, expression="the red apple")
    return [partial(ask, image=random_picture(1000 * seed + n)) for n in range(agents)]


def _marks(side: LocalMllm, image: RgbImage) -> list[YesNo]:
    """Thirty questions about a picture."""
    questions = [_mark(image, mark) for mark in range(1, MARKS + 1)]
    return [answer for (answer,) in side.answer_each(questions, words=FORM.yes_no)]


def _dialogue(side: LocalMllm, image: RgbImage, expression: str) -> list[YesNo]:
    """Both rounds: a box, then points on it."""
    opening = _opening(expression, image)
    said = side.generate(image, opening, grammar=FORM.box_grammar(TargetCount.ONE))
    points = [Point(20.0 + 20 * n % 600, 15.0 + 450 * n / POINTS) for n in range(POINTS)]
    question = FORM.ask_points(expression, Box(1, 1, 639, 479), points, image.size)
    dialogue = (*opening, Turn("assistant", said.text), Turn("user", question))
    return side.answer_yes_no(image, dialogue, words=FORM.yes_no, count=POINTS)


def _opening(expression: str, image: RgbImage) -> tuple[Turn, ...]:
    question = FORM.ask_boxes(expression, TargetCount.ONE, image.size)
    return (Turn("system", FORM.system_prompt or ""), Turn("user", question))


def _mark(image: RgbImage, mark: int) -> Question:
    question = FORM.ask_marks("the red apple left of the dog", [mark])
    return Question(image, (Turn("system", FORM.system_prompt or ""), Turn("user", question)))


def measure(
    contest: Contest, kinds: Sequence[str], agents: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """One row per kind of query and number of agents."""
    rows = []
    for kind in kinds:
        for number in agents:
            pairs = [contest.pair(kind, number, 1 + seed) for seed in range(repeats)]
            sides = dict(zip(("serial", "packed"), zip(*pairs, strict=True), strict=True))
            figures = {name: _figures(some, number) for name, some in sides.items()}
            serial, packed = figures["serial"], figures["packed"]
            rows.append(
                {
                    "kind": kind,
                    "agents": number,
                    **figures,
                    "fewer_passes": serial["passes"] / packed["passes"],
                    "speed": statistics.median(one.cpu / other.cpu for one, other in pairs),
                }
            )
    return rows


def _figures(runs: Sequence[Outcome], agents: int) -> dict[str, float]:
    """Medians over the runs, per query."""
    return {
        "passes": statistics.median(run.passes / agents for run in runs),
        "weight_bytes": statistics.median(run.weight_bytes / agents for run in runs),
        "cpu_seconds": statistics.median(run.cpu / agents for run in runs),
        "latency": statistics.median(statistics.median(run.seconds) for run in runs),
        "fairness": statistics.median(
            max(run.seconds) / statistics.median(run.seconds) for run in runs
        ),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs (medians)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=10, help="of the language model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contest = Contest(options.image_tokens, options.layers)
    result = {
        "parameters": contest.parameters,
        "image_tokens": contest.image_tokens,
        "repeats": options.repeats,
        "rows": measure(contest, options.kinds, options.agents, options.repeats),
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table(title="Many agents: serial → packed, per query")
    for column in ("query", "agents", "passes", "fewer", "weights read, GB", "CPU s", "speed",
                   "fairness"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in result["rows"]:
        serial, packed = row["serial"], row["packed"]
        table.add_row(
            row["kind"],
            str(row["agents"]),
            f"{serial['passes']:.1f} → {packed['passes']:.1f}",
            f"{row['fewer_passes']:.1f}×",
            f"{serial['weight_bytes'] / 1e9:.2f} → {packed['weight_bytes'] / 1e9:.2f}",
            f"{serial['cpu_seconds']:.2f} → {packed['cpu_seconds']:.2f}",
            f"{row['speed']:.2f}×",
            f"{serial['fairness']:.2f} → {packed['fairness']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
