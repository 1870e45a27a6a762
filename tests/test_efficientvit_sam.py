"""EfficientViT-SAM against numbers recorded from the makers' code (mit-han-lab/efficientvit).

``data/efficientvit_sam.json`` holds what their ``EfficientViTSamPredictor`` answered, with the
weights and pictures that this file makes up: logits at the picture's size, predicted IoUs, and
the names and shapes of the weights of all five published sizes.
"""

import hashlib
import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from sam4mllm_tool import embedded
from sam4mllm_tool.cli import app
from sam4mllm_tool.errors import BackendError, CheckpointError, InputError
from sam4mllm_tool.pipeline.model import load
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.segmenter.efficientvit import (
    VARIANTS,
    Stage,
    Variant,
    build_efficientvit_sam,
    variant_of,
)
from sam4mllm_tool.segmenter.segment_anything import SegmentAnythingSegmenter
from sam4mllm_tool.segmenter.weights import filled, overlay
from sam4mllm_tool.types import Box, PointLabel, PromptPoint, RgbImage

RECORD = json.loads((Path(__file__).parent / "data" / "efficientvit_sam.json").read_text())
SIZES = [(300, 200), (121, 333), (512, 512), (1100, 90)]
NARROW = {
    "l": Variant(
        512,
        (
            Stage(8, 1, "plain", 1),
            Stage(16, 1, "fused", 4),
            Stage(24, 1, "fused", 4),
            Stage(32, 1, "inverted", 4),
            Stage(64, 2, "attention", 6),
        ),
        neck_depth=1,
        neck_expansion=1,
    ),
    "xl": Variant(
        1024,
        (
            Stage(8, 0, "plain", 1),
            Stage(8, 1, "fused", 4, 3),
            Stage(16, 1, "fused", 4, 3),
            Stage(24, 1, "fused", 4, 3),
            Stage(32, 1, "attention", 4, 3),
            Stage(64, 1, "attention", 6, 3),
        ),
        neck_depth=1,
        neck_expansion=4,
    ),
}


def weights_like(shapes, salt=""):
    """Weights that depend on their names alone; activations keep their size through the layers."""
    made = {}
    for name, like in shapes.items():
        random = np.random.RandomState(zlib.crc32((salt + name).encode()))
        if not like.is_floating_point():
            made[name] = torch.zeros(like.shape, dtype=like.dtype)
            continue
        values = torch.from_numpy(random.standard_normal(tuple(like.shape)).astype(np.float32))
        if name.endswith("running_var"):
            values = torch.exp(0.2 * values)
        elif like.dim() > 1 and "positional" not in name:
            values *= (2 * like.shape[0] / like.numel()) ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.2 * values
        elif like.dim() == 1:
            values *= 0.2
        made[name] = values
    return made


def picture(width, height) -> RgbImage:
    """Waves of different lengths along both axes in the three channels."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    waves = [np.sin(9 * x + 2) + np.cos(4 * y), np.cos(23 * x * y), np.sin(5 * y + 14 * x * x)]
    pixels = np.stack([60 * wave + 125 for wave in waves], axis=-1).clip(0, 255).astype(np.uint8)
    return RgbImage.from_pil(Image.fromarray(pixels))


def prompts(width, height) -> list[SegmentPrompt]:
    """A box; a box with points; a point alone; each at other places along x than along y."""
    on = PromptPoint(0.4 * width, 0.2 * height, PointLabel.FOREGROUND)
    off = PromptPoint(0.8 * width, 0.45 * height, PointLabel.BACKGROUND)
    box = Box(0.3 * width, 0.1 * height, 0.9 * width, 0.5 * height)
    return [
        SegmentPrompt(Box(0.1 * width, 0.2 * height, 0.7 * width, 0.63 * height)),
        SegmentPrompt(box, (on, off)),
        SegmentPrompt(points=(PromptPoint(0.77 * width, 0.13 * height, PointLabel.FOREGROUND),)),
    ]


def places(width, height) -> list[tuple[int, int]]:
    """(row, column) of the pixels whose logits are recorded."""
    shares = [(0.05, 0.9), (0.3, 0.2), (0.5, 0.55), (0.72, 0.33), (0.97, 0.08)]
    return [(int(row * height), int(column * width)) for row, column in shares]


def answers(segmenter, image):
    """What is recorded, of each prompt and then of each prompt with its first mask as a further
    one: logits of three masks at the places, and predicted IoUs."""
    asked = prompts(image.width, image.height)
    first = segmenter.predict(image, asked)
    again = [
        SegmentPrompt(prompt.box, prompt.points, found[0].logits)
        for prompt, found in zip(asked, first, strict=True)
    ]
    found = [*first, *segmenter.predict(image, again)]
    rows, columns = zip(*places(image.width, image.height), strict=True)
    return [
        [
            [*segmenter.logits_at_image_size(image, mask.logits)[rows, columns], mask.predicted_iou]
            for mask in masks
        ]
        for masks in found
    ]


def shapes_of(variant):
    with torch.device("meta"):
        return build_efficientvit_sam(variant).state_dict()


@cache
def weights_of(name):
    return weights_like(shapes_of(NARROW[name]))


def narrow(name, tuned=False):
    variant = NARROW[name]
    own = {key: value.clone() for key, value in weights_of(name).items()}
    sam = filled(lambda: build_efficientvit_sam(variant), own, name)
    if tuned:
        overlay(sam, tuned_decoder(variant), "decoder.pt")
    return SegmentAnythingSegmenter(sam)


def tuned_decoder(variant):
    """A mask decoder as SAM4MLLM's authors publish theirs: its keys begin with ``model.``."""
    part = {name: v for name, v in shapes_of(variant).items() if name.startswith("mask_decoder.")}
    return {f"model.{name}": value for name, value in weights_like(part, "tuned").items()}


