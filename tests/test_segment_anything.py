"""SAM masks are those of the library's own predictor, whatever is kept, batched or raced for."""

import itertools
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry

from sam4mllm_tool.concurrency import CallCancelled, CallContext, call_context
from sam4mllm_tool.errors import CheckpointError, DeviceOutOfMemory, ImageError, PromptError
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import SAM_WORLD
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.segmenter.segment_anything import SegmentAnythingSegmenter, _architecture
from sam4mllm_tool.segmenter.small import SmallSamConfig, build_small_sam, save_small_sam
from sam4mllm_tool.types import Box, PointLabel, PromptPoint, RgbImage

SIZES = [(64, 64), (97, 41), (30, 200), (1, 1), (333, 222), (128, 127)]
FOREGROUND, BACKGROUND = PointLabel.FOREGROUND, PointLabel.BACKGROUND


def random_sam(size: int = 64, patch: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    config = SmallSamConfig(
        image_size=size,
        patch_size=patch,
        embed_dim=32,
        depth=2,
        num_heads=2,
        window_size=3,
        global_blocks=(1,),
        prompt_dim=32,
        decoder_mlp_dim=32,
        decoder_heads=2,
    )
    sam = build_small_sam(config).eval()
    for parameter in sam.parameters():  # large enough that prompts change the masks
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.3, std=0.4)
    return config, sam


@pytest.fixture(scope="module")
def sam():
    torch.set_num_threads(1)
    return random_sam()[1]


@pytest.fixture
def segmenter(sam):
    return SegmentAnythingSegmenter(sam)


def picture(size, seed=0) -> RgbImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return RgbImage.from_pil(Image.fromarray(pixels))


def random_prompt(rng, size, points: int, box: bool, mask_shape=None) -> SegmentPrompt:
    width, height = size
    labels = [(BACKGROUND, FOREGROUND)[number] for number in rng.integers(0, 2, points)]
    corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * [width, height]
    return SegmentPrompt(
        box=Box(*corners.ravel().tolist()) if box else None,
        points=tuple(
            PromptPoint(float(rng.uniform(0, width)), float(rng.uniform(0, height)), label)
            for label in labels
        ),
        mask_logits=None if mask_shape is None else rng.normal(0, 5, mask_shape).astype(np.float32),
    )


def reference(sam, image: RgbImage, prompt: SegmentPrompt):
    predictor = SamPredictor(sam)
    predictor.set_image(np.array(image.array))
    shown = [p for p in prompt.points if p.label is not PointLabel.UNDECIDED]
    return predictor.predict(
        point_coords=np.array([(p.x, p.y) for p in shown]) if shown else None,
        point_labels=np.array([int(p.label is FOREGROUND) for p in shown]) if shown else None,
        box=np.array(prompt.box) if prompt.box else None,
        mask_input=None if prompt.mask_logits is None else prompt.mask_logits[None],
        multimask_output=True,
    )


def assert_close(candidates, expected):
    """Another batch size, thread count or CPU may round differently in the last place."""
    assert len(candidates) == 3
    for candidate, mask, iou, low in zip(candidates, *expected, strict=True):
        assert candidate.logits.dtype == np.float32
        np.testing.assert_allclose(candidate.logits, low, atol=1e-4)
        assert abs(candidate.predicted_iou - iou) < 1e-4
        assert (candidate.mask.pixels != mask).mean() < 0.001


KINDS = [
    (points, box, mask)
    for points, box, mask in itertools.product((0, 1, 4), (False, True), (False, True))
    if points or box or mask
]


@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_sam_predictor(sam, segmenter, size):
    image = picture(size)
    rng = np.random.default_rng(1)
    varied = set()
    for points, box, mask in KINDS:
        shape = segmenter.logits_shape if mask else None
        prompt = random_prompt(rng, size, points, box, shape)
        (candidates,) = segmenter.predict(image, [prompt])
        assert_close(candidates, reference(sam, image, prompt))
        varied.add(candidates[0].logits.tobytes())
        assert size == (1, 1) or 0 < candidates[0].mask.area < size[0] * size[1]
    assert len(varied) == len(KINDS)  # the prompts matter


