"""Each transformers SAM family, small and with random weights, against its own processor and model.

A picture holds one bright patch. Where the patch lands in the model's input, where a point on it
is told to the prompt encoder, and where logits planted there come back to must agree.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as tf
from PIL import Image
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as MASK_GENERATION_NAMES,
)

from sam4mllm_tool.errors import CheckpointError, ImageError
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.segmenter.transformers_sam import FAMILIES
from sam4mllm_tool.types import Box, PointLabel, PromptPoint, RgbImage

SIZES = [(200, 60), (45, 170), (96, 96), (301, 303)]
FOREGROUND, BACKGROUND = PointLabel.FOREGROUND, PointLabel.BACKGROUND

DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
LEVELS = {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "fpn_hidden_size": 32}
HIERA = {
    "model_type": "sam2_vision_model",
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [128, 128],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    },
    "backbone_channel_list": [64, 32, 16, 8],
    **LEVELS,
}
PERCEPTION = {
    "model_type": "sam3_vision_model",
    "backbone_config": {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": 56,
    },
    **LEVELS,
}
REPVIT = {
    "model_type": "edgetam_vision_model",
    "backbone_config": {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1",
        "num_classes": 2,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    },
    "backbone_channel_list": [384, 192, 96, 48],
    **LEVELS,
}
VIT = {
    "hidden_size": 32,
    "output_channels": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "mlp_dim": 64,
    "window_size": 3,
    "global_attn_indexes": [1],
    "num_pos_feats": 16,
}


def prompts_of(side: int, patch: int) -> dict:
    return {"hidden_size": 32, "image_size": side, "patch_size": patch}


def square(side: int) -> dict:
    return {"size": {"height": side, "width": side}}


PAD = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
BUILD = {
    "sam": lambda: (
        tf.SamModel(
            tf.SamConfig(
                vision_config=VIT,
                prompt_encoder_config=prompts_of(64, 8),
                mask_decoder_config=DECODER,
            )
        ),
        tf.SamProcessor(tf.SamImageProcessor(**PAD)),
    ),
    "sam_hq": lambda: (
        tf.SamHQModel(
            tf.SamHQConfig(
                vision_config=VIT,
                prompt_encoder_config=prompts_of(64, 8),
                mask_decoder_config={**DECODER, "vit_dim": 32},
            )
        ),
        tf.SamHQProcessor(tf.SamImageProcessor(**PAD)),
    ),
    "sam2": lambda: (
        tf.Sam2Model(
            tf.Sam2Config(
                vision_config=HIERA,
                prompt_encoder_config=prompts_of(128, 16),
                mask_decoder_config=DECODER,
            )
        ),
        tf.Sam2Processor(tf.Sam2ImageProcessor(**square(128))),
    ),
    "sam3_tracker": lambda: (
        tf.Sam3TrackerModel(
            tf.Sam3TrackerConfig(
                vision_config=PERCEPTION,
                prompt_encoder_config=prompts_of(112, 14),
                mask_decoder_config=DECODER,
            )
        ),
        tf.Sam3TrackerProcessor(tf.Sam3ImageProcessor(**square(112))),
    ),
    "edgetam": lambda: (
        tf.EdgeTamModel(
            tf.EdgeTamConfig(
                vision_config=REPVIT,
                prompt_encoder_config=prompts_of(128, 16),
                mask_decoder_config=DECODER,
            )
        ),
        tf.Sam2Processor(tf.Sam2ImageProcessor(**square(128))),
    ),
}


@pytest.fixture(scope="module", params=BUILD)
def family(request, tmp_path_factory):
    """(segmenter loaded from disk, the family's model, the family's processor)."""
    torch.set_num_threads(1)
    if request.param == "edgetam":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model, processor = BUILD[request.param]()
    for name, parameter in model.named_parameters():  # so that prompts change the masks
        if parameter.dim() > 1 and "vision" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load_segmenter(folder, device="cpu"), model.eval(), processor


def noise(size, seed=0) -> RgbImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return RgbImage.from_pil(Image.fromarray(pixels))


def random_prompt(rng, size, points: int, box: bool, mask_shape=None) -> SegmentPrompt:
    width, height = size
    corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * [width, height]
    return SegmentPrompt(
        box=Box(*corners.ravel().tolist()) if box else None,
        points=tuple(
            PromptPoint(
                float(rng.uniform(0, width)),
                float(rng.uniform(0, height)),
                (BACKGROUND, FOREGROUND)[rng.integers(0, 2)],
            )
            for _ in range(points)
        ),
        mask_logits=None if mask_shape is None else rng.normal(0, 5, mask_shape).astype(np.float32),
    )


def reference(model, processor, image: RgbImage, prompt: SegmentPrompt):
    """The family's documented way: processor, model, post-processing."""
    told = {}
    if prompt.points:
        told["input_points"] = [[[[p.x, p.y] for p in prompt.points]]]
        told["input_labels"] = [[[int(p.label is FOREGROUND) for p in prompt.points]]]
    if prompt.box:
        told["input_boxes"] = [[list(prompt.box)]]
    inputs = processor(images=image.pil, return_tensors="pt", **told)
    sizes = [inputs.pop("original_sizes")]
    if "reshaped_input_sizes" in inputs:
        sizes.append(inputs.pop("reshaped_input_sizes"))
    if prompt.mask_logits is not None:
        inputs["input_masks"] = torch.tensor(prompt.mask_logits)[None, None]
    with torch.no_grad():
        output = model(**inputs, multimask_output=True)
    masks = processor.post_process_masks(output.pred_masks, *sizes)[0][0]
    return masks.numpy(), output.iou_scores[0, 0].numpy(), output.pred_masks[0, 0].numpy()