# --- the same masks -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", NARROW)
def test_logits_are_the_makers(name, size):
    recorded = RECORD["narrow"][name][SIZES.index(size)]
    np.testing.assert_allclose(answers(narrow(name), picture(*size)), recorded, rtol=0, atol=1e-4)


def test_logits_are_the_makers_with_a_decoder_laid_over():
    segmenter = narrow("l", tuned=True)
    found = answers(segmenter, picture(*SIZES[0]))
    np.testing.assert_allclose(found, RECORD["tuned"], rtol=0, atol=1e-4)


def test_a_published_size_from_its_file(tmp_path):
    """L0 in full, wrapped as published, under a name that tells nothing; a decoder over it."""
    weights = weights_like(shapes_of(VARIANTS["l0"]))
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    torch.save(tuned_decoder(VARIANTS["l0"]), tmp_path / "decoder.pt")
    segmenter = load_segmenter(
        tmp_path / "weights.pt", decoder=tmp_path / "decoder.pt", device="cpu"
    )
    assert isinstance(segmenter, Segmenter) and segmenter.name == "weights.pt"
    found = answers(segmenter, picture(*SIZES[1]))
    np.testing.assert_allclose(found, RECORD["l0"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_have_the_published_names_and_shapes(name):
    shapes = shapes_of(VARIANTS[name])
    listed = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in shapes.items()))
    digest = hashlib.sha256(listed.encode()).hexdigest()
    assert [len(shapes), digest] == RECORD["weights"][name]
    assert variant_of(shapes) is VARIANTS[name]


def test_bfloat16_masks_stay_close():
    """With random weights only the embedding says something about the encoder's precision."""
    exact, rough = narrow("l"), narrow("l")
    rough._sam.image_encoder.to(torch.bfloat16)
    rough = SegmentAnythingSegmenter(rough._sam)
    image = picture(*SIZES[0])
    one, other = exact._encode(image).flatten(), rough._encode(image).flatten()
    assert other.dtype == torch.float32
    assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.999


def test_nan_weights_are_no_empty_mask():
    segmenter = narrow("l")
    segmenter._sam.image_encoder.neck.middle.op_list[0].main.spatial_conv.conv.weight[3] = np.nan
    with pytest.raises(BackendError, match="not finite"):
        segmenter.predict(picture(*SIZES[0]), prompts(*SIZES[0]))


# --- files ----------------------------------------------------------------------------------------


def small_file(name, path, change=lambda weights: weights, wrap=lambda weights: weights):
    """A checkpoint whose tensors repeat one number, which takes no room."""
    weights = {
        key: torch.ones((), dtype=value.dtype).expand(value.shape)
        for key, value in shapes_of(VARIANTS[name]).items()
    }
    torch.save(wrap(change(weights)), path)
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_the_size_is_recognised_from_the_file(name, tmp_path):
    segmenter = load_segmenter(small_file(name, tmp_path / "sam.pt"), device="cpu")
    assert segmenter._sam.image_encoder.img_size == (512 if name.startswith("l") else 1024)
    assert segmenter.logits_shape == (256, 256)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_state_dicts(wrapper, tmp_path):
    path = small_file("l0", tmp_path / "l0.pt", wrap=lambda weights: {wrapper: weights})
    load_segmenter(path, device="cpu")


def without(weights, beginning):
    return {key: value for key, value in weights.items() if not key.startswith(beginning)}


