"""The published recipe is the published recipe, value by value and as it acts."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_training import PQPP, _asked, _example, _examples, base  # noqa: F401
from typer.testing import CliRunner

from sam4mllm_tool.cli import app
from sam4mllm_tool.errors import DatasetError, InputError
from sam4mllm_tool.mllm.loading import load_processor
from sam4mllm_tool.training.candidates import Candidates
from sam4mllm_tool.training.dialogues import Conversations, Recipe, chunks, conversations
from sam4mllm_tool.training.lora import train
from sam4mllm_tool.training.mixture import Source
from sam4mllm_tool.training.recipe import PRESETS, PUBLISHED_SOURCES, LoraRecipe
from sam4mllm_tool.training.sequences import ConversationEncoder, ConversationSet
from sam4mllm_tool.types import TargetCount

PUBLISHED = PRESETS["published"]


def test_the_published_values() -> None:
    """As the authors' training script and notebooks have them."""
    learning, dialogues = PUBLISHED.learning, PUBLISHED.dialogues
    assert (learning.rank, learning.alpha, learning.dropout) == (128, 128, 0.05)
    assert (learning.rate, learning.weight_decay, learning.epochs) == (1e-4, 0.001, 3)
    assert (learning.warm_up, learning.annealing, learning.clip) == (0.01, "linear", 0)
    assert (learning.batch, learning.accumulate, learning.longest) == (1, 8, 1536)
    assert learning.projector == "lora" and not learning.vision and learning.smoothing == 0
    assert learning.bf16 and learning.checkpointing
    assert dialogues.count is TargetCount.ZERO_OR_MORE and dialogues.ppg_share == 0
    assert dialogues.picture == (672, 672) and dialogues.references == 5
    asked = dialogues.candidates
    assert (asked.normal, asked.asked, asked.jitter, asked.grids) == ((10, 4), (1, 20), 0, 0)
    assert (asked.spread, asked.radius) == (100, 0.1)
    assert PUBLISHED.judge == "" and PUBLISHED.alpha_per_rank is None


def test_every_value_is_shown_with_its_source() -> None:
    names = [f.name for f in fields(LoraRecipe)] + [f.name for f in fields(Recipe)]
    names += [f"candidates.{f.name}" for f in fields(Candidates)]
    assert set(PUBLISHED_SOURCES) >= set(names) - {"candidates"}
    for preset in PRESETS:
        arguments = ["train", "--show-recipe", "--preset", preset, "--rank", "64"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "160"})
        assert result.exit_code == 0
        rows = dict(re.findall(r"│ (\S+) +│ (.+?) +│", result.stdout))
        assert set(rows) >= set(PUBLISHED_SOURCES) - {"value"}
        assert rows["rank"] == "64"
        assert rows["alpha"] == {"small": "128"}.get(preset, "128")
        assert "asked for" in result.stdout
    for source in set(PRESETS["ours"].reasons.values()) | set(PRESETS["small"].reasons.values()):
        assert source.startswith("ours")
    changed = {name for name in PRESETS["ours"].reasons if "." not in name}
    for name in ("rank", "alpha", "rate", "warm_up", "annealing", "projector", "longest"):
        assert name not in changed, "ours differs only where a reason is given"


def test_what_differs_from_the_published_has_a_reason_of_its_own() -> None:
    from sam4mllm_tool.training.recipe import _values

    published = dict(_values(PUBLISHED.learning, PUBLISHED.dialogues))
    for name in ("ours", "small"):
        preset = PRESETS[name]
        differs = {
            key for key, value in _values(preset.learning, preset.dialogues)
            if value != published[key]
        }  # fmt: skip
        assert differs == set(preset.reasons), name


def test_alpha_stays_when_the_rank_is_changed_unless_it_is_named() -> None:
    def shown(*options: str) -> str:
        arguments = ["train", "--show-recipe", "--preset", "published", *options]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "160"})
        (alpha,) = re.findall(r"│ alpha +│ (\d+) ", result.stdout)
        return alpha

    assert shown("--rank", "16") == "128"
    assert shown("--rank", "16", "--alpha", "32") == "32"


def test_the_judge_is_never_the_embedded_one_by_accident(tmp_path: Path) -> None:
    options = ["--preset", "published", "--ppg", "0.5", "--count", "1"]
    for command in (["train", "--out", str(tmp_path)], ["dialogues"]):
        with pytest.raises(InputError, match="no segmenter named"):
            CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    result = CliRunner().invoke(app, ["dialogues", *options, "--sam", "embedded"])
    assert result.exit_code == 0 and "prompt points" in result.stdout


def test_the_preset_where_none_is_named() -> None:
    """``small``, with the embedded judge, is for the embedded model and scenes alone."""
    for options, expected in (
        ([], "small"), (["--base", "x"], "published"), (["--data", "refcoco=x"], "published"),
        (["--data", "scenes", "--data", "vqa=x", "--preset", "ours"], "ours"),
    ):  # fmt: skip
        arguments = ["train", "--show-recipe", *options]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert f"preset {expected}" in result.stdout, options


# --- as it acts -----------------------------------------------------------------------------------


