"""Published SAM4MLLM adapters → adapters over transformers' own LLaVA-NeXT.

The published adapters were saved by peft over the original LLaVA-NeXT code base, whose
``LlavaLlamaForCausalLM`` *is* the language model and carries the projector inside. transformers'
``LlavaNextForConditionalGeneration`` holds the same layers under other names. Only names change;
the tensors are copied as they are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sam4mllm_tool.errors import CheckpointError

_ROOT = "base_model.model."
# Names below the root: (pattern in the original code base, name in transformers), first match wins.
_RENAMES = (
    (r"^model\.mm_projector\.0\b", "model.multi_modal_projector.linear_1"),
    (r"^model\.mm_projector\.2\b", "model.multi_modal_projector.linear_2"),
    (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^model\.(?=(?:layers|embed_tokens|norm)\b)", "model.language_model."),
    (r"^(?=lm_head\b)", ""),
    (r"^(?=model\.image_newline\b)", ""),
)
_LORA_PART = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b")


def convert_adapter(
    source_dir: str | Path, out_dir: str | Path, *, base_model: str | None = None
) -> Path:
    """Write the adapter of ``source_dir`` to ``out_dir``, under transformers' names.

    Args:
        source_dir: holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``,
            read as plain tensors only).
        out_dir: made if needed; its adapter files are replaced.
        base_model: hub id or directory of the base in transformers' layout, for the notes in the
            adapter (peft does not need it to load).

    Returns:
        ``out_dir``.

    Raises:
        CheckpointError: no adapter there, a kind other than LoRA, or names of another code base.
    """
    source, out = Path(source_dir).expanduser(), Path(out_dir).expanduser()
    config = _read_config(source)
    tensors = {_renamed_key(key): tensor for key, tensor in _read_tensors(source).items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    converted = _converted_config(config, set(tensors), base_model)
    (out / "adapter_config.json").write_text(json.dumps(converted, indent=2) + "\n")
    (out / "sam4mllm.json").write_text(json.dumps({"format": "sam4mllm"}) + "\n")
    return out


def renamed(name: str) -> str:
    """A module's or parameter's name in transformers' layout.

    Raises:
        CheckpointError: it is not a name of the original code base.
    """
    for pattern, replacement in _RENAMES:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    raise CheckpointError(
        f"{name!r} is no name of the original LLaVA-NeXT code base",
        hint="Only adapters over lmms-lab's LLaVA-NeXT with a two-layer projector are converted; "
        "one made with transformers needs no conversion.",
    )


def _renamed_key(key: str) -> str:
    if not key.startswith(_ROOT):
        raise CheckpointError(
            f"{key!r} is not a tensor of a peft adapter", hint="Give the folder that peft saved."
        )
    return _ROOT + renamed(key.removeprefix(_ROOT))


def _read_config(source: Path) -> dict[str, Any]:
    file = source / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}", hint="Give the folder that peft saved."
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file} is not that of a LoRA", hint="Only LoRA is converted.")
    return config


def _read_tensors(source: Path) -> dict[str, torch.Tensor]:
    try:
        if (file := source / "adapter_model.safetensors").exists():
            return load_file(file)
        file = source / "adapter_model.bin"
        tensors: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        raise _unreadable(file, error) from error
    except Exception as error:  # torch's unpickler has an error class of its own
        if type(error).__name__ != "UnpicklingError":
            raise
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read: {error}", hint="Download the adapter again.")


def _converted_config(
    config: dict[str, Any], keys: set[str], base_model: str | None
) -> dict[str, Any]:
    """The configuration with full module names.

    Which modules have a LoRA is read off the tensors: the original lists may be suffixes
    (``q_proj``) that match other modules of transformers' model too.
    """
    names = {key.removeprefix(_ROOT) for key in keys}
    adapted = {name[: part.start()] for name in names if (part := _LORA_PART.search(name))}
    saved = {name.rpartition(".")[0] for name in names if not _LORA_PART.search(name)}
    return {
        **config,
        "base_model_name_or_path": base_model,
        "target_modules": sorted(adapted),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": _renamed_pattern(config.get("rank_pattern")),
        "alpha_pattern": _renamed_pattern(config.get("alpha_pattern")),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "auto_mapping": None,
        "task_type": None,
        "inference_mode": True,
    }


def _renamed_pattern(pattern: dict[str, Any] | None) -> dict[str, Any]:
    """Per-module ranks or alphas; a bare suffix fits both layouts as it is."""
    return {
        renamed(name) if name.startswith("model.") else name: value
        for name, value in (pattern or {}).items()
    }