LAST = "image_encoder.neck.middle.op_list.3."
DAMAGE = {
    "lacks weights of its model: mask_decoder.*in all": lambda w: without(w, "mask_decoder."),
    "has weights that its model does not have: extra": lambda w: w | {"extra": torch.ones(1)},
    r"another size: image_encoder.norm.weight \(3,\) instead of \(256,\)": lambda w: (
        w | {"image_encoder.norm.weight": torch.ones(3)}
    ),
    "5 stages and 3 blocks": lambda w: without(w, LAST),
    "an unknown SAM architecture": lambda w: without(w, "image_encoder.neck"),
    "not tensors: epoch": lambda w: w | {"epoch": 3},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_file_that_does_not_fit_says_what_is_wrong(message, tmp_path):
    path = small_file("l0", tmp_path / "mine.pt", DAMAGE[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        load_segmenter(path, device="cpu")
    assert caught.value.hint
    assert "mine.pt" in caught.value.message or "stages" in message


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_half_a_download(share, tmp_path):
    whole = small_file("l0", tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"half\.pt"):
        load_segmenter(tmp_path / "half.pt", device="cpu")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><p>Confirm", b"version https://git-lfs.x"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_saved_web_page_is_called_that(content, ending, tmp_path):
    path = tmp_path / f"xl1.{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="web page"):
        load_segmenter(path, device="cpu")


# --- decoders laid over ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An L0 whose decoder has room of its own."""
    path = tmp_path_factory.mktemp("base") / "l0.pt"
    return small_file("l0", path, lambda weights: {k: v.clone() for k, v in weights.items()})


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_only_the_decoder_changes(base, ending, tmp_path):
    tuned = tuned_decoder(VARIANTS["l0"])
    if ending == "pt":
        torch.save({"state_dict": tuned}, tmp_path / "decoder.pt")
    else:
        safetensors.torch.save_file(tuned, tmp_path / "decoder.safetensors")
    decoder = str(tmp_path / f"decoder.{ending}")
    loaded = load_segmenter(str(base), device="cpu", decoder=decoder)
    for name, value in loaded._sam.state_dict().items():
        expected = tuned.get(f"model.{name}", torch.ones(()))
        assert torch.equal(value, expected.expand(value.shape).to(value.dtype)), name


BAD_DECODERS = {
    "has weights that its model does not have: lm_head.weight": {
        "lm_head.weight": torch.ones(2, 2)
    },
    r"another size: mask_decoder.mask_tokens.weight \(4, 32\) instead of \(4, 256\)": {
        "model.mask_decoder.mask_tokens.weight": torch.ones(4, 32)
    },
    "contains no state dict": {},
    "not tensors: state": {"state": 3},
}


@pytest.mark.parametrize("message", BAD_DECODERS)
def test_a_decoder_that_does_not_fit(base, message, tmp_path):
    torch.save(BAD_DECODERS[message], tmp_path / "decoder.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_segmenter(base, decoder=tmp_path / "decoder.pt", device="cpu")
    assert "decoder.pt" in caught.value.message and caught.value.hint


def test_decoders_that_cannot_be_laid_over(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"no SAM checkpoint at .*absent\.pt"):
        load_segmenter(base, decoder=tmp_path / "absent.pt", device="cpu")
    torch.save(tuned_decoder(VARIANTS["l0"]), tmp_path / "decoder.pt")
    with pytest.raises(CheckpointError, match="another size"):
        load_segmenter("embedded", decoder=tmp_path / "decoder.pt", device="cpu")
    with pytest.raises(CheckpointError, match="transformers checkpoint"):
        load_segmenter(tmp_path, decoder=tmp_path / "decoder.pt", device="cpu")


def test_a_misspelt_option_is_named():
    with pytest.raises(InputError, match="decodr") as caught:
        load(segmenter="absent.pt", segmenter_options={"decodr": "decoder.pt"})
    assert "'decoder'" in caught.value.hint


@pytest.mark.parametrize("dtype", ["float16", "int8", "bf16"])
def test_dtypes_that_are_refused(base, dtype):
    with pytest.raises(CheckpointError, match=r"float16|dtype") as caught:
        load_segmenter(base, dtype=dtype, device="cpu")
    assert "bfloat16" in caught.value.hint


@pytest.mark.parametrize("command", [("segment", "DEMO", "the tree"), ("eval", "sam")])
def test_the_command_line_takes_a_decoder(command, base, tmp_path):
    """Laid over as in Python: one that does not fit is named."""
    arguments = [str(embedded.DEMO / "demo.png") if part == "DEMO" else part for part in command]
    torch.save({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    arguments += ["--sam", str(base), "--sam-decoder", str(tmp_path / "other.pt")]
    caught = CliRunner().invoke(app, [*arguments, "--device", "cpu"]).exception
    assert isinstance(caught, CheckpointError) and "other.pt" in caught.message