def assert_close(candidates, expected):
    assert len(candidates) == len(expected[0])
    for candidate, mask, iou, low in zip(candidates, *expected, strict=True):
        np.testing.assert_allclose(candidate.logits, low, atol=1e-4)
        assert candidate.predicted_iou == pytest.approx(float(iou), abs=1e-4)
        assert (candidate.mask.pixels != mask).mean() < 0.001


KINDS = [(1, False, False), (4, False, False), (0, True, False), (3, True, False), (2, True, True)]


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_those_of_the_familys_own_processor_and_model(family, size):
    segmenter, model, processor = family
    assert isinstance(segmenter, Segmenter)
    image, rng = noise(size), np.random.default_rng(1)
    prompts = [
        random_prompt(rng, size, points, box, segmenter.logits_shape if mask else None)
        for points, box, mask in KINDS
    ]
    expected = [reference(model, processor, image, prompt) for prompt in prompts]
    for prompt, one in zip(prompts, expected, strict=True):
        assert_close(segmenter.predict(image, [prompt])[0], one)
    assert len({one[2].tobytes() for one in expected}) == len(KINDS)  # the prompts matter
    assert any(0 < mask.mean() < 1 for one in expected for mask in one[0])


def test_many_prompts_of_each_kind_come_back_in_order(family):
    segmenter, model, processor = family
    image, rng = noise((120, 80)), np.random.default_rng(2)
    prompts = [
        random_prompt(rng, image.size, *kind[:2], segmenter.logits_shape if kind[2] else None)
        for kind in [KINDS[number] for number in rng.integers(0, len(KINDS), 12)]
    ]
    encoded = []
    handle = segmenter._model.vision_encoder.register_forward_hook(lambda *_: encoded.append(1))
    together = segmenter.predict(image, prompts)
    handle.remove()
    assert len(encoded) == 1
    for candidates, prompt in zip(together, prompts, strict=True):
        assert_close(candidates, reference(model, processor, image, prompt))