def test_questions_ask_as_the_notebook_does() -> None:
    """Always 0+, the true box, round 2 about each target, N(10, 4) points cut to 1-20."""
    many = [
        _example(n, f"{n}", *[(10, 5, 30, 25), (2, 30, 12, 38)][: n % 3], count=count)
        for n in range(240)
        for count in [(TargetCount.ZERO_OR_MORE, TargetCount.ONE, TargetCount.ONE_OR_MORE)[n % 3]]
    ]
    numbers: Counter[int] = Counter()
    for number, found in enumerate(conversations(many, PUBLISHED.dialogues)):
        pairs = _asked(found)
        assert "(0+)" in pairs[0][0]
        boxes = re.findall(r"\[[\d,]+\]", pairs[0][1])
        # The data set's order: the upper box first, though it lies to the right.
        assert boxes == ["[250,125,750,625]", "[050,750,300,950]"][: number % 3]
        asked = [re.findall(r"\[[\d,]+\]", question)[0] for question, _ in pairs[1:]]
        assert sorted(asked) == sorted(boxes), "the true boxes, each once"
        numbers.update(question.count("(") for question, _ in pairs[1:])
    assert set(numbers) <= set(range(1, 21))
    rng = random.Random(0)
    expected = Counter(int(max(1, min(20, rng.normalvariate(10, 4)))) for _ in range(20000))
    for low, high in ((1, 5), (6, 8), (9, 11), (12, 15), (16, 20)):
        share = sum(numbers[n] for n in range(low, high + 1)) / numbers.total()
        wanted = sum(expected[n] for n in range(low, high + 1)) / expected.total()
        assert share == pytest.approx(wanted, abs=0.08)


def test_pictures_are_resized_before_the_model_sees_them(base: Path) -> None:  # noqa: F811
    class Seen(ConversationEncoder):
        def fit(self, conversation):  # type: ignore[no-untyped-def]
            seen.append((conversation.image.size, conversation.turns))
            return super().fit(conversation)

    seen: list = []
    found = list(conversations(_examples(), PQPP))
    ConversationSet(found, Seen(load_processor(base), PQPP), (672, 672))[0]
    ConversationSet(found, Seen(load_processor(base), PQPP))[0]
    assert [size for size, _ in seen] == [(672, 672), (40, 40)]
    assert seen[0][1] == seen[1][1], "the words stay"


def test_an_unreadable_picture_is_named_and_the_next_is_learnt(
    base: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = replace(_examples()[0], image=b"no picture", image_id="broken")
    recipe = replace(PQPP, references=1)
    whole = Conversations(chunks(_examples(), recipe), recipe)
    some = Conversations(chunks([broken, *_examples()], recipe), recipe)
    encoder = ConversationEncoder(load_processor(base), recipe)
    (found,), (expected,) = ConversationSet(some, encoder)[0], ConversationSet(whole, encoder)[0]
    assert torch.equal(found.labels, expected.labels)
    assert "next conversation is used instead" in caplog.text
    nothing = Conversations(chunks([broken], recipe), recipe)
    with pytest.raises(DatasetError, match="1 conversations cannot be read"):
        ConversationSet(nothing, encoder)[0]


def test_the_schedule_is_the_scripts(base: Path, tmp_path: Path) -> None:  # noqa: F811
    """Rate, momentum and decay of every step, against PyTorch's own scheduler on one weight."""
    import sam4mllm_tool.training.lora as lora

    seen: list[tuple[float, float, float]] = []

    class Watched(lora.DialogueTrainer):
        def training_step(self, *arguments, **options):  # type: ignore[no-untyped-def]
            group = self.optimizer.param_groups[0]
            seen.append((group["lr"], group["betas"][0], group["weight_decay"]))
            return super().training_step(*arguments, **options)

    found = list(conversations(_examples() * 6, PQPP))[:6]
    recipe = replace(
        PUBLISHED.learning, rank=2, accumulate=2, bf16=False, checkpointing=False, epochs=40
    )
    old, lora.DialogueTrainer = lora.DialogueTrainer, Watched  # type: ignore[misc]
    try:
        train(base, found, tmp_path, recipe, PQPP, device="cpu", stop_after=60)
    finally:
        lora.DialogueTrainer = old  # type: ignore[misc]
    steps = len(found) // 2 * 40
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.001)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-4, pct_start=0.01, total_steps=steps, anneal_strategy="linear"
    )
    expected = []
    for _ in range(60):
        group = optimizer.param_groups[0]
        expected.append((group["lr"], group["betas"][0], group["weight_decay"]))
        optimizer.step()
        scheduler.step()
    assert seen[::2][:60] == [pytest.approx(one) for one in expected]


# --- how sets are named ---------------------------------------------------------------------------


def test_sets_are_named_with_their_shares() -> None:
    assert Source.parse("refcoco=/data/x") == Source("refcoco", Path("/data/x"), 1.0)
    assert Source.parse("grefcoco=a:b/c:0.5") == Source("grefcoco", Path("a:b/c"), 0.5)
    assert Source.parse("vqa=f.json:.2") == Source("vqa", Path("f.json"), 0.2)
    assert Source.parse("scenes:2") == Source("scenes", None, 2.0)
    for bad in ("refcoco", "cats=x", "scenes=x", "refcoco=", "refcoco=x:0"):
        with pytest.raises(InputError):
            Source.parse(bad)
