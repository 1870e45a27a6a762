"""A small training run in this process, or in several: BASE OUT PROCESSES [DEEPSPEED].

Several processes are started by ``torchrun``'s own launcher. They are forked from this one, which
has imported everything already: imports cost more than the training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_training import PQPP, _examples
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sam4mllm_tool.training.dialogues import conversations
from sam4mllm_tool.training.lora import deepspeed_file, train
from sam4mllm_tool.training.recipe import LoraRecipe


def run(base: Path, out: Path, accumulate: int, deepspeed: str | None = None) -> None:
    """Train what ``_examples`` shows, with a step over ``accumulate`` conversations per process."""
    torch.set_num_threads(1)
    recipe = LoraRecipe(
        rank=4, alpha=4, dropout=0.0, rate=1e-2, epochs=3, accumulate=accumulate, bf16=False,
        checkpointing=False,
    )  # fmt: skip
    found = list(conversations(_examples() * 3, PQPP))
    train(
        base, found, out, recipe, PQPP, device="cpu", save_steps=1,
        deepspeed=deepspeed_file(deepspeed) if deepspeed else None,
    )  # fmt: skip


if __name__ == "__main__":
    base, out, processes, *deepspeed = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0,
    )  # fmt: skip
    elastic_launch(config, run)(Path(base), Path(out), 1, *deepspeed)
