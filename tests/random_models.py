"""Small random-weight models of the families the local engine claims, with their processors.

Everything is built offline from transformers' own classes: the architecture, the processor, the
image processor and the shape of the chat template are a family's; sizes, vocabulary and weights
are not. Weights are drawn wide enough that logits depend on what was read, and so that near-ties,
where rounding alone decides, are rare.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from sam4mllm_tool.types import RgbImage

FAMILIES = (
    "llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "qwen3_5",
    "gemma3", "gemma4", "glm4v", "qwen2_vl", "qwen3_vl_moe", "molmo2",
)  # fmt: skip
WIDTH, LAYERS, HEADS, KV_HEADS, INNER = 64, 3, 4, 2, 128
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
_WORDS = ["Yes", "No", "yes", "no", "user", "assistant", "system", "points", "object", "box"]


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a checkpoint of that family into ``folder``."""
    torch.manual_seed(seed)
    from more_random_models import BUILDERS as more  # which takes its parts from here

    model, processor = (_BUILDERS | more)[family]()
    randomise(model, seed)
    louden(model, processor.tokenizer)
    tf.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def randomise(model: Any, seed: int) -> None:
    """Weights whose logits spread: each matrix keeps its input's scale, embeddings are wide."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        wide = "embed_tokens" in name or "lm_head" in name
        std = 0.5 if wide else 1.2 / weight[0].numel() ** 0.5
        weight.data.normal_(0.0, std, generator=generator)


def louden(model: Any, tokenizer: Any) -> None:
    """Let "Yes" and "No" take a good part of the probability, so that comparing it means much."""
    rows = [tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No")]
    model.get_output_embeddings().weight.data[rows] *= 4


def picture(seed: int, size: tuple[int, int] | None = None) -> RgbImage:
    """A random picture, smooth enough to survive resizing, at a random size."""
    rng = np.random.default_rng(seed)
    width, height = size or (int(rng.integers(40, 160)), int(rng.integers(40, 160)))
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return RgbImage.from_pil(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    )


def expression(rng: random.Random) -> str:
    """A few random words."""
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(4))


def byte_tokenizer(
    special: list[str], named: dict[str, str], numbers: int, joined: Sequence[str] = ()
) -> Any:
    """Byte-level, with ``numbers``-digit numbers as tokens, as Llama-3 (3) and Qwen (1) have.

    ``joined``: runs of newlines that are tokens of their own, as Gemma has.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = [f"{n:0{digits}d}" for digits in range(2, numbers + 1) for n in range(10**digits)]
    merges = _merges([*whole, *_WORDS, *(run.replace("\n", "Ċ") for run in joined)])
    merges += [("Ġ", word) for word in _WORDS]
    pieces = [*special, *alphabet, *(left + right for left, right in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    # A piece that is a token is one token (as with Llama-3): else 863 would be 8 and 63.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    pattern = rf"\p{{N}}{{1,{numbers}}}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\n+|\s"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, special, named)


def sentencepiece_like_tokenizer(special: list[str], named: dict[str, str]) -> Any:
    """Words behind ``▁``, single digits, bytes for all else, as Llama-2 has."""
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *'0123456789,.:;[]()"']
    pieces += [form for word in _WORDS for form in (word, "▁" + word)]
    pieces += [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    vocabulary: dict[str, int] = {}
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = _merges(_WORDS) + [("▁", word) for word in _WORDS]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=special[0])
    )  # fmt: skip
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return _fast(backend, special, named)


