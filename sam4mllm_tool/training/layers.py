"""LoRA layers in a model: which layers get them, and taking them over from a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import set_seed

from sam4mllm_tool.errors import CheckpointError, InputError
from sam4mllm_tool.mllm.loading import quiet_peft
from sam4mllm_tool.training.recipe import LoraRecipe

PROJECTORS = ("multi_modal_projector", "resampler", "connector", "merger", "mlp1")
"""Names of the module between vision tower and language model, by model family."""
VISION = ("vision", "visual")
"""Parts of the names of a vision tower's layers."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "qkv", "proj")
"""Names of the linear layers that get LoRA factors, of language models and of vision towers."""


def adapt(model: Any, recipe: LoraRecipe) -> PeftModel:
    """The model with new LoRA layers; everything else except the projector is frozen.

    Trained weights are float32, whatever the model's dtype.

    Raises:
        InputError: LoRA on a projector without linear layers.
    """
    set_seed(recipe.seed)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and _adapted(name, recipe.vision)
    ]
    assert found, f"no language projection named {'|'.join(PROJECTIONS)} in this model"
    kept = {part for name, _ in model.named_modules() for part in PROJECTORS
            if name.endswith("." + part) or name == part}  # fmt: skip
    if recipe.projector == "lora":
        found += _projector_layers(model)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=found,
        modules_to_save=sorted(kept) if recipe.projector == "full" else None,
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def _projector_layers(model: Any) -> list[str]:
    """The linear layers of the projector."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and set(name.split(".")) & set(PROJECTORS)
    ]
    if not found:
        raise InputError(
            "the projector of this model has no linear layers to put LoRA on",
            hint="Use --projector full to train it directly, or --projector frozen to leave it.",
        )
    return found


def _adapted(module: str, vision: bool) -> bool:
    """Whether a linear layer of this name gets LoRA factors."""
    if any(part in module for part in VISION):
        between = any(part in module for part in PROJECTORS)  # not by LoRA
        return vision and not between and module.endswith(VISION_PROJECTIONS)
    return module.endswith(PROJECTIONS)


def take_over(model: PeftModel, adapter: Path) -> None:
    """Set an adapted model's layers to those of a saved adapter.

    The vision tower's layers start new if the adapter has none there.

    Raises:
        CheckpointError: missing, corrupt, or of other layers or another rank.
    """
    try:
        weights = load_file(adapter / "adapter_model.safetensors")
        found = set_peft_model_state_dict(model, weights)
        lost = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
        if not any(part in name for name in weights for part in VISION):
            lost = [name for name in lost if not any(part in name for part in VISION)]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"training cannot continue from the adapter in {adapter}: {error}",
            hint="It must have been trained over this base with the same --rank and --projector.",
        ) from error
    if lost or found.unexpected_keys:
        raise CheckpointError(
            f"the adapter in {adapter} has other layers, first {(lost + found.unexpected_keys)[0]}",
            hint="It must have been trained over this base with the same --rank and --projector.",
        )
