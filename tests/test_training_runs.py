"""Whole training runs: a mixture of five sets, interrupted; two processes; DeepSpeed's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_in_processes
from random_models import build
from safetensors.torch import load_file
from test_named_datasets import write_every_set
from test_training import base  # noqa: F401

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.pipeline.model import load
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.training.dialogues import Chunk, Conversations
from sam4mllm_tool.training.lora import deepspeed_file, train
from sam4mllm_tool.training.mixture import SceneDraw, Source, mixture
from sam4mllm_tool.training.recipe import PRESETS

HERE = Path(__file__).parent


def test_the_published_preset_on_five_sets_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """On LLaVA-NeXT's architecture; the adapter then serves the tools."""
    torch.set_num_threads(1)
    named = write_every_set(tmp_path)
    preset = PRESETS["published"]
    recipe = replace(
        preset.learning, rank=8, alpha=8, rate=1e-2, accumulate=2, epochs=1, bf16=False,
        checkpointing=False,
    )  # fmt: skip
    sets = ("refcoco", "grefcoco", "ade20k", "jsonl", "vqa")
    sources = [Source(name, named[name], 0.5 if name == "grefcoco" else 1.0) for name in sets]
    about = mixture(sources, preset.dialogues, "train", SceneDraw(), limit=8)
    assert {one.references[0][0].dataset for one in about if isinstance(one, Chunk)} == {
        "refcoco", "grefcoco", "ade20k", "jsonl",
    }  # fmt: skip
    assert about == mixture(sources, preset.dialogues, "train", SceneDraw(), limit=8)
    learnt = Conversations(about, preset.dialogues)
    made = build("llava_next", tmp_path / "base")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(made, learnt, whole, recipe, preset.dialogues, device="cpu")
    train(made, learnt, broken, recipe, preset.dialogues, device="cpu", stop_after=1)
    train(made, learnt, broken, recipe, preset.dialogues, device="cpu", resume=True)
    first, second = (load_file(f / "adapter_model.safetensors") for f in (whole, broken))
    assert first.keys() == second.keys()
    assert any("multi_modal_projector" in name for name in first), "the projector's LoRA"
    assert all(torch.equal(first[name], second[name]) for name in first)
    about_adapter = json.loads((whole / "sam4mllm.json").read_text())
    assert about_adapter["points_per_question"] == 20
    box = Toolbox(load(str(made), adapter=str(whole), device="cpu"))
    call = {"image": str(named["jsonl"] / "a.png"), "expression": "the left one", "count": "1"}
    assert box.call("segment_object", call).result.status == "found"


def _losses(folder: Path) -> list[float]:
    """The loss of every step."""
    states = (json.loads(path.read_text()) for path in folder.rglob("trainer_state.json"))
    last = max(states, key=lambda state: state["global_step"])
    return [line["loss"] for line in last["log_history"] if "loss" in line]


def test_two_processes_learn_as_one_that_accumulates(
    base: Path,  # noqa: F811
    tmp_path: Path,  # noqa: F811, RUF100
) -> None:
    train_in_processes.run(base, tmp_path / "one", accumulate=2)
    command = [sys.executable, train_in_processes.__file__, str(base), str(tmp_path / "two"), "2"]
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    assert len(one) > 4 and one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-4)
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeeds_files_leave_the_recipe_to_the_recipe(name: str, stage: int) -> None:
    """What the recipe decides is "auto", so that one value cannot contradict the other."""
    config = json.loads(deepspeed_file(name).read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert {key for key, value in config.items() if value == "auto"} == {
        "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size",
        "gradient_clipping",
    }  # fmt: skip
    assert "optimizer" not in config and "scheduler" not in config
    with pytest.raises(InputError, match="no DeepSpeed configuration"):
        deepspeed_file("zero9")


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_reads_them_as_transformers_fills_them(name: str, stage: int) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    preset = PRESETS["published"].learning
    config = HfTrainerDeepSpeedConfig(str(deepspeed_file(name)))
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=preset.batch, max_grad_norm=preset.clip, use_cpu=True,
        gradient_accumulation_steps=preset.accumulate, bf16=preset.bf16,
    )  # fmt: skip
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, build_model_config(), 100)
    read = DeepSpeedConfig(config.config)
    assert read.zero_optimization_stage == stage
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (8, 8)
    assert read.gradient_clipping == 0 and read.bfloat16_config.enabled


def build_model_config() -> SimpleNamespace:
    """What transformers asks of a model to fill ZeRO-3's sizes."""
    return SimpleNamespace(config=SimpleNamespace(hidden_size=4096))
