"""Random-weight models of further families; see :mod:`random_models`, which builds them."""

from __future__ import annotations

from typing import Any

import transformers as tf
from random_models import (
    _PARTS,
    VISION,
    WIDTH,
    _qwen,
    _text,
    _with_ends,
    byte_tokenizer,
    chatml,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


def gemma_turns(image: str) -> str:
    """Gemma: the system prompt opens the first user turn, texts are trimmed."""
    say = _PARTS.replace("IMAGE", image).replace("{{ p['text'] }}", "{{ p['text'] | trim }}")
    return say + (
        "{{ bos_token }}"
        "{% set first = messages[0]['role'] == 'system' %}"
        "{% for m in (messages[1:] if first else messages) %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{% if loop.first and first %}{{ say(messages[0]) }}\n\n{% endif %}"
        "{{ say(m) }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )


def glm_turns() -> str:
    """GLM: a mask token and a start token, then role tokens; replies end where a role begins."""
    return _PARTS.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>") + (
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ say(m) }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )


def gemma3() -> tuple[Any, Any]:
    """Image tokens attend both ways; newlines around the image; a sliding window."""
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
               "<end_of_image>", "<image_soft_token>"]  # fmt: skip
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
             "image_token": "<image_soft_token>"}  # fmt: skip
    # Gemma's vocabulary holds runs of newlines as tokens: the image's join the template's.
    tokenizer = byte_tokenizer(special, named, numbers=1, joined=["\n\n", "\n\n\n", "\n\n\n\n"])
    token_id = tokenizer.convert_tokens_to_ids
    config = tf.Gemma3Config(
        text_config=_text(
            tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=48,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        vision_config={"image_size": 112, "patch_size": 14, "vision_use_head": False, **VISION},
        mm_tokens_per_image=16, image_token_index=token_id("<image_soft_token>"),
        boi_token_index=token_id("<start_of_image>"), eoi_token_index=token_id("<end_of_image>"),
    )  # fmt: skip
    processor = tf.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 112, "width": 112}), tokenizer,
        image_seq_length=16, chat_template=gemma_turns("<start_of_image>"),
    )  # fmt: skip
    return _with_ends(tf.Gemma3ForConditionalGeneration(config), tokenizer), processor


def gemma4() -> tuple[Any, Any]:
    """As Gemma 3, with shared keys and values, wider global layers and embeddings per layer."""
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|image>", "<image|>",
               "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>"]  # fmt: skip
    named = {
        "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>",
        "boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>",
    }  # fmt: skip
    tokenizer = byte_tokenizer(special, named, numbers=1, joined=["\n\n"])
    token_id = tokenizer.convert_tokens_to_ids
    text = _text(tokenizer, num_hidden_layers=4, head_dim=16)
    config = tf.Gemma4Config(
        text_config={
            **text, "global_head_dim": 32, "sliding_window": 48, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": text["vocab_size"],
        },
        vision_config={**VISION, "num_key_value_heads": 4, "head_dim": 16, "patch_size": 16},
        audio_config=None, image_token_id=token_id("<|image|>"),
        boi_token_id=token_id("<|image>"), eoi_token_id=token_id("<image|>"),
        audio_token_id=token_id("<|audio|>"), video_token_id=token_id("<|video|>"),
    )  # fmt: skip
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(), Gemma4ImageProcessorPil(max_soft_tokens=70), tokenizer,
        tf.Gemma4VideoProcessor(), image_seq_length=70, chat_template=gemma_turns("<|image|>"),
    )  # fmt: skip
    return _with_ends(tf.Gemma4ForConditionalGeneration(config), tokenizer), processor


def glm4v() -> tuple[Any, Any]:
    """GLM-4V and 4.1V."""
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>",
               "<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|begin_of_video|>",
               "<|video|>", "<|end_of_video|>"]  # fmt: skip
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = byte_tokenizer(special, named, numbers=3)
    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5}  # fmt: skip
    config = tf.Glm4vConfig(
        text_config=_text(tokenizer, rope_parameters=rope),
        vision_config={"depth": 2, "hidden_size": 64, "num_heads": 4, "image_size": 112,
                       "out_hidden_size": WIDTH, "intermediate_size": 128},
        image_token_id=token_id("<|image|>"), video_token_id=token_id("<|video|>"),
        image_start_token_id=token_id("<|begin_of_image|>"),
        image_end_token_id=token_id("<|end_of_image|>"),
        video_start_token_id=token_id("<|begin_of_video|>"),
        video_end_token_id=token_id("<|end_of_video|>"),
    )  # fmt: skip
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 2 * 140 * 140}
    processor = tf.Glm4vProcessor(
        Glm4vImageProcessorPil(size=bounds), tokenizer, tf.Glm4vVideoProcessor(),
        chat_template=glm_turns(),
    )  # fmt: skip
    return _with_ends(tf.Glm4vForConditionalGeneration(config), tokenizer), processor


