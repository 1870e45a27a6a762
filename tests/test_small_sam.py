"""The small SAM: files, training arithmetic, and the measurements it is judged by."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling.image_encoder import Attention

from recipes.embedded_sam import train as training
from recipes.embedded_sam.data import (
    BatchSettings,
    SceneBatches,
    augment,
    covered,
    jitter_box,
)
from recipes.embedded_sam.data import mask_box as data_box
from recipes.embedded_sam.dense import DenseHeads, dense_loss
from recipes.embedded_sam.init import cosine_filters, initialise
from recipes.embedded_sam.interaction import (
    DENSE,
    candidates_loss,
    decode,
    error_points,
    interaction_step,
)
from recipes.embedded_sam.loss import STRESS, mask_iou, mask_loss, near_box, near_points
from recipes.embedded_sam.resize import extend_sam, resize_sam
from recipes.embedded_sam.scene_cache import build_scene_cache, open_scene_cache
from sam4mllm_tool import embedded
from sam4mllm_tool.errors import CheckpointError, InputError
from sam4mllm_tool.evaluation import sam as evaluation
from sam4mllm_tool.evaluation.sam_prompts import deepest_pixel, error_point, true_prompts
from sam4mllm_tool.protocols import MaskCandidate
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import HELD_OUT_WORLD, SAM_WORLD
from sam4mllm_tool.segmenter.drawn_prompts import CHANNELS, FAR, REACHES, draw_prompts
from sam4mllm_tool.segmenter.small import (
    SmallSamConfig,
    build_small_sam,
    load_small_sam,
    load_small_sam_config,
    save_small_sam,
)
from sam4mllm_tool.types import Mask, PointLabel, RgbImage

TINY = SmallSamConfig(
    image_size=64,
    patch_size=16,
    embed_dim=32,
    depth=2,
    num_heads=2,
    window_size=2,
    global_blocks=(1,),
    prompt_dim=32,
    decoder_depth=1,
    decoder_mlp_dim=32,
    decoder_heads=2,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    sam = build_small_sam(TINY)
    initialise(sam)
    return sam.eval()


# -- files ------------------------------------------------------------------------------------


def test_saved_weights_come_back_exactly(tiny, tmp_path):
    save_small_sam(tiny, TINY, tmp_path)
    first = load_small_sam(tmp_path)
    save_small_sam(first, load_small_sam_config(tmp_path), tmp_path / "again")
    second = load_small_sam(tmp_path / "again")
    for name, value in first.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, tiny.state_dict()[name].half().float())
    assert load_small_sam_config(tmp_path) == TINY


def test_damaged_files_are_named_as_such(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no small SAM"):
        load_small_sam(tmp_path / "nothing")
    save_small_sam(tiny, TINY, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"embed_dim": 64}))
    with pytest.raises(CheckpointError, match="weights"):
        load_small_sam(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="no small SAM"):
        load_small_sam(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_small_sam(tmp_path)


def test_it_is_a_sam_like_any_other(tiny):
    predictor = SamPredictor(tiny)
    predictor.set_image(np.full((48, 96, 3), 127, dtype=np.uint8))
    masks, quality, logits = predictor.predict(box=np.array([10, 10, 40, 30]))
    assert masks.shape == (3, 48, 96) and quality.shape == (3,) and logits.shape == (3, 16, 16)


def test_fused_attention_is_segment_anythings(tiny):
    """Same weights, same numbers, windowed and global."""
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = tiny.image_encoder(picture)
        for block in tiny.image_encoder.blocks:
            plain = Attention(TINY.embed_dim, TINY.num_heads)
            plain.load_state_dict(block.attn.state_dict())
            block.attn = plain
        torch.testing.assert_close(tiny.image_encoder(picture), found, atol=1e-5, rtol=1e-5)


def test_embedded_weights_load_and_are_small():
    directory = embedded.SAM
    load_small_sam(directory)
    assert (directory / "model.safetensors").stat().st_size < 15e6


# -- training arithmetic ------------------------------------------------------------------------


@pytest.mark.parametrize("with_box", (True, False))
@pytest.mark.parametrize("drawn", (True, False))
def test_batched_decoding_equals_sam_prompt_by_prompt(tiny, with_box, drawn):
    tiny, _ = extend_sam(tiny, TINY, drawn_prompts=drawn)
    tiny.eval()
    if drawn:
        tiny.prompt_encoder.drawing[-1].weight.data.normal_()
    embeddings = torch.randn(3, TINY.prompt_dim, TINY.grid, TINY.grid)
    points, labels = torch.rand(3, 2, 2) * 64, torch.tensor([[0, 1], [1, 1], [1, 0]])
    boxes = torch.tensor([[3.0, 4, 30, 40], [0, 0, 9, 9], [5, 5, 60, 50]]) if with_box else None
    former = torch.randn(3, 1, 4 * TINY.grid, 4 * TINY.grid)
    logits, quality = decode(tiny, embeddings, points, labels, boxes, former)
    for row in range(3):
        sparse, dense = tiny.prompt_encoder(
            points=(points[row : row + 1], labels[row : row + 1]),
            boxes=boxes[row : row + 1] if boxes is not None else None,
            masks=former[row : row + 1],
        )
        expected, expected_quality = tiny.mask_decoder.predict_masks(
            embeddings[row : row + 1], tiny.prompt_encoder.get_dense_pe(), sparse, dense
        )
        torch.testing.assert_close(logits[row], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(quality[row], expected_quality[0], atol=1e-5, rtol=1e-5)


def test_starting_weights_look_where_the_point_is():
    config = SmallSamConfig(depth=1, global_blocks=(0,))
    sam = build_small_sam(config)
    initialise(sam)
    attention = sam.mask_decoder.transformer.final_attn_token_to_image
    positions = sam.prompt_encoder.get_dense_pe().flatten(2)[0].T
    query, key = attention.q_proj(positions), attention.k_proj(positions)
    found = (query @ key.T).argmax(1)
    assert (found == torch.arange(len(found))).float().mean() > 0.95


def test_patches_start_as_orthogonal_waves():
    filters = cosine_filters(48, 16).flatten(1)
    products = torch.nn.functional.normalize(filters) @ torch.nn.functional.normalize(filters).T
    assert (products - torch.eye(48)).abs().max() < 1e-5


def test_loss_by_hand():
    target = torch.zeros(1, 10, 10)
    target[0, 2:4, 2:4] = 1
    near = near_box(target)[0]
    assert near.nonzero().amin(0).tolist() == [1, 1] and near.nonzero().amax(0).tolist() == [4, 4]
    loss, iou = mask_loss(torch.zeros(1, 10, 10), target)
    dice = 1 - (2 * 2 + 1) / (50 + 4 + 1)
    assert loss.item() == pytest.approx(2.5 * np.log(2) + dice, rel=1e-5)
    assert iou.item() == 0
    perfect, one = mask_loss(40 * (target[:, None].repeat(1, 3, 1, 1) - 0.5), target)
    everywhere, one_in_box = mask_loss(torch.full((1, 10, 10), 40.0), target, boxed=True)
    assert one_in_box.item() == pytest.approx(4 / 16)
    assert everywhere.item() == pytest.approx(
        2 * 40 * 12 / 16 + 0.1 * 40 + 1 - (2 * 4 + 1) / (16 + 4 + 1), rel=1e-4
    )
    assert perfect.shape == (1, 3) and perfect.max() < 1e-3 and torch.equal(one, torch.ones(1, 3))


def test_mistakes_at_a_point_weigh_more():
    points = torch.tensor([[[10.0, 30.0]], [[62.0, 1.0]]])
    stress = near_points(points, 16, 64)
    assert stress.shape == (2, 16, 16)
    for row, (x, y) in enumerate(points[:, 0] / 4):
        place = int(stress[row].argmax())
        assert (place % 16, place // 16) == (int(x), int(y))
        assert 0.9 * STRESS < stress[row].max() <= STRESS
    assert not near_points(points[:, :0], 16, 64).any()
    target = torch.zeros(1, 16, 16)
    target[0, 4:12, 1:9] = 1
    losses = []
    for column, line in ((2, 7), (7, 7)):  # the same mistake at the point, and away from it
        wrong = 20 * (target - 0.5)
        wrong[0, line, column] *= -1
        losses.append(mask_loss(wrong, target, stress=stress[:1])[0].item())
    assert losses[0] > 2 * losses[1]


def test_iou_by_hand():
    one, other = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    one[0, :2] = True
    other[0, 1:3] = True
    assert mask_iou(one, other).tolist() == pytest.approx([1 / 3, 1])


def test_only_the_best_candidate_is_taught_fully():
    target = torch.zeros(1, 8, 8)
    target[0, 2:6, 2:6] = 1
    good, bad = 20 * (target - 0.5), -20 * (target - 0.5)
    losses = []
    for rest in (bad, 0 * bad):
        logits = torch.stack([good, rest, good, rest], dim=1).requires_grad_()
        loss, iou = candidates_loss(logits, torch.zeros(1, 4), target, others=0.15)
        loss.backward()
        losses.append(logits.grad[0].abs().sum((1, 2)))
        assert iou[0, 2] == 1
    assert losses[1][1] > 0 and losses[1][2] < 1e-3


def test_a_resized_sam_sees_an_enlarged_picture_as_before(tiny):
    """Half the patch, with a grid as it was: exactly the picture enlarged twofold."""
    tiny.image_encoder.pos_embed.data.normal_()
    finer, config = resize_sam(tiny, TINY, 32, 8)
    assert (config.grid, config.image_size) == (TINY.grid, 32)
    small = torch.rand(1, 3, 32, 32)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        expected, found = tiny.image_encoder(large), finer.eval().image_encoder(small)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    same, _ = resize_sam(tiny, TINY, TINY.image_size, TINY.patch_size)
    assert all(torch.equal(v, tiny.state_dict()[k]) for k, v in same.state_dict().items())
    with pytest.raises(InputError):
        resize_sam(tiny, TINY, 64, 12)


def test_an_extended_sam_answers_as_before(tiny):
    larger, config = extend_sam(tiny, TINY, new_blocks=(0, 2), drawn_prompts=True)
    assert (config.depth, config.global_blocks, config.drawn_prompts) == (4, (3,), True)
    picture, points = torch.rand(1, 3, 64, 64), torch.rand(2, 3, 2) * 64
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    answers = []
    for sam in (tiny, larger.eval()):
        with torch.no_grad():
            embedding = sam.image_encoder(picture).expand(2, -1, -1, -1)
            answers.append(decode(sam, embedding, points, labels, None, None))
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_drawing_teaches_and_is_saved(tiny, tmp_path):
    """Gradients reach the drawing, and weights with it come back through the saved folder."""
    sam, config = extend_sam(tiny, TINY, drawn_prompts=True)
    sam.train()
    boxes = torch.tensor([[8.0, 8, 40, 40]])
    embedding = torch.randn(1, TINY.prompt_dim, TINY.grid, TINY.grid)
    none = torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.long)
    before, _ = decode(sam, embedding, *none, boxes, None)
    before.sum().backward()
    last = sam.prompt_encoder.drawing[-1]
    assert last.weight.grad.abs().sum() > 0
    with torch.no_grad():
        last.weight -= 0.1 * last.weight.grad.sign()
    after, _ = decode(sam, embedding, *none, boxes, None)
    assert (after - before).abs().max() > 1e-3
    save_small_sam(sam, config, tmp_path)
    again = load_small_sam(tmp_path)
    torch.testing.assert_close(
        again.prompt_encoder.drawing[-1].weight, last.weight.half().float(), atol=0, rtol=0
    )


def test_prompts_are_drawn_where_they_are():
    """16 cells of 4 px: a box that covers one cell and parts of its neighbours, and two points."""
    boxes = torch.tensor([[6.0, 8, 14, 12]])
    points = torch.tensor([[[41.5, 21.5], [9.5, 57.5], [0.0, 0.0]]])
    labels = torch.tensor([[1, 0, -1]])
    (drawn,) = draw_prompts((points, labels), boxes, 64, 16)
    assert drawn.shape == (CHANNELS, 16, 16)
    covered, columns, rows = drawn[:3]
    assert covered[2].tolist()[:5] == [0, 0.5, 1, 0.5, 0] and covered.sum() == 2
    assert columns[0, 2] == 0 and columns[0, 1] == -1 and columns[0, 9] == FAR
    assert rows[2, 0] == 0 and rows[3, 0] == FAR and rows[1, 7] == -FAR
    here, there = drawn[3 : 3 + len(REACHES)], drawn[3 + len(REACHES) :]
    for spots, (column, row) in ((here, (10, 5)), (there, (2, 14))):
        assert (spots.flatten(1).argmax(1) == 16 * row + column).all()
        torch.testing.assert_close(spots[:, row, column], torch.ones(len(REACHES)))
        for reach, spot in zip(REACHES, spots, strict=True):
            beside = torch.exp(torch.tensor(-0.5 / reach**2))
            torch.testing.assert_close(spot[row, column - 1], beside)
    assert not here[0, 0, 0] > 1e-6  # a point that is none is not drawn
    (alone,) = draw_prompts(None, boxes, 64, 16)
    torch.testing.assert_close(alone[:3], drawn[:3])
    assert not alone[3:].any()
    (unboxed,) = draw_prompts((points, labels), None, 64, 16)
    torch.testing.assert_close(unboxed[3:], drawn[3:])
    assert not unboxed[:3].any()
    assert draw_prompts(None, None, 64, 16) is None


def test_what_nobody_points_at_is_taught_too(tiny, tmp_path):
    """With read-outs, the encoder's gradient also holds pre-training's, and only that is added."""
    list(build_scene_cache(tmp_path, "sam", "train", 5, 4, 64))
    batch = next(iter(SceneBatches(tmp_path, BatchSettings(16, 2, 2, 1.0), seed=1)))
    heads, gradients = DenseHeads(TINY.prompt_dim), []
    weight = tiny.image_encoder.patch_embed.proj.weight
    tiny.train()
    for some in (None, heads):
        tiny.zero_grad()
        generator = torch.Generator().manual_seed(0)
        interaction_step(tiny, batch, generator, heads=some)
        gradients.append(weight.grad.clone())
    tiny.zero_grad()
    loss, _ = dense_loss(tiny, heads, batch)
    (DENSE * loss).backward()
    added = gradients[1] - gradients[0]
    assert torch.nn.functional.cosine_similarity(added.flatten(), weight.grad.flatten(), 0) > 0.98


def test_error_points_lie_in_the_error(tiny):
    target = torch.zeros(2, 16, 16)
    target[:, 4:10, 4:10] = 1
    found = 2 * target - 1
    found[0, 5, 5] = -1  # a hole: the point must say foreground, here
    found[1, 12, 3] = 1  # too much: background, there
    generator = torch.Generator().manual_seed(0)
    points, labels = error_points(found, target, tiny, generator)
    assert (points[:, 0] // 4).tolist() == [[5, 5], [3, 12]] and labels.tolist() == [[1], [0]]


def test_batches_agree_with_the_scenes(tmp_path):
    assert list(build_scene_cache(tmp_path, "sam", "train", 5, 4, 64)) == [4]
    assert list(build_scene_cache(tmp_path, "sam", "train", 5, 4, 64)) == []
    cache = open_scene_cache(tmp_path)
    for index in range(4):
        scene = render_scene(SAM_WORLD, "train", index, 5, 64)
        assert np.array_equal(cache.images[index], np.asarray(scene.image))
        for number, thing in enumerate(scene.objects):
            assert np.array_equal(cache.labels[index] == number, thing.mask)
    batch = next(iter(SceneBatches(tmp_path, BatchSettings(16, 2, 3, 2.0), seed=1)))
    again = next(iter(SceneBatches(tmp_path, BatchSettings(16, 2, 3, 2.0), seed=1)))
    assert torch.equal(batch.images, again.images)
    with_box, without = batch.groups
    assert with_box.boxes.shape == (6, 4) and without.boxes is None
    cells = (without.points[:, 0] // 4).long()
    share = without.targets[torch.arange(len(cells)), cells[:, 1], cells[:, 0]]
    assert (share > 0).all() and (without.labels[:, 0] == 1).all()


def test_augmented_pictures_and_masks_stay_together():
    """Light where the object is, whatever was done to both: turned, softened, recoloured."""
    labels = np.full((40, 40), -1, dtype=np.int8)
    labels[5:25, 8:14] = 0
    image = np.where(labels[..., None] == 0, 200, 50).astype(np.uint8).repeat(3, axis=2)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        turned, marks = augment(image, labels, rng)
        assert turned.shape == image.shape and (marks == 0).sum() == (labels == 0).sum()
        grey = turned.mean(axis=2)
        middle = (grey.max() + grey.min()) / 2
        assert ((grey > middle) == (marks == 0)).mean() > 0.96  # a soft edge may move by a pixel
        seen |= {data_box(marks == 0).tobytes(), bool(((grey > 60) & (grey < 190)).any())}
    assert len(seen) > 6


def test_boxes_and_cells():
    mask = np.zeros((16, 16), dtype=bool)
    mask[4:8, 2:5] = True
    assert data_box(mask).tolist() == [2, 4, 5, 8]
    assert covered(mask, 4).tolist() == [[0] * 4, [127, 63, 0, 0], [0] * 4, [0] * 4]
    rng = np.random.default_rng(0)
    for _ in range(50):
        moved = jitter_box(data_box(mask), 0.25, mask, rng)
        assert (np.abs(moved - [2, 4, 5, 8]) <= [0.75, 1, 0.75, 1]).all()


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "validate", lambda *_: {"box": 0.5, "box_10_points": 0.5})
    list(build_scene_cache(tmp_path / "scenes", "sam", "train", 0, 6, 64))
    settings = training.SamTraining(tmp_path, tmp_path / "out", scenes=6, pictures=2)
    first = training.Trainer(settings, TINY)
    for stage, share in (("dense", 0.0), ("interactive", 0.5)):
        first.spent = 60 * settings.minutes * share
        batches = SceneBatches(
            tmp_path / "scenes", BatchSettings(16, 2, dense=stage == "dense"), seed=0
        )
        assert first.stage == stage
        for batch, _ in zip(batches, range(2), strict=False):
            first.one_step(stage, batch)
    first.save()
    first.report("interactive")
    assert load_small_sam_config(tmp_path / "out") == TINY
    later = training.Trainer(replace(settings, start=tmp_path / "out"), TINY)
    started, kept = later.sam.state_dict(), load_small_sam(tmp_path / "out").state_dict()
    assert all(torch.equal(started[name], kept[name]) for name in kept)
    second = training.Trainer(settings, TINY)
    second.resume()
    assert (second.step, second.spent) == (first.step, first.spent)
    for one, other in ((first.sam, second.sam), (first.average, second.average)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
    assert any(
        not torch.equal(a, b)
        for a, b in zip(first.sam.parameters(), build_small_sam(TINY).parameters(), strict=True)
    )


# -- measurements -------------------------------------------------------------------------------


class Oracle:
    """A segmenter that knows the scenes: answers with the object that the prompt fits best."""

    name = "oracle"

    def __init__(self, worlds, spoil=lambda mask: mask):
        self.scenes = {}
        self.worlds, self.spoil, self.embedded = worlds, spoil, 0

    def _objects(self, image):
        if not self.scenes:
            for world in self.worlds:
                for split, index in [("test", n) for n in range(40)] + [
                    ("val", n) for n in range(12)
                ]:
                    scene = render_scene(world, split, index, 7)
                    self.scenes[RgbImage.from_pil(scene.image).digest] = scene.objects
        return self.scenes[image.digest]

    def embed(self, image):
        self.embedded += 1

    def predict(self, image, prompts):
        return [self._answer(self._objects(image), prompt) for prompt in prompts]

    def _answer(self, objects, prompt):
        def misfit(thing):
            off = np.abs(np.subtract(thing.box, prompt.box)).sum() if prompt.box else 0
            wrong = [
                thing.mask[int(p.y), int(p.x)] != (p.label is PointLabel.FOREGROUND)
                for p in prompt.points
            ]
            return 30 * sum(wrong) + off

        mask = self.spoil(min(objects, key=misfit).mask)
        logits = np.zeros((64, 64), dtype=np.float32)
        right = MaskCandidate(Mask(mask), logits, 1.0)
        return (
            MaskCandidate(Mask(~mask), logits, 0.2),
            right,
            MaskCandidate(Mask(~mask), logits, 0),
        )


def test_an_oracle_scores_one():
    report = evaluation.evaluate_sam(Oracle([SAM_WORLD, HELD_OUT_WORLD]), seed=7, objects=30)
    for world in (report.trained_categories, report.held_out_categories):
        for name in ("box", "box_1_points", "box_10_points", "one_point"):
            assert world["all"][name].mean == 1.0 == world["all"][name].low
        assert world["all"]["box"].objects >= 30 > world["occluded"]["box"].objects > 3
    assert [after.mean for after in report.rounds] == [1.0] * evaluation.ROUNDS
    assert report.calibration["correlation"] >= 0 and report.calibration["bias"] < 0.1
    found = report.to_json()
    assert found["bars"]["box only"] == {"value": 1.0, "bar": 0.82, "reached": True}
    assert not found["bars"]["gain of 10 points on hard objects"]["reached"]
    json.dumps(found)


def test_a_spoilt_oracle_is_found_out():
    def half(mask):
        rows = np.flatnonzero(mask.any(1))
        return mask & (np.arange(mask.shape[0])[:, None] < rows[len(rows) // 2])

    report = evaluation.evaluate_sam(Oracle([SAM_WORLD, HELD_OUT_WORLD], half), seed=7, objects=20)
    everything = report.trained_categories["all"]
    assert 0.3 < everything["box"].mean < 0.6
    assert everything["box"].low < everything["box"].mean < everything["box"].high
    assert report.calibration["bias"] > 0.3
    assert not report.to_json()["bars"]["box only"]["reached"]


def test_score_weighs_objects_and_resamples_scenes():
    certain = evaluation.score([(0, 0.5), (0, 0.7), (1, 0.6)])
    assert certain.mean == pytest.approx(0.6) and certain.objects == 3
    assert certain.low == pytest.approx(0.6) and certain.high == pytest.approx(0.6)
    spread = evaluation.score([(n, float(n % 2)) for n in range(100)])
    assert spread.low == pytest.approx(0.4, abs=0.04)
    assert spread.high == pytest.approx(0.6, abs=0.04)


def test_calibration_by_hand():
    found = evaluation.calibration([(0.5, 0.7), (0.9, 0.9), (0.7, 0.8)])
    assert found["mean_absolute_error"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(-0.1)
    assert found["correlation"] == pytest.approx(1.0)


def test_true_prompts_tell_the_truth():
    rng = np.random.default_rng(0)
    for index in range(5):
        for thing in render_scene(SAM_WORLD, "test", index).objects:
            prompts = true_prompts(thing, rng)
            assert prompts["box"].box == thing.box and prompts["one_point"].box is None
            for name, prompt in prompts.items():
                if "wrong" not in name:
                    for point in prompt.points:
                        inside = point.label is PointLabel.FOREGROUND
                        assert thing.mask[int(point.y), int(point.x)] == inside
            ten = prompts["box_10_points"].points
            assert prompts["box_3_points"].points == ten[:3]


def test_deepest_pixel_and_error_point():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:9, 3:10] = True
    assert deepest_pixel(mask) == (6, 5)
    found = mask.copy()
    found[12:17, 12:17] = True
    point = error_point(found, mask)
    assert (point.x, point.y, point.label) == (14.5, 14.5, PointLabel.BACKGROUND)
    assert error_point(mask, mask) is None