@pytest.mark.parametrize("size", SIZES)
def test_a_planted_patch_is_found_where_it_is(family, size):
    """Picture, prompt and mask meet in one frame, and come back to the picture's pixels."""
    segmenter, _, _ = family
    model = segmenter._model
    width, height = size
    patch = Box(*(round(v) for v in (width * 0.62, height * 0.2, width * 0.82, height * 0.5)))
    x, y = patch.centre
    pixels = np.zeros((height, width, 3), np.uint8)
    rows, columns = (
        slice(patch.y_min, patch.y_max),
        slice(patch.x_min, patch.x_max),
    )
    pixels[rows, columns] = 255
    seen: dict = {}

    def see_picture(module, args, kwargs):
        seen["picture"] = (kwargs.get("pixel_values") if not args else args[0])[0].mean(0)

    def see_prompt(module, args, kwargs):
        seen["point"] = kwargs["input_points"][0, 0, 0]
        seen["box"] = kwargs["input_boxes"][0, 0]

    def plant(module, args, output):
        logits = torch.full_like(output[0], -9.0)
        scale = torch.tensor(logits.shape[-1] / model.prompt_encoder.input_image_size)
        left, top, right, bottom = (seen["box"] * scale).round().int().tolist()
        logits[..., top:bottom, left:right] = 9.0
        return (logits, *output[1:])

    handles = [
        model.vision_encoder.register_forward_pre_hook(see_picture, with_kwargs=True),
        model.prompt_encoder.register_forward_pre_hook(see_prompt, with_kwargs=True),
        model.mask_decoder.register_forward_hook(plant),
    ]
    prompt = SegmentPrompt(patch, (PromptPoint(x, y, FOREGROUND),))
    (candidates,) = segmenter.predict(RgbImage.from_pil(Image.fromarray(pixels)), [prompt])
    for handle in handles:
        handle.remove()

    bright = seen["picture"] > (seen["picture"].max() + seen["picture"].min()) / 2
    row, column = torch.nonzero(bright).float().mean(0).add(0.5).tolist()
    assert seen["point"].tolist() == pytest.approx([column, row], abs=1.0)
    cell = max(size) / segmenter.logits_shape[0]  # one low-resolution pixel
    for candidate in candidates:
        assert candidate.mask.box == pytest.approx(patch, abs=cell + 1)
        assert candidate.mask.contains(x, y)


def test_masks_can_be_refined(family):
    segmenter, model, processor = family
    image = noise((90, 140))
    first = segmenter.predict(image, [SegmentPrompt(Box(10, 10, 60, 90))])[0][0]
    large = segmenter.logits_at_image_size(image, first.logits)
    assert large.dtype == np.float32 and np.array_equal(large > 0, first.mask.pixels)
    again = SegmentPrompt(Box(10, 10, 60, 90), mask_logits=first.logits)
    assert_close(segmenter.predict(image, [again])[0], reference(model, processor, image, again))
    alone = segmenter.predict(image, [SegmentPrompt(mask_logits=first.logits)])[0]
    assert alone[0].mask.pixels.shape == (140, 90)


def test_half_precision_stays_close(family, tmp_path):
    segmenter, model, processor = family
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    half = load_segmenter(tmp_path, device="cpu", dtype="bfloat16")
    image = noise((90, 60))
    prompt = random_prompt(np.random.default_rng(4), image.size, 2, True, half.logits_shape)
    rough = half.predict(image, [prompt])[0][0].logits
    exact = segmenter.predict(image, [prompt])[0][0].logits
    assert rough.dtype == np.float32 and np.isfinite(rough).all()
    assert np.corrcoef(rough.ravel(), exact.ravel())[0, 1] > 0.99
    dtypes = {name.split(".")[0]: p.dtype for name, p in half._model.named_parameters()}
    assert dtypes.pop("vision_encoder") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}


def test_embeddings_of_all_parts_are_counted(family):
    segmenter, _, _ = family
    image = noise((50, 50))
    segmenter.embed(image)
    floats = sum(t.numel() for t in _flat(segmenter._embeddings[image.digest]))
    assert segmenter._embeddings.currsize >= 4 * floats


def _flat(tree):
    return (
        [tree] if isinstance(tree, torch.Tensor) else [t for branch in tree for t in _flat(branch)]
    )


def test_every_family_is_tested_and_none_of_transformers_is_left_out():
    assert set(FAMILIES) == set(BUILD)
    known = {getattr(tf, name).base_model_prefix for name in MASK_GENERATION_NAMES.values()}
    assert set(FAMILIES) == known


