"""Checkpoints into memory, or a clear error if files are missing, damaged or of the wrong kind."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PaliGemmaProcessor,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import BitsAndBytesConfig

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.mllm import files
from sam4mllm_tool.mllm.files import find_checkpoint
from sam4mllm_tool.mllm.placement import Placement, cache_room, too_small

TEMPLATE_FILE = "chat_template.jinja"
_CONTROL = re.compile(r"<\|\w+\|>")
# PaliGemma has no turns: its prompt is the picture and one question; its processor adds the start
# token and the line break.
_ONE_QUESTION = (
    "<image>{% for part in messages[-1]['content'] if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endfor %}"
)


def load_model(folder: Path, placement: Placement) -> Any:
    """An image-text-to-text model in eval mode.

    Raises:
        CheckpointError: missing, corrupt or of the wrong kind.
        DeviceOutOfMemory: more weights than the device has room for.
    """
    files.check_texts(folder)
    config = _read_config(folder)
    cache_room(folder, placement, None)
    try:
        with _no_progress_bar():
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **_options(placement),
            )
    except torch.OutOfMemoryError as error:
        raise too_small(str(error)) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"the model in {folder} cannot be loaded: {error}",
            hint="The directory must hold a whole transformers image-text-to-text checkpoint "
            "with safetensors weights.",
        ) from error
    _check_report(folder, report)
    model.generation_config = _greedy(model.generation_config)
    return model.eval()


def _options(placement: Placement) -> dict[str, Any]:
    """How ``from_pretrained`` shall hold the weights.

    Each tensor goes from its file straight to its device: a whole model in the host's memory on
    the way there may be more than the host has.
    """
    options: dict[str, Any] = {"dtype": placement.dtype}
    if placement.attn_implementation:
        options["attn_implementation"] = placement.attn_implementation
    if placement.quantization:
        options["quantization_config"] = _quantization(placement)
    if placement.device_map is not None:
        options["device_map"] = placement.device_map
    elif placement.quantization or placement.device.type != "cpu":
        options["device_map"] = {"": placement.device}
    return options


def _greedy(config: GenerationConfig) -> GenerationConfig:
    """The checkpoint's token ids without its sampling settings.

    Replies and probabilities are those of the model's raw distribution, which is what SAM4MLLM's
    thresholds are about. A repetition penalty (Qwen asks for 1.05) would make a coordinate less
    likely because it occurred before.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name, None) for name in names})


def load_processor(folder: Path, adapter: Path | None = None) -> Any:
    """The checkpoint's processor, with Pillow's resampling: the same pixels on all machines.

    An adapter was trained with one dialogue template: a chat template beside it replaces the
    base's.

    Raises:
        CheckpointError: missing, cut short, or not a processor for images and text; a template
            that does not fit its tokenizer.
    """
    files.check_texts(folder)
    try:
        options = {"trust_remote_code": False, "local_files_only": True}
        processor = AutoProcessor.from_pretrained(folder, **options)
        # Loaded separately: video processors have no such backend and would refuse.
        pictures = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    except Exception as error:
        raise CheckpointError(
            f"the processor in {folder} cannot be loaded: {error}",
            hint="The directory needs the processor's and tokenizer's files.",
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise CheckpointError(
            f"{folder} holds no processor for images and text",
            hint="The checkpoint must be an image-text-to-text chat model.",
        )
    processor.image_processor = pictures
    if isinstance(processor, PaliGemmaProcessor) and not processor.chat_template:
        processor.chat_template = _ONE_QUESTION
    if adapter is not None and (file := adapter / TEMPLATE_FILE).is_file():
        processor.chat_template = _fitting_template(file, processor.tokenizer)
    return processor


def _fitting_template(file: Path, tokenizer: Any) -> str:
    """A chat template all of whose control tokens are tokens of this vocabulary."""
    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}", hint="Convert or download the adapter again."
        ) from error
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in _CONTROL.findall(template) if token not in vocabulary]
    if unknown:
        raise CheckpointError(
            f"{file} writes {unknown[0]}, which is no token of this base",
            hint="The adapter was made for another base; name that one.",
        )
    return template


def load_adapter(model: Any, name: str, *, merge: bool) -> Any:
    """The model with a PEFT adapter's layers in place, live or merged into its weights.

    Raises:
        CheckpointError: missing, corrupt, or made for another model.
    """
    from peft import PeftConfig, PeftModel

    folder = find_checkpoint(name)
    files.check_texts(folder)
    files.whole_weights([folder / "adapter_model.safetensors"])
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ValueError("prompt-learning adapters have no place in a shared prefix")
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(folder))
        loaded = adapted.load_adapter(str(folder), "default")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter in {folder} cannot be loaded: {error}",
            hint="The adapter must have been saved by peft over this base model; "
            "'sam4mllm-tool convert-adapter' converts published SAM4MLLM adapters.",
        ) from error
    lost = [k for k in loaded.missing_keys if "lora_" in k or "modules_to_save" in k]
    strange = list(loaded.unexpected_keys)
    if lost or strange:
        what = f"lacks {len(lost)} weights" if lost else f"has {len(strange)} others"
        raise CheckpointError(
            f"the adapter in {folder} does not fit this model: it {what}, first "
            f"{(lost or strange)[0]}",
            hint="Name the base that it was made for; 'sam4mllm-tool convert-adapter' converts "
            "published SAM4MLLM adapters.",
        )
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def _read_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no configuration that can be read: {error}",
            hint="Give the directory that holds the checkpoint's config.json.",
        ) from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise CheckpointError(
            f"{folder} holds a {config.model_type!r} model, which does not chat about images",
            hint="Give an image-text-to-text checkpoint; a SAM checkpoint goes to the segmenter.",
        )
    return config


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or ())
    wrong = sorted(map(str, report.get("mismatched_keys") or ()))
    if missing or wrong:
        first = (missing + wrong)[0]
        raise CheckpointError(
            f"{len(missing) + len(wrong)} weights in {folder} are missing or of the wrong shape, "
            f"first {first}",
            hint="config.json and weights do not belong together; download the checkpoint again.",
        )


def _quantization(placement: Placement) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "quantization needs bitsandbytes", hint="pip install bitsandbytes"
        ) from error
    if placement.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=placement.dtype,
        llm_int8_skip_modules=None,
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing progress bars on the caller's terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide a deprecation that users cannot act on.

    To add layers, peft 0.21 reads a property of the model that transformers 5.24 has renamed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