def qwen2_vl() -> tuple[Any, Any]:
    """Qwen2-VL: as 2.5, with its own vision tower."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return _qwen(
        tf.Qwen2VLConfig, tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLProcessor, 14,
        {"rope_parameters": rope}, {"embed_dim": 64, "hidden_size": WIDTH, "mlp_ratio": 2},
    )  # fmt: skip


def qwen3_vl_moe() -> tuple[Any, Any]:
    """Qwen3-VL with experts."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True}  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return _qwen(
        tf.Qwen3VLMoeConfig, tf.Qwen3VLMoeForConditionalGeneration, tf.Qwen3VLProcessor, 16,
        {"head_dim": 16, "rope_parameters": rope, **experts}, {"deepstack_visual_indexes": [0, 1]},
    )  # fmt: skip


def molmo2() -> tuple[Any, Any]:
    """Molmo 2: image tokens attend both ways; the processor puts the start token."""
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|image|>", "<|video|>",
               "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>",
               "<frame_start>", "<frame_end>", "<im_low>"]  # fmt: skip
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = byte_tokenizer(special, named, numbers=1)
    token_id = tokenizer.convert_tokens_to_ids
    narrow = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    config = tf.Molmo2Config(
        text_config={**_text(tokenizer, head_dim=16), "additional_vocab_size": 4},
        vision_config={**VISION, **narrow, "image_size": [112, 112]},
        adapter_config={"vision_feature_layer": [1, 0], "hidden_size": 64, **narrow,
                        "intermediate_size": 128, "text_hidden_size": WIDTH},
        image_start_token_id=token_id("<im_start>"), image_end_token_id=token_id("<im_end>"),
        low_res_image_start_token_id=token_id("<low_res_im_start>"),
        image_patch_id=token_id("<im_patch>"), frame_start_token_id=token_id("<frame_start>"),
        frame_end_token_id=token_id("<frame_end>"),
    )  # fmt: skip
    processor = tf.Molmo2Processor(
        tf.Molmo2ImageProcessor(size={"height": 112, "width": 112}, max_crops=2,
                                overlap_margins=[2, 2]),
        tf.Molmo2VideoProcessor(), tokenizer,
        chat_template=chatml("<|image|>"),
    )  # fmt: skip
    return _with_ends(tf.Molmo2ForConditionalGeneration(config), tokenizer), processor


def paligemma(kind: str = "gemma") -> tuple[Any, Any]:
    """PaliGemma: no turns, no chat template; the whole prompt attends both ways."""
    special = ["<bos>", "<eos>", "<image>"]
    tokenizer = byte_tokenizer(special, {"image_token": "<image>"}, numbers=1)
    pictures = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(pictures, tokenizer)  # adds its location tokens
    text = _text(tokenizer, model_type=kind, head_dim=16, hidden_activation="gelu_pytorch_tanh")
    if kind == "gemma2":
        text |= {"sliding_window": 24, "query_pre_attn_scalar": 16}
    config = tf.PaliGemmaConfig(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14,
                       "vision_use_head": False, "projection_dim": WIDTH, **VISION},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=WIDTH,
    )  # fmt: skip
    return _with_ends(tf.PaliGemmaForConditionalGeneration(config), tokenizer), processor


def paligemma2() -> tuple[Any, Any]:
    """PaliGemma 2: over Gemma 2, with a sliding window in every other layer."""
    return paligemma("gemma2")


BUILDERS = {
    "gemma3": gemma3, "gemma4": gemma4, "glm4v": glm4v, "qwen2_vl": qwen2_vl,
    "qwen3_vl_moe": qwen3_vl_moe, "molmo2": molmo2,
    "paligemma": paligemma, "paligemma2": paligemma2,
}  # fmt: skip