@pytest.mark.parametrize(("size", "patch"), [(96, 16), (128, 8), (256, 16)])
def test_other_configurations(size, patch):
    _, sam = random_sam(size, patch, seed=size)
    segmenter = SegmentAnythingSegmenter(sam)
    image = picture((150, 77))
    assert segmenter.logits_shape == (4 * size // patch, 4 * size // patch)
    prompt = random_prompt(np.random.default_rng(2), image.size, 3, True)
    assert_close(segmenter.predict(image, [prompt])[0], reference(sam, image, prompt))


def test_many_prompts_come_back_in_order_and_equal(sam, segmenter):
    """Prompts of one kind go through the decoder together, and come back as if alone."""
    image, rng = picture((90, 60)), np.random.default_rng(3)
    kinds = [KINDS[number] for number in rng.integers(0, len(KINDS), 50)]
    prompts = [
        random_prompt(rng, image.size, points, box, segmenter.logits_shape if mask else None)
        for points, box, mask in kinds
    ]
    batches = []
    sam.mask_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["sparse_prompt_embeddings"])),
        with_kwargs=True,
    )
    together = segmenter.predict(image, prompts)
    sam.mask_decoder._forward_pre_hooks.clear()
    assert sum(batches) == 50 and len(batches) < 20 and max(batches) <= 16
    for candidates, prompt in zip(together, prompts, strict=True):
        assert_close(candidates, reference(sam, image, prompt))
    assert segmenter.predict(image, []) == []


def test_undecided_points_are_not_shown(segmenter):
    image = picture((60, 40))
    point, undecided = PromptPoint(5, 6, FOREGROUND), PromptPoint(30, 20, PointLabel.UNDECIDED)
    with_it, without = segmenter.predict(
        image, [SegmentPrompt(points=(point, undecided)), SegmentPrompt(points=(point,))]
    )
    assert [c.mask for c in with_it] == [c.mask for c in without]
    with pytest.raises(PromptError):
        segmenter.predict(image, [SegmentPrompt(points=(undecided,))])


def test_refinement_and_logits_at_image_size(sam, segmenter):
    image = picture((70, 110))
    first = segmenter.predict(image, [SegmentPrompt(Box(5, 5, 40, 60))])[0]
    for candidate in first:
        large = segmenter.logits_at_image_size(image, candidate.logits)
        assert large.dtype == np.float32
        assert np.array_equal(large > 0, candidate.mask.pixels)
    again = SegmentPrompt(Box(5, 5, 40, 60), mask_logits=first[1].logits)
    assert_close(segmenter.predict(image, [again])[0], reference(sam, image, again))


def count_encodings(sam):
    seen = []
    handle = sam.image_encoder.register_forward_hook(lambda *_: seen.append(1))
    return seen, handle


def test_each_image_is_embedded_once_and_the_cache_is_bounded(sam):
    seen, handle = count_encodings(sam)
    bytes_each = 32 * 8 * 8 * 4
    segmenter = SegmentAnythingSegmenter(sam, cache_bytes=2 * bytes_each)
    images = [picture((40, 30), seed) for seed in range(3)]
    prompt = SegmentPrompt(Box(2, 3, 20, 25))
    expected = [reference(sam, image, prompt) for image in images]
    seen.clear()
    segmenter.embed(images[0])
    for number in (0, 1, 0, 1, 0):
        assert_close(segmenter.predict(images[number], [prompt])[0], expected[number])
    assert len(seen) == 2
    assert_close(segmenter.predict(images[2], [prompt])[0], expected[2])  # 1 goes
    assert_close(segmenter.predict(images[0], [prompt])[0], expected[0])
    assert len(seen) == 3
    assert_close(segmenter.predict(images[1], [prompt])[0], expected[1])
    assert len(seen) == 4
    too_small = SegmentAnythingSegmenter(sam, cache_bytes=bytes_each - 1)
    assert_close(too_small.predict(images[0], [prompt])[0], expected[0])
    handle.remove()


