"""A trained base at a higher resolution: ``python -m recipes.embedded_mllm.resize OUT --scenes …``.

Patches keep their size in pixels, so there are more of them. Their features must keep their
meaning: stage 1's heads are fitted on the old tower, and ``vision_train --heads`` then trains the
new tower to satisfy them, so that the decoder can use the features as before.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from recipes.embedded_mllm.model import build_model, shape_of
from recipes.embedded_mllm.vision import DenseHeads
from recipes.embedded_mllm.vision_train import fit_heads
from recipes.embedded_mllm.world import questions_of
from sam4mllm_tool import embedded
from sam4mllm_tool.scenes.world import WORLDS


def merged(base: Path, adapter: Path | None) -> LlavaForConditionalGeneration:
    """The base in full precision, with its adapter's weights added to it."""
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def resized(model: LlavaForConditionalGeneration, tokenizer: Any, image_size: int) -> Any:
    """The same weights for another picture size; the position embeddings are interpolated."""
    old = shape_of(model)
    new = replace(old, image_size=image_size)
    finer = build_model(tokenizer, new)
    weights = model.state_dict()
    key = next(name for name in weights if name.endswith("position_embedding.weight"))
    weights[key] = interpolated(weights[key], old.grid, new.grid)
    finer.load_state_dict(weights)
    return finer


def interpolated(codes: Tensor, old: int, new: int) -> Tensor:
    """Position embeddings of one grid, (old², width), interpolated to another: (new², width)."""
    square = codes.T.reshape(1, -1, old, old)
    wide = functional.interpolate(square, (new, new), mode="bicubic", align_corners=False)
    return wide[0].flatten(1).T.contiguous()


def main() -> None:
    """Write the base with the new resolution, and heads fitted on the old one, into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=Path, required=True, help="shards at the old or new size")
    parser.add_argument("--base", type=Path, default=embedded.MLLM)
    parser.add_argument("--adapter", type=Path, default=None)
    parser.add_argument("--image-size", type=int, default=144)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = merged(options.base, options.adapter)
    shape = shape_of(model)
    heads = DenseHeads(shape.vision_width, questions_of(WORLDS["small"]))
    print("heads", fit_heads(options.scenes, model.model.vision_tower, heads, shape), flush=True)
    finer = resized(model, AutoTokenizer.from_pretrained(options.base), options.image_size)
    finer.save_pretrained(options.out)
    save_file(heads.state_dict(), options.out / "heads.safetensors")


if __name__ == "__main__":
    main()
