"""Published SAM4MLLM adapters → adapters over transformers' own LLaVA-NeXT.

The published adapters were saved by peft over the original LLaVA-NeXT code base, whose
``LlavaLlamaForCausalLM`` *is* the language model and carries the projector inside. transformers'
``LlavaNextForConditionalGeneration`` holds the same layers under other names. Only names change;
the tensors are copied as they are. Fully trained weights (``non_lora_trainables`` of the
original code base, or peft's ``modules_to_save``) become ``modules_to_save``.

The adapter's dialogue is written beside it as a chat template.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.mllm.loading import TEMPLATE_FILE

CHAT_TEMPLATE = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {%- set body = namespace(text='') %}
    {%- if message['content'] is string %}
        {%- set body.text = message['content'] %}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'image' %}
            {%- set body.text = body.text + '<image>\\n' %}
        {%- endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {%- set body.text = body.text + part['text'] %}
        {%- endfor %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- body.text | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Llama-3's dialogue as in the authors' code: texts are trimmed, and the image token comes before
the first question with one newline between them. Our own template of a published format."""
_START = "<|begin_of_text|>"

_ROOT = "base_model.model."
# Names below the root: (pattern in the original code base, name in transformers), first match wins.
_RENAMES = (
    (r"^model\.mm_projector\.0\b", "model.multi_modal_projector.linear_1"),
    (r"^model\.mm_projector\.2\b", "model.multi_modal_projector.linear_2"),
    (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^model\.(?=(?:layers|embed_tokens|norm)\b)", "model.language_model."),
    (r"^(?=lm_head\b)", ""),
)
_LORA_PART = re.compile(
    r"\.lora_(?:(?:A|B)\.weight|embedding_(?:A|B)|magnitude_vector(?:\.weight)?)$"
)
_WHOLE_PART = re.compile(r"^(?!.*\.lora_).*\.(?:weight|bias)$")
WHOLE = "non_lora_trainables"
_OTHER_CODE_BASE = (
    "Only adapters over lmms-lab's LLaVA-NeXT with a two-layer projector are converted; one made "
    "with transformers needs no conversion."
)


def convert_adapter(
    source_dir: str | Path, out_dir: str | Path, *, base_model: str | None = None
) -> Path:
    """Write the adapter of ``source_dir`` to ``out_dir``, under transformers' names.

    Args:
        source_dir: holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``,
            read as plain tensors only), and ``non_lora_trainables.bin`` (or ``.safetensors``) if
            there are fully trained weights. A ``tokenizer.json`` beside them determines how the
            original code base read the dialogue.
        out_dir: made if needed; its adapter files are replaced.
        base_model: hub id or directory of the base in transformers' layout, for the notes in the
            adapter (peft does not need it to load).

    Returns:
        ``out_dir``.

    Raises:
        CheckpointError: no adapter there, a kind other than LoRA, or tensors that have no place in
            transformers' model, with their names.
    """
    source, out = Path(source_dir).expanduser(), Path(out_dir).expanduser()
    config = _read_config(source)
    tensors = _folded(_renamed(_read_tensors(source, "adapter_model"), _read_whole(source)), config)
    template = _chat_template(source)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    converted = _converted_config(config, set(tensors), base_model)
    (out / "adapter_config.json").write_text(json.dumps(converted, indent=2) + "\n")
    (out / "sam4mllm.json").write_text(json.dumps({"format": "sam4mllm"}) + "\n")
    (out / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return out


def _chat_template(source: Path) -> str:
    """A template that gives the token ids of the original code base, if its tokenizer is known.

    LLaVA-NeXT's ``tokenizer_image_token`` tokenizes the texts before and after the image
    separately, and drops the first token of the second part if the first part begins with a start
    token. The template writes a start token too: with a tokenizer that adds its own, the prompt
    begins with two; with one that does not, the newline after the image is lost. The authors save
    the tokenizer beside the adapter; without it, the template has one start token and the newline.
    """
    file = source / "tokenizer.json"
    if not file.exists():
        return CHAT_TEMPLATE
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        raise _unreadable(file, error) from error
    if tokenizer.token_to_id(_START) is None:
        raise CheckpointError(
            f"{file} knows no {_START}", hint="Only adapters over Llama-3 are converted."
        )
    if tokenizer.encode("a").ids[0] == tokenizer.token_to_id(_START):
        return CHAT_TEMPLATE.replace(_START, _START * 2)
    return CHAT_TEMPLATE.replace("<image>\\n", "<image>")


def renamed(name: str) -> str:
    """A module's or parameter's name in transformers' layout.

    Raises:
        CheckpointError: it is not a name of the original code base.
    """
    new = _new_name(name)
    if new is None:
        raise CheckpointError(
            f"{name!r} is no name of the original LLaVA-NeXT code base", hint=_OTHER_CODE_BASE
        )
    return new


def _new_name(name: str) -> str | None:
    for pattern, replacement in _RENAMES:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return None


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _renamed(adapter: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors below peft's root, under transformers' names."""
    strange = [key for key in adapter if not key.startswith(_ROOT)]
    names = {key: key.removeprefix(_ROOT) for key in (*adapter, *whole)}
    strange += [key for key, name in names.items() if not _LORA_PART.search(name)
                and not _WHOLE_PART.search(name)]  # fmt: skip
    if strange:
        raise CheckpointError(
            f"{len(strange)} tensors are neither LoRA factors nor weights: {_listed(strange)}",
            hint="Give the folder that peft saved.",
        )
    lost = [name for name in names.values() if _new_name(name) is None]
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors have no place in transformers' LLaVA-NeXT: {_listed(lost)}",
            hint=_OTHER_CODE_BASE,
        )
    twice = [name for name, times in Counter(names.values()).items() if times > 1]
    twice += [key for key in whole if key in adapter]
    if twice:
        raise CheckpointError(
            f"{_listed(twice)}: given twice", hint="Remove the tensor that was not meant."
        )
    found = {names[key]: tensor for key, tensor in (adapter | whole).items()}
    return {_ROOT + re.sub(r"\.base_layer\b", "", renamed(n)): t for n, t in found.items()}


def _folded(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Modules with LoRA factors *and* whole weights get the product added to the weights.

    peft holds a module in one way or the other.
    """
    out = dict(tensors)
    both = [
        key.removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight") and key.replace(".lora_A", "") in tensors
    ]
    if both and (config.get("use_dora") or config.get("alpha_pattern")):
        raise CheckpointError(
            f"{_listed(both)}: whole weights beside LoRA factors with DoRA or an alpha_pattern",
            hint="Only plain LoRA can be added to whole weights.",
        )
    try:
        for module in both:
            down, up = (out.pop(f"{module}.lora_{part}.weight").float() for part in "AB")
            rank = len(down)
            scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
            weight = out[f"{module}.weight"]
            out[f"{module}.weight"] = (weight.float() + scale * (up @ down)).to(weight.dtype)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"the factors of {module} do not fit its weights: {error}",
            hint="Download the adapter again.",
        ) from error
    return out


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
    if config.get("bias", "none") != "none" or config.get("trainable_token_indices"):
        raise CheckpointError(
            f"{file} trains biases or single tokens",
            hint="Only LoRA with bias 'none' is converted.",
        )
    return config


def _read_whole(source: Path) -> dict[str, Tensor]:
    """Weights that were trained whole, where there are any."""
    there = any((source / f"{WHOLE}{end}").exists() for end in (".safetensors", ".bin"))
    return _read_tensors(source, WHOLE) if there else {}


def _read_tensors(source: Path, stem: str) -> dict[str, Tensor]:
    try:
        if (file := source / f"{stem}.safetensors").exists():
            return load_file(file)
        file = source / f"{stem}.bin"
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
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