def test_many_threads_embed_once_and_agree(sam):
    seen, handle = count_encodings(sam)
    segmenter = SegmentAnythingSegmenter(sam)
    images = [picture((40, 30), seed) for seed in range(4)]
    prompt = SegmentPrompt(Box(2, 3, 20, 25))
    found, start = [], threading.Barrier(8)

    def work(number):
        start.wait()
        for turn in range(4):
            which = (number + turn) % 4
            found.append((which, segmenter.predict(images[which], [prompt])[0]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert len(seen) == 4 and len(found) == 32
    expected = [reference(sam, image, prompt) for image in images]
    for which, candidates in found:
        assert_close(candidates, expected[which])


def test_a_cancelled_call_stops_and_leaves_the_model_free(sam, segmenter):
    image, prompt = picture((40, 30)), SegmentPrompt(Box(2, 3, 20, 25))
    with call_context(CallContext()) as context:
        handle = sam.image_encoder.register_forward_hook(lambda *_: context.cancelled.set())
        with pytest.raises(CallCancelled):
            segmenter.predict(image, [prompt])
        handle.remove()
    assert_close(segmenter.predict(image, [prompt])[0], reference(sam, image, prompt))


def test_out_of_memory_is_told_and_survived(sam, segmenter):
    def too_big(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    image, prompt = picture((40, 30)), SegmentPrompt(Box(2, 3, 20, 25))
    handle = sam.mask_decoder.register_forward_pre_hook(too_big)
    with pytest.raises(DeviceOutOfMemory) as caught:
        segmenter.predict(image, [prompt])
    handle.remove()
    assert caught.value.hint
    assert_close(segmenter.predict(image, [prompt])[0], reference(sam, image, prompt))


NAN = float("nan")


@pytest.mark.parametrize(
    "prompt",
    [
        SegmentPrompt(),
        SegmentPrompt(Box(0, 0, NAN, 5)),
        SegmentPrompt(Box(0, 0, float("inf"), 5)),
        SegmentPrompt(Box(10, 0, 5, 5)),
        SegmentPrompt(points=(PromptPoint(NAN, 3, FOREGROUND),)),
        SegmentPrompt(mask_logits=np.zeros((7, 7), np.float32)),
        SegmentPrompt(mask_logits=np.full((32, 32), np.nan, np.float32)),
    ],
)
def test_prompts_that_make_no_sense(segmenter, prompt):
    good = SegmentPrompt(Box(0, 0, 5, 5))
    with pytest.raises(PromptError) as caught:
        segmenter.predict(picture((20, 20)), [good, prompt])
    assert caught.value.hint


def test_too_thin_pictures(segmenter):
    with pytest.raises(ImageError):
        segmenter.embed(picture((1, 200)))
    with pytest.raises(PromptError):
        segmenter.logits_at_image_size(picture((20, 20)), np.zeros((3, 3), np.float32))


def test_small_sam_directory(tmp_path):
    config, sam = random_sam()
    save_small_sam(sam, config, tmp_path / "small")
    loaded = load_segmenter(tmp_path / "small", device="cpu")
    assert isinstance(loaded, Segmenter) and loaded.name == "small"
    image, prompt = picture((50, 40)), SegmentPrompt(Box(5, 5, 30, 30))
    for parameter in sam.parameters():  # it is stored in half precision
        parameter.data = parameter.data.half().float()
    for name, buffer in sam.named_buffers():
        if name in sam.state_dict():
            buffer.copy_(buffer.half().float())
    assert_close(loaded.predict(image, [prompt])[0], reference(sam, image, prompt))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_official_checkpoint_files(tmp_path, ending):
    """A ViT-B of the official size, with random weights in half precision to keep it quick."""
    with torch.device("meta"):
        shapes = sam_model_registry["vit_b"]().state_dict()
    weights = {
        name: torch.full(value.shape, number % 7 - 3, dtype=torch.float16)
        for number, (name, value) in enumerate(shapes.items())
    }
    path = tmp_path / f"sam_vit_b_01ec64.{ending}"
    if ending == "pth":
        torch.save(weights, path)
    else:
        safetensors.torch.save_file(weights, path)
    segmenter = load_segmenter(path, device="cpu")
    assert segmenter.name == path.name and segmenter.logits_shape == (256, 256)
    loaded = segmenter._sam.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name].float()) for name in weights)
    assert segmenter._sam.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_the_kind_is_seen_from_the_weights(kind):
    with torch.device("meta"):
        weights = sam_model_registry[kind]().state_dict()
        sam = _architecture(weights, "sam.pth")()
    assert len(sam.image_encoder.blocks) == {"b": 12, "l": 24, "h": 32}[kind[-1]]


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_bad_checkpoints(tmp_path, capsys):
    def write(name, content: bytes):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def saved(name, value):
        torch.save(value, tmp_path / name)
        return tmp_path / name

    good = saved("good.pth", {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)})
    paths = [
        tmp_path / "missing.pth",
        tmp_path / "missing.safetensors",
        write("empty.pth", b""),
        write("empty.safetensors", b""),
        write("text.pth", b"hello"),
        write("truncated.pth", good.read_bytes()[:-1000]),
        write("pickle.pth", pickle.dumps(Evil())),
        saved("code.pth", {"image_encoder.pos_embed": Evil()}),
        saved("list.pth", [1, 2]),
        saved("other.pth", {"weight": torch.zeros(3)}),
        saved("width.pth", {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 99)}),
        good,
        write("picture.png", b"\x89PNG"),
    ]
    for path in paths:
        with pytest.raises(CheckpointError) as caught:
            load_segmenter(path, device="cpu")
        assert caught.value.hint, path
    assert "code was run" not in capsys.readouterr().out