def _merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that build each text from the left."""
    pairs = ((text[:i], text[i]) for text in texts for i in range(1, len(text)))
    return list(dict.fromkeys(pairs))


def _fast(backend: Tokenizer, special: list[str], named: dict[str, str]) -> Any:
    backend.add_special_tokens(special)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[0],
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )


_PARTS = (
    "{% macro say(m) %}{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endmacro %}"
)


def chatml(image: str) -> str:
    """ChatML, as Qwen-VL and InternVL have it."""
    return _PARTS.replace("IMAGE", image) + (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ say(m) }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def vicuna() -> str:
    """Roles in plain words, as LLaVA-1.5 has it; the template writes no start token."""
    return _PARTS.replace("IMAGE", "<image>\n") + (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ say(m) }} "
        "{% elif m['role'] == 'user' %}USER: {{ say(m) }} "
        "{% else %}ASSISTANT: {{ say(m) }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def headers() -> str:
    """Header tokens, as LLaVA-NeXT over Llama-3 has it."""
    return _PARTS.replace("IMAGE", "<image>\n") + (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ say(m) }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )


def utterances() -> str:
    """Role words and an end-of-utterance token, as Idefics3 and SmolVLM have it."""
    return _PARTS.replace("IMAGE", "<image>") + (
        "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
        "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
        "{{ say(m) }}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 3, "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": 8192,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **more,
    }  # fmt: skip


def _with_ends(model: Any, tokenizer: Any) -> Any:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def _llava() -> tuple[Any, Any]:
    special = ["<s>", "</s>", "<image>"]
    tokenizer = sentencepiece_like_tokenizer(special, {"image_token": "<image>"})
    vision = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, **VISION}
    config = tf.LlavaConfig(
        vision_config={**vision, "projection_dim": 64},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    side = {"height": 56, "width": 56}
    processor = tf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=side), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=vicuna(),
    )  # fmt: skip
    return _with_ends(tf.LlavaForConditionalGeneration(config), tokenizer), processor


def _llava_next() -> tuple[Any, Any]:
    special = ["<|begin_of_text|>", "<|eot_id|>", "<image>", "<|start_header_id|>",
               "<|end_header_id|>"]  # fmt: skip
    tokenizer = byte_tokenizer(special, {"image_token": "<image>"}, numbers=3)
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    vision = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, **VISION}
    config = tf.LlavaNextConfig(
        vision_config={**vision, "projection_dim": 64},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    side = {"height": 56, "width": 56}
    processor = tf.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size=side, image_grid_pinpoints=pinpoints
        ),
        tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=headers(),
    )  # fmt: skip
    return _with_ends(tf.LlavaNextForConditionalGeneration(config), tokenizer), processor


_QWEN_SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>",
                 "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip


def _qwen(
    config_class: Any, model_class: Any, processor_class: Any, patch: int, text: dict[str, Any],
    vision: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = byte_tokenizer(_QWEN_SPECIAL, named, numbers=1)
    token_id = tokenizer.convert_tokens_to_ids
    config = config_class(
        text_config=_text(tokenizer, **text),
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
                       "out_hidden_size": WIDTH, "patch_size": patch, **vision},
        image_token_id=token_id("<|image_pad|>"), video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )  # fmt: skip
    side = 2 * patch
    bounds = {"shortest_edge": 4 * side * side, "longest_edge": 24 * side * side}
    video = tf.Qwen2VLVideoProcessor if patch == 14 else tf.Qwen3VLVideoProcessor
    processor = processor_class(
        Qwen2VLImageProcessorPil(patch_size=patch, size=bounds),
        tokenizer, video(),
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return _with_ends(model_class(config), tokenizer), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return _qwen(
        tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLProcessor, 14,
        {"rope_parameters": rope}, {"fullatt_block_indexes": [1], "window_size": 56},
    )  # fmt: skip


def _qwen3_vl() -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True}  # fmt: skip
    return _qwen(
        tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLProcessor, 16,
        {"head_dim": 16, "rope_parameters": rope}, {"deepstack_visual_indexes": [0, 1]},
    )  # fmt: skip


def _qwen3_5() -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True, "partial_rotary_factor": 1.0}  # fmt: skip
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
              "linear_value_head_dim": 16}  # fmt: skip
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    return _qwen(
        tf.Qwen3_5Config, tf.Qwen3_5ForConditionalGeneration, tf.Qwen3VLProcessor, 16,
        {"head_dim": 16, "rope_parameters": rope, "layer_types": kinds, **linear}, {},
    )  # fmt: skip


def _internvl() -> tuple[Any, Any]:
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>",
               "<video>"]  # fmt: skip
    named = {"start_image_token": "<img>", "end_image_token": "</img>",
             "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}  # fmt: skip
    tokenizer = byte_tokenizer(special, named, numbers=1)
    config = tf.InternVLConfig(
        vision_config={"image_size": [56, 56], "patch_size": [14, 14], **VISION},
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    processor = tf.InternVLProcessor(
        GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=True,
                                 max_patches=4),
        tokenizer, tf.InternVLVideoProcessor(), image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )  # fmt: skip
    return _with_ends(tf.InternVLForConditionalGeneration(config), tokenizer), processor


def _idefics_tokenizer() -> Any:
    special = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>",
               "<global-img>", "<video>"]  # fmt: skip
    special += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
             "global_image_token": "<global-img>", "video_token": "<video>",
             "end_of_utterance_token": "<end_of_utterance>"}  # fmt: skip
    return byte_tokenizer(special, named, numbers=3)


def _idefics(config_class: Any, model_class: Any, make: Callable[[Any], Any]) -> tuple[Any, Any]:
    tokenizer = _idefics_tokenizer()
    config = config_class(
        vision_config={"image_size": 56, "patch_size": 14, **VISION},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return _with_ends(model_class(config), tokenizer), make(tokenizer)


def _idefics3() -> tuple[Any, Any]:
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    return _idefics(
        tf.Idefics3Config, tf.Idefics3ForConditionalGeneration,
        lambda tokenizer: tf.Idefics3Processor(
            Idefics3ImageProcessorPil(**sizes), tokenizer, image_seq_len=4,
            chat_template=utterances(),
        ),
    )  # fmt: skip


def _smolvlm() -> tuple[Any, Any]:
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    return _idefics(
        tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration,
        lambda tokenizer: tf.SmolVLMProcessor(
            SmolVLMImageProcessorPil(**sizes), tokenizer, tf.SmolVLMVideoProcessor(),
            image_seq_len=4, chat_template=utterances(),
        ),
    )  # fmt: skip


_BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl,
    "internvl": _internvl, "idefics3": _idefics3, "smolvlm": _smolvlm, "qwen3_5": _qwen3_5,
}  # fmt: skip
