"""The training command on real architectures: random small weights, a miniature data set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import build

from sam4mllm_tool.datasets import load_examples
from sam4mllm_tool.pipeline.model import load
from sam4mllm_tool.scenes.export import export_scenes
from sam4mllm_tool.scenes.world import SMALL_WORLD
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.training.dialogues import Conversations, Recipe, chunks
from sam4mllm_tool.training.lora import train
from sam4mllm_tool.training.recipe import PRESETS

RECIPE = replace(
    PRESETS["published"].learning, rate=1e-2, epochs=6, batch=2, accumulate=1, bf16=False,
    checkpointing=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_scenes(
        tmp_path_factory.mktemp("refcoco"), 0, 3, "train", "refcoco", world=SMALL_WORLD
    )


def _losses(folder: Path) -> list[float]:
    """The losses of the trainer's evaluations, in order."""
    states = [json.loads(p.read_text()) for p in folder.rglob("trainer_state.json")]
    history = max(states, key=lambda state: state["global_step"])["log_history"]
    return [line["eval_loss"] for line in history if "eval_loss" in line]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_published_recipe_learns_and_its_adapter_serves_the_tools(
    family: str, miniature: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    base = build(family, tmp_path / "base")
    recipe = Recipe(seed=0, ppg_share=0.0)
    examples = list(load_examples("refcoco", miniature, "train"))
    learnt = Conversations(list(chunks(examples, recipe))[:4], recipe, None)
    adapter = tmp_path / "adapter"
    # The loss is taken on what is learnt: it has to fall there.
    out = train(base, learnt, adapter, RECIPE, recipe, device="cpu", save_steps=4, held_out=learnt)
    losses = _losses(adapter)
    assert losses[-1] < 0.8 * losses[0], losses

    box = Toolbox(load(str(base), adapter=str(out), device="cpu"))
    assert box.model.mllm.format_name == "sam4mllm"
    image = str(next(miniature.rglob("*.jpg")))
    call = {"image": image, "expression": "the red disc", "count": "1"}
    adapted = box.call("segment_object", call).result
    assert adapted.status == "found"
    plain = Toolbox(load(str(base), format="sam4mllm", device="cpu"))
    assert plain.call("locate_object", call).result.objects[0].box != adapted.objects[0].box