def test_bfloat16_masks_are_nearly_the_same():
    """The trained small SAM; ``benchmarks/sam_precision.py`` measures 0.998 to 0.999 on average."""
    exact, rough = (load_segmenter(device="cpu", dtype=d) for d in ("auto", "bfloat16"))
    scene = render_scene(SAM_WORLD, "test", 3, 0)
    image = RgbImage.from_pil(scene.image)
    asked = [SegmentPrompt(Box(*thing.box)) for thing in scene.objects if thing.mask.sum() > 400]
    assert len(asked) > 1
    for ones, others in zip(exact.predict(image, asked), rough.predict(image, asked), strict=True):
        best = max(range(3), key=lambda n: ones[n].predicted_iou)
        assert mask_iou(ones[best].mask, others[best].mask) >= 0.99
        assert not np.array_equal(ones[best].logits, others[best].logits)  # it was not float32


def test_coordinates_are_exact_in_bfloat16():
    """A box one pixel wider in 1024 changes the logits as much as it does in float32."""
    exact, rough = (load_segmenter(device="cpu", dtype=d) for d in ("float32", "bfloat16"))
    image = picture((900, 700))
    boxes = [SegmentPrompt(Box(501, 203, right, 620)) for right in (800, 801)]
    changes = []
    for segmenter in (exact, rough):
        (one, *_), (other, *_) = segmenter.predict(image, boxes)
        changes.append(np.abs(one.logits - other.logits).mean())
    assert changes[1] == pytest.approx(changes[0], rel=0.2) and changes[0] > 0


def test_unknown_device(tmp_path):
    with pytest.raises(CheckpointError, match="device"):
        load_segmenter(tmp_path / "x.pth", device="quantum")


def test_choosing_and_drawing_need_no_torch():
    code = (
        "import sys, sam4mllm_tool.segmenter, sam4mllm_tool.images.loading\n"
        "import sam4mllm_tool.drawing.html\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