def test_checkpoints_of_video_models_serve_images(tmp_path):
    """The official SAM 2 files say ``sam2_video``; their image weights are the same."""
    torch.manual_seed(0)
    model, processor = BUILD["sam2"]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "sam2_video"}))
    image, prompt = noise((80, 50)), SegmentPrompt(Box(10, 10, 60, 40))
    segmenter = load_segmenter(tmp_path, device="cpu")
    expected = reference(model.eval(), processor, image, prompt)
    assert_close(segmenter.predict(image, [prompt])[0], expected)


MEMORY = {
    "memory_attention_hidden_size": 32,
    "memory_attention_num_layers": 1,
    "memory_attention_num_attention_heads": 1,
    "memory_attention_feed_forward_hidden_size": 64,
    "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 16,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_num_layers": 1,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 64,
}


def test_sam3_checkpoint_serves_points_and_boxes(tmp_path):
    """The official SAM 3 file is a ``sam3_video``: detector and tracker, sharing an encoder."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = {
        "model_type": "clip_text_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "projection_dim": 32,
    }
    detector = tf.Sam3Config(
        vision_config=PERCEPTION,
        text_config=text,
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 5},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    tracker = {
        "model_type": "sam3_tracker_video",
        "vision_config": PERCEPTION,
        "prompt_encoder_config": prompts_of(112, 14),
        "mask_decoder_config": DECODER,
        "image_size": 112,
        **MEMORY,
    }
    config = tf.Sam3VideoConfig(detector_config=detector, tracker_config=tracker)
    video = tf.Sam3VideoModel(config).eval()
    weights = {name: value.clone() for name, value in video.state_dict().items()}
    config.save_pretrained(tmp_path)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    _, processor = BUILD["sam3_tracker"]()
    processor.save_pretrained(tmp_path)

    segmenter = load_segmenter(tmp_path, device="cpu")
    loaded = segmenter._model.state_dict()
    for name, source in {
        "mask_decoder.iou_token.weight": "tracker_model.mask_decoder.iou_token.weight",
        "prompt_encoder.no_mask_embed.weight": "tracker_model.prompt_encoder.no_mask_embed.weight",
        "vision_encoder.neck.fpn_layers.0.proj1.weight": "tracker_neck.fpn_layers.0.proj1.weight",
        "vision_encoder.backbone.layer_norm.weight": (
            "detector_model.vision_encoder.backbone.layer_norm.weight"
        ),
    }.items():
        assert torch.equal(loaded[name], weights[source]), name
    image, prompt = noise((80, 50)), SegmentPrompt(Box(10, 10, 60, 40))
    expected = reference(segmenter._model, processor, image, prompt)
    assert_close(segmenter.predict(image, [prompt])[0], expected)


def test_too_thin_for_a_padded_family(tmp_path):
    model, processor = BUILD["sam"]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ImageError):
        load_segmenter(tmp_path, device="cpu").embed(noise((1, 500)))


def write_bad_checkpoints(folder: Path) -> list[Path]:
    model, processor = BUILD["sam"]()
    paths = []
    for name in ("no_weights", "pickle_only", "broken", "lacking", "no_processor", "other", "junk"):
        path = folder / name
        model.save_pretrained(path)
        processor.save_pretrained(path)
        paths.append(path)
    weights = "model.safetensors"
    (folder / "no_weights" / weights).unlink()
    (folder / "pickle_only" / weights).unlink()
    torch.save(model.state_dict(), folder / "pickle_only" / "pytorch_model.bin")
    content = (folder / "broken" / weights).read_bytes()
    (folder / "broken" / weights).write_bytes(content[: len(content) // 2])
    model.vision_encoder.save_pretrained(folder / "parts")
    (folder / "lacking" / weights).write_bytes((folder / "parts" / weights).read_bytes())
    for file in (folder / "no_processor").glob("*process*"):
        file.unlink()
    (folder / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "junk" / "config.json").write_text("{")
    return paths


def test_bad_checkpoints(tmp_path):
    for path in [*write_bad_checkpoints(tmp_path), tmp_path / "missing", tmp_path]:
        with pytest.raises(CheckpointError) as caught:
            load_segmenter(path, device="cpu")
        assert caught.value.hint, path
    with pytest.raises(CheckpointError, match="dtype"):
        load_segmenter(tmp_path / "junk", device="cpu", dtype="int8")
