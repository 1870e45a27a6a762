"""A small training run, for one process or several: BASE OUT ACCUMULATE [DEEPSPEED]."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_training import PQPP, _examples

from sam4mllm_tool.training.dialogues import conversations
from sam4mllm_tool.training.lora import deepspeed_file, train
from sam4mllm_tool.training.recipe import LoraRecipe

if __name__ == "__main__":
    torch.set_num_threads(1)
    base, out, accumulate, *deepspeed = sys.argv[1:]
    recipe = LoraRecipe(
        rank=4, alpha=4, dropout=0.0, rate=1e-2, epochs=3, accumulate=int(accumulate), bf16=False,
        checkpointing=False,
    )  # fmt: skip
    found = list(conversations(_examples() * 3, PQPP))
    train(
        base, found, Path(out), recipe, PQPP, device="cpu", save_steps=1,
        deepspeed=deepspeed_file(deepspeed[0]) if deepspeed else None,
    )  # fmt: skip
