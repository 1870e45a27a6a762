"""The shipped MLLM before training: tokenizer, processor and an untrained LLaVA.

All parts are transformers classes, so the saved model loads with plain ``AutoProcessor`` and
``AutoModelForImageTextToText``. Small models ground badly when a coordinate is three digits,
so ``000``…``999`` are single tokens, as in Llama-3's tokenizer; and because the published
questions are long and always the same, each of their fixed parts is a single token as well.
Any other text falls back to words, and unknown words to bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sam4mllm_tool.formats.sam4mllm import NO_TARGET, STEPS, SYSTEM_PROMPT, Sam4MllmFormat
from sam4mllm_tool.types import Box, Point, TargetCount

PAD, START, END, IMAGE, USER, ASSISTANT = (
    "<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>",
)  # fmt: skip
SPECIAL_TOKENS = (PAD, START, END, IMAGE, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""``<s>SYSTEM<|user|><image>QUESTION<|assistant|>\\nREPLY</s><|user|>…``: the image comes before
the text of its turn. The newline before a reply belongs to the template (the weights were made
with it); the text of a reply has none."""
CAUTION = (
    "demo models: they know drawn scenes only, and their results on photographs are meaningless; "
    "name a real checkpoint with from_pretrained(…) or --mllm and --sam"
)
LONGEST_LIST = 16
"""Maximum number of points in a round-2 question of the lessons."""


@dataclass(frozen=True)
class BaseShape:
    """Sizes of the model; the defaults are those of the shipped one.

    Attributes:
        image_size: side of the square picture the model sees, pixels.
        patch_size: side of a patch, pixels.
        vision_width, vision_layers, vision_inner: of the vision transformer and its MLP.
        text_width, text_layers, text_inner: of the Llama decoder and its MLP.
        head_width: of an attention head, in both.
        rope_theta: with 16 rotary pairs per head, ``5**16`` makes each pair five times slower than
            the one before. A listed point is five tokens and an answer is one, so pair ``j`` turns
            from answer to answer as much as pair ``j + 1`` turns from point to point.
    """

    image_size: int = 144
    patch_size: int = 12
    vision_width: int = 192
    vision_layers: int = 5
    vision_inner: int = 512
    text_width: int = 256
    text_layers: int = 5
    text_inner: int = 512
    head_width: int = 32
    rope_theta: float = float(5**16)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


def fixed_parts() -> list[str]:
    """The parts of prompts and replies that never change, longest first."""
    form, size = Sam4MllmFormat(), (STEPS, STEPS)
    mark, box = "\0", Box(0, 0, 1, 1)
    parts = {SYSTEM_PROMPT, NO_TARGET, '".', ":\n"}
    for count in TargetCount:
        parts.add(form.ask_boxes(mark, count, size).split(mark)[0])
        asked = form.ask_box_and_points(mark, count, 1, 2, size).split(mark)[0]
        parts.update(re.split(r"(?<=, )1|2(?= off)", asked))
    parts.add(form.ask_points("", box, [Point(0, 0)], size).split("[")[0])
    before, after = form.ask_verification(mark, box, size).split(mark)[0].split("[000,000,001,001]")
    parts.update((before, after))
    return sorted(parts, key=lambda part: (-len(part), part))


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole fixed parts, whole words, numbers, and bytes for all else.

    Args:
        words: words that become single tokens, with and without a leading space.
    """
    parts = fixed_parts()
    pattern = "|".join(
        [*map(re.escape, parts), "Yes|No", r"\d{3}", r"\d", r" ?\p{L}+", r" ?[^\s\p{L}\d]", r"\s"]
    )
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])
    known = sorted({word for text in words for word in re.findall(r"[^\W\d_]+", text)})
    whole = [f"{number:03d}" for number in range(STEPS)]
    whole += [*parts, "Yes", "No", "\n", " ", " [", " ("]
    whole += [space + word for word in known for space in ("", " ")]
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for text in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map(_byte_text, whole)]:
        vocabulary.setdefault(text, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "reply_token": ASSISTANT},
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, shape: BaseShape) -> LlavaProcessor:
    """The processor: resizes pictures to the model's square with Pillow; has the chat template."""
    pictures = SiglipImageProcessorPil(
        size={"height": shape.image_size, "width": shape.image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, shape: BaseShape
) -> LlavaForConditionalGeneration:
    """A LLaVA of that shape with the random initial weights of transformers."""
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_inner,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_width // shape.head_width,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=shape.text_width,
        intermediate_size=shape.text_inner,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_width // shape.head_width,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=shape.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def shape_of(model: LlavaForConditionalGeneration) -> BaseShape:
    """The sizes of a model."""
    vision, text = model.config.vision_config, model.config.text_config
    return BaseShape(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision_inner=vision.intermediate_size,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_inner=text.intermediate_size,
        head_width=text.head_dim,
        rope_theta=text.rope_parameters["rope_theta"],
    )


def save_base(
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    vocabulary: Sequence[str],
    world: str,
    shape: BaseShape,
) -> None:
    """Write model (half precision), processor and ``sam4mllm.json`` into ``folder``.

    The model's own weights are not changed: a copy is written.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    dtype = model.config.dtype
    model.config.dtype = torch.float16
    model.save_pretrained(folder, state_dict=weights)
    model.config.dtype = dtype
    processor.save_pretrained(folder)
    about = {
        "format": Sam4MllmFormat().name,
        "lower_case": True,
        "points_per_question": LONGEST_LIST,
        "verification": "posterior",
        "caution": CAUTION,
        "vocabulary": list(vocabulary),
        "world": world,
        "shape": asdict(shape),
    }
    (folder / "sam4mllm.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _byte_text(text: str) -> str:
    """Text in the byte-level alphabet, in which a space is ``Ġ``."""
    return "".join(
        piece
        for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    )
