"""Benchmarks, scene evaluation and annotation, over models whose answers are known."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from sam4mllm_tool.annotate import annotate, plan, read_expressions
from sam4mllm_tool.cli import app
from sam4mllm_tool.datasets import load_examples
from sam4mllm_tool.errors import BackendError, DatasetError, InputError
from sam4mllm_tool.evaluation.benchmark import benchmark_cases, evaluate, evaluate_benchmark
from sam4mllm_tool.evaluation.cases import sampled
from sam4mllm_tool.evaluation.outcome import Outcome, PointOutcome
from sam4mllm_tool.evaluation.pictures import EXTRA, HIT, MISSED, choose_lines, compared
from sam4mllm_tool.evaluation.run import Line, Shard, measure, read_lines
from sam4mllm_tool.evaluation.scenes import POOL, evaluate_scenes, position_baseline, scene_cases
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.protocols import NO_NOTES, CheckpointNotes, MaskCandidate
from sam4mllm_tool.scenes.export import export_scenes
from sam4mllm_tool.scenes.expressions import Kind
from sam4mllm_tool.scenes.world import SMALL_WORLD
from sam4mllm_tool.testing import TruthfulMllm
from sam4mllm_tool.types import Mask, RgbImage

RUNNER = CliRunner()
BOTH = ("pqpp", "box_only")


@dataclass
class KnowingMllm:
    """Speaks the truth about each of many pictures; may be told to fail at some expressions."""

    truths: dict[str, dict[str, Sequence[Mask]]]
    unreadable: set[str] = field(default_factory=set)
    name: str = "knowing"
    format_name: str = "sam4mllm"
    notes: CheckpointNotes = NO_NOTES
    asked: int = 0

    def generate(self, image, dialogue, **options):
        self.asked += 1
        reply = self._of(image).generate(image, dialogue, **options)
        bad = any(f'"{text}"' in dialogue[-1].text for text in self.unreadable)
        return replace(reply, text="\nwell …") if bad else reply

    def alternates(self, image, dialogue, **options):
        return self._of(image).alternates(image, dialogue, **options)

    def answer_yes_no(self, image, dialogue, **options):
        return self._of(image).answer_yes_no(image, dialogue, **options)

    def _of(self, image):
        return TruthfulMllm(self.truths[image.digest])


@dataclass
class KnowingSegmenter:
    """Draws the true mask whose box fits the prompt's best."""

    masks: dict[str, list[Mask]]
    name: str = "knowing"

    def embed(self, image):
        pass

    def predict(self, image, prompts):
        def fit(mask, box):
            return -sum(abs(a - b) for a, b in zip(mask.box, box, strict=True))

        best = [max(self.masks[image.digest], key=lambda m: fit(m, p.box)) for p in prompts]
        logits = np.zeros((64, 64), np.float32)
        return [(MaskCandidate(mask, logits, 0.9),) * 3 for mask in best]

    def logits_at_image_size(self, image, logits):
        return np.zeros((image.height, image.width), np.float32)


def knowing(cases) -> Sam4MLLM:
    truths, masks = {}, {}
    for case in cases():
        digest = case.open_image().digest
        truths.setdefault(digest, {})[case.expression] = case.truth()
        masks.setdefault(digest, []).extend(case.truth())
    return Sam4MLLM(KnowingMllm(truths), KnowingSegmenter(masks))


def timeless(report):
    """A report without what the clock says."""
    text = json.dumps(report)
    return re.sub(r'"seconds": (\[[^]]*\]|[^,}\]]+)', '"seconds": 0', text)


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """Each layout as the project's own generator writes it."""
    folders = {}
    for layout, count in (("refcoco", 4), ("grefcoco", 4), ("reasonseg", 12)):
        folders[layout] = tmp_path_factory.mktemp(layout)
        export_scenes(folders[layout], 3, count, "val", layout, world=SMALL_WORLD)
    return folders


# --- the generator's miniatures through the loaders -----------------------------------------------


def test_rare_kinds_get_as_many_cases_as_common_ones() -> None:
    every = 3 * len(get_args(Kind))
    drawn = [case.kind for case in scene_cases(5, every, per_kind=3)()]
    assert Counter(drawn) == dict.fromkeys(get_args(Kind), 3)
    plain = {(case.image, case.expression) for case in scene_cases(5, 400)()}
    (common,) = scene_cases(5, 1, per_kind=1)()
    assert (common.image, common.expression) in plain


def test_held_out_wordings_ask_about_the_same_scenes() -> None:
    """Other sentences, the same pictures and kinds."""
    trained, held = (
        {(c.image, c.kind, c.expression) for c in scene_cases(5, 200, wording=wording)()}
        for wording in ("train", "held-out")
    )
    assert {image for image, _, _ in trained} & {image for image, _, _ in held}
    known = {text for _, _, text in trained}
    assert sum(text in known for _, _, text in held) < 0.03 * len(held)


@pytest.mark.parametrize("name", ["refcoco", "grefcoco", "reasonseg"])
def test_the_loaders_read_the_generators_miniatures(miniatures, name):
    examples = list(load_examples(name, miniatures[name], "val"))
    assert len(examples) >= 3
    for example in examples:
        image = example.open_image()
        assert image.size == (256, 256)
        for mask, box in zip(example.truth(), example.boxes, strict=True):
            assert mask.area > 100 and mask.box == pytest.approx(box)
        assert all(example.expressions)
    targets = {len(example.masks) for example in examples}
    assert targets == {"refcoco": {1}, "reasonseg": {1}}.get(name, targets)
    if name == "grefcoco":
        assert 0 in targets and 1 in targets


# --- benchmarks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refcoco", "grefcoco", "reasonseg"])
def test_a_knowing_model_reaches_the_top(miniatures, tmp_path, name):
    model = knowing(benchmark_cases(name, miniatures[name], "val", None))
    report = evaluate_benchmark(model, name, miniatures[name], "val", BOTH, tmp_path)
    assert report["cIoU"] == report["gIoU"] == report["pr90"] == report["t_acc"] == 1
    assert report["box_acc50"] == 1
    assert report["n_acc"] == (1 if name == "grefcoco" else None)
    assert report["point_accuracy_plain"] > 0.9, "points are told on a grid of 1000"
    assert report["unreadable_replies"] == 0
    assert report["questions"] > report["strategies"]["box_only"]["questions"] == 1
    assert [one["metric"] for one in report["comparisons"]] == ["cIoU", "gIoU"]
    assert report["published"] == [], "a miniature is not the published split"
    markdown = (tmp_path / "report.md").read_text()
    assert "under protocol" in markdown and "SAM4MLLM" not in markdown
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") >= 3 and "http" not in page.replace("http-equiv", "")


def test_planted_faults_show_in_the_numbers(miniatures, tmp_path):
    cases = benchmark_cases("refcoco", miniatures["refcoco"], "val", None)
    model = knowing(cases)
    listed = list(cases())
    wrong = {listed[0].expression}
    model.mllm.unreadable = wrong
    lost = [case for case in listed if case.expression in wrong]
    areas = {case.case: case.truth()[0].area for case in listed}
    report = evaluate(model, cases, ["box_only"], tmp_path, {"title": "x"})
    total = sum(areas.values())
    assert report["cIoU"] == pytest.approx((total - sum(areas[case.case] for case in lost)) / total)
    assert report["gIoU"] == pytest.approx(1 - len(lost) / len(listed))
    assert report["unreadable_replies"] == len(lost)
    worst = read_lines(tmp_path)[0]
    assert worst.judged.error and worst.judged.outcome.iou == 0


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(miniatures, tmp_path):
    cases = benchmark_cases("grefcoco", miniatures["grefcoco"], "val", 12)
    whole = evaluate(knowing(cases), cases, BOTH, tmp_path / "whole", {"title": "x"})
    model = knowing(cases)
    folder = tmp_path / "broken"
    file = folder / "outcomes-0-of-1.jsonl"
    for last in (2, 5, 9):
        seen = []

        def kill(case, seen=seen, last=last):
            seen.append(case)
            if len(seen) == last:
                raise Killed

        with pytest.raises(Killed):
            evaluate(model, cases, BOTH, folder, {"title": "x"}, on_case=kill)
        file.write_bytes(file.read_bytes()[:-40])  # killed while writing: half a line
    report = evaluate(model, cases, BOTH, folder, {"title": "x"})
    assert timeless(report) == timeless(whole)
    assert len(read_lines(folder)) == 24
    asked = model.mllm.asked
    evaluate(model, cases, BOTH, folder, {"title": "x"})
    assert model.mllm.asked == asked, "a finished run asks nothing"


@pytest.mark.parametrize("total", [2, 3])
def test_shards_merge_exactly(miniatures, tmp_path, total):
    cases = benchmark_cases("grefcoco", miniatures["grefcoco"], "val", None)
    whole = evaluate(knowing(cases), cases, BOTH, tmp_path / "whole", {"title": "x"})
    for index in range(total):
        model = knowing(cases)
        report = evaluate(
            model, cases, BOTH, tmp_path / "s", {"title": "x"}, shard=Shard(index, total)
        )
    assert timeless(report) == timeless(whole)
    assert len(list((tmp_path / "s").glob("outcomes-*.jsonl"))) == total
    pictures = [
        {json.loads(line)["outcome"]["image"] for line in file.read_text().splitlines()}
        for file in (tmp_path / "s").glob("outcomes-*.jsonl")
    ]
    assert not set.intersection(*pictures), "a picture is read by one process only"


def test_shards_by_name_and_by_launcher(monkeypatch):
    assert Shard.parse("2/8") == Shard(2, 8)
    for bad in ("8/8", "2", "a/b", "-1/3"):
        with pytest.raises(InputError, match="shard"):
            Shard.parse(bad)
    assert Shard.from_environment() == Shard(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.from_environment() == Shard(3, 4)


def test_a_folder_belongs_to_one_run(miniatures, tmp_path):
    cases = benchmark_cases("refcoco", miniatures["refcoco"], "val", 2)
    model = knowing(cases)
    measure(model, cases(), BOTH, tmp_path, {"title": "x"})
    with pytest.raises(InputError, match="another run"):
        measure(model, cases(), BOTH, tmp_path, {"title": "y"})


# --- scenes ---------------------------------------------------------------------------------------


def test_scenes_by_kind(tmp_path):
    pool = scene_cases(5, POOL * 120)
    cases = sampled(pool, 120, 5)
    report = evaluate_scenes(knowing(pool), tmp_path, seed=5, limit=120)
    for key in ("cIoU", "gIoU", "box_acc50", "point_accuracy", "n_acc", "t_acc", "ece",
                "questions", "seconds"):  # fmt: skip
        assert report[key] is not None
    assert report["cases"] == 120
    assert {"absent", "category", "plural"} <= set(report["by_kind"])
    assert report["cIoU"] == report["n_acc"] == report["t_acc"] == report["box_acc50"] == 1
    assert report["ece"] == pytest.approx(0.03, abs=0.02), "certainty 0.97, always right"
    assert sum(one["cases"] for one in report["by_kind"].values()) == 120
    assert report["by_kind"]["absent"]["t_acc"] is None
    assert 0.4 < report["point_baseline"] < 0.95
    judged = {line.case for line in read_lines(tmp_path)}
    assert judged == {case.case for case in cases()}
    assert report["about"]["asked with"] == "0+"


def test_presence_is_asked_apart_so_that_t_acc_can_fall(tmp_path):
    cases = scene_cases(seed=5, limit=8 * POOL)
    model = knowing(cases)
    texts = {case.expression for case in cases() if case.boxes}
    generate = model.mllm.generate

    def denying(image, dialogue, **options):
        reply = generate(image, dialogue, **options)
        return replace(reply, text="No object found.") if "(0+)" in dialogue[-1].text else reply

    model.mllm.generate = denying
    once = ["box_only"]
    report = evaluate_scenes(model, tmp_path / "a", seed=5, limit=8, strategies=once, ask=None)
    assert texts and report["t_acc"] == 0 and report["cIoU"] == 1
    # Asked as the tools ask, the same model finds nothing: the question no longer helps it.
    report = evaluate_scenes(model, tmp_path / "b", seed=5, limit=8, strategies=once)
    assert report["t_acc"] == 0 and report["cIoU"] == 0 and report["questions"] == 1


def test_the_position_baseline_finds_position_and_nothing_else():
    rng = np.random.default_rng(0)

    def outcomes(rule):
        for n in range(400):
            u, v = rng.random(2)
            yield Outcome(str(n), str(n), 1, 1, 1, points=(PointOutcome(1, 0, rule(u, v), u, v),))

    central = position_baseline(list(outcomes(lambda u, v: abs(u - 0.5) + abs(v - 0.5) < 0.4)))
    chance = position_baseline(list(outcomes(lambda u, v: rng.random() < 0.7)))
    assert central > 0.8
    assert chance == pytest.approx(0.5, abs=0.08)
    assert position_baseline([]) is None


# --- pictures of cases ----------------------------------------------------------------------------


def test_the_comparison_outlines_what_is_right_and_stripes_what_is_wrong():
    image = RgbImage.from_pil(Image.new("RGB", (60, 20), (100, 100, 100)))
    truth, said = np.zeros((20, 60), bool), np.zeros((20, 60), bool)
    truth[2:18, 4:40], said[2:18, 20:56] = True, True
    pixels = np.asarray(compared(image, [Mask(truth)], [Mask(said)]))
    # 20…40 is right: its colours are kept within an outline of two lines
    assert (pixels[4:16, 22:38] == 100).all()
    assert (pixels[2:18, 20] == HIT).all() and (pixels[17, 20:40] == HIT).all()
    assert (pixels[3:17, 21] == 255).all()
    for left, colour, slope in ((4, MISSED, -1), (40, EXTRA, 1)):
        inner = pixels[3:17, left + 1 : left + 15]
        striped, white = (inner == colour).all(axis=2), (inner == 255).all(axis=2)
        assert 0.3 < striped.mean() < 0.5
        assert 0.08 < white.mean() < 0.2
        assert (inner[~striped & ~white] == 100).all()
        # a row further down, the stripes lie one pixel to the left (/) or to the right (\\)
        assert (np.roll(striped[0], slope)[1:-1] == striped[1][1:-1]).all()
    outside = ~(truth | said)
    assert (pixels[outside] == 100).all()


@pytest.mark.parametrize("number", [1, 2, 3, 7, 40])
def test_worst_median_and_best_never_share_a_case(number):
    from sam4mllm_tool.evaluation.judge import Judged

    lines = [
        Line("pqpp", Judged(Outcome(str(n), str(n), n, 100, n), "x", ()))
        for n in np.random.default_rng(0).permutation(number).tolist()
    ]
    groups = choose_lines(lines)
    shown = [line.case for group in groups.values() for line in group]
    assert len(shown) == len(set(shown)) >= min(3, number)
    assert groups["worst"][0].case == "0"
    if number > 1:
        assert groups["best"][0].case == str(number - 1)


def test_worst_median_and_best_are_of_different_pictures():
    from sam4mllm_tool.evaluation.judge import Judged

    lines = [  # picture 0 has the five worst and the five best cases
        Line(
            "pqpp", Judged(Outcome(f"{n:02}", str(0 if n < 5 or n > 24 else n), n, 99, n), "x", ())
        )
        for n in range(30)
    ]
    groups = choose_lines(lines, each=3)
    assert {name: [line.case for line in group] for name, group in groups.items()} == {
        "worst": ["00", "05", "06"],
        "median": ["15", "14", "16"],
        "best": ["24", "23", "22"],
    }
    alone = choose_lines(lines[:5])
    assert {name: len(group) for name, group in alone.items()} == {
        "worst": 1, "median": 0, "best": 0,
    }  # fmt: skip


# --- annotation -----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path, blocks):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "a.png", "deep/c.png"):
        blocks.pil.save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    return folder


def test_a_folder_becomes_coco_json(model, truth, pictures, tmp_path):
    out = tmp_path / "coco.json"
    texts = ["the red block", "all blocks", "a green block"]
    done = annotate(model, pictures, texts, out)
    assert list(done.failures) == ["broken.jpg"]
    coco = COCO(str(out))  # pycocotools reads it
    assert [image["file_name"] for image in coco.dataset["images"]] == [
        "a.png",
        "b.png",
        "deep/c.png",
    ]
    assert [c["name"] for c in coco.dataset["categories"]] == texts
    found = coco.loadAnns(coco.getAnnIds(imgIds=[1], catIds=[1]))
    assert np.array_equal(coco.annToMask(found[0]).astype(bool), truth["the red block"][0].pixels)
    assert found[0]["bbox"] == [70, 15, 120, 30] and found[0]["area"] == 3600
    assert len(coco.getAnnIds(imgIds=[2], catIds=[2])) == 2
    assert not coco.getAnnIds(catIds=[3])


def test_a_killed_annotation_loses_and_doubles_nothing(model, pictures, tmp_path):
    whole = annotate(model, pictures, ["all blocks"], tmp_path / "whole.json").document
    out = tmp_path / "broken.json"
    journal = tmp_path / "broken.json.journal.jsonl"
    for number in range(1, 4):
        count = 0

        def kill(_, number=number):
            nonlocal count
            count += 1
            if count == number:
                raise Killed

        with pytest.raises(Killed):
            annotate(model, pictures, ["all blocks"], out, on_picture=kill)
        journal.write_bytes(journal.read_bytes() + b'{"picture": "deep/c.p')
        assert not out.exists()
    done = annotate(model, pictures, ["all blocks"], out)
    assert done.done_before >= 2
    assert done.document == whole == json.loads(out.read_text())
    before = len(model.mllm.said)
    again = annotate(model, pictures, ["all blocks"], out)
    assert len(model.mllm.said) == before and again.document == whole


def test_failed_pictures_are_tried_again_and_new_ones_added(model, blocks, pictures, tmp_path):
    out = tmp_path / "coco.json"
    annotate(model, pictures, ["all blocks"], out)
    blocks.pil.save(pictures / "broken.jpg", "PNG")
    blocks.pil.save(pictures / "z.png")
    done = annotate(model, pictures, ["all blocks"], out)
    assert done.done_before == 3 and not done.failures
    assert len(done.document["images"]) == 5 and len(done.document["annotations"]) == 10
    ids = [one["id"] for one in done.document["annotations"]]
    assert ids == list(range(1, 11))


def test_a_backend_failure_stops_the_run_and_an_unreadable_reply_does_not(
    model, pictures, tmp_path
):
    def dead(*_, **__):
        raise BackendError("gone")

    broken = replace(model, segmenter=type(model.segmenter)())
    broken.segmenter.embed = dead
    with pytest.raises(BackendError):
        annotate(broken, pictures, ["all blocks"], tmp_path / "a.json")
    from sam4mllm_tool.protocols import Reply

    generate = model.mllm.generate
    model.mllm.generate = lambda image, dialogue, **options: (
        Reply("hm") if "odd" in dialogue[-1].text else generate(image, dialogue, **options)
    )
    done = annotate(model, pictures, ["odd", "all blocks"], tmp_path / "b.json")
    assert "a.png: odd" in done.failures and len(done.document["annotations"]) == 6


def test_expression_files(tmp_path, pictures):
    file = tmp_path / "x.txt"
    file.write_text("the dog\n\n  the cat \n")
    assert read_expressions(file) == ["the dog", "the cat"]
    file = tmp_path / "x.json"
    file.write_text('{"a.png": "the dog", "b.png": ["x", "x", "y"]}')
    assert plan(pictures, read_expressions(file)) == {"a.png": ["the dog"], "b.png": ["x", "y"]}
    for bad in ("{", "[1]", '{"a.png": 3}', "[]"):
        file.write_text(bad)
        with pytest.raises(InputError):
            read_expressions(file)
    with pytest.raises(InputError, match=r"'q\.png'"):
        plan(pictures, {"q.png": ["x"]})
    with pytest.raises(InputError, match="not a folder"):
        plan(tmp_path / "none", ["x"])
    with pytest.raises(InputError, match="no pictures"):
        (tmp_path / "empty").mkdir()
        plan(tmp_path / "empty", ["x"])


def test_another_runs_journal_is_refused(model, pictures, tmp_path):
    annotate(model, pictures, ["x"], tmp_path / "a.json")
    with pytest.raises(InputError, match="belongs to"):
        annotate(model, pictures, ["y"], tmp_path / "a.json")


# --- as typed -------------------------------------------------------------------------------------


def run(*arguments):
    result = RUNNER.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands(miniatures, pictures, tmp_path):
    document = json.loads(run("eval", "scenes", "--seed", "1", "--limit", "4", "--json"))
    assert {"cIoU", "gIoU", "box_acc50", "point_accuracy", "n_acc", "t_acc", "ece", "questions",
            "seconds", "by_kind", "intervals"} <= set(document)  # fmt: skip
    folder = tmp_path / "run"
    output = run(
        "eval", "refcoco", "--data", miniatures["refcoco"], "--split", "val", "--limit", "2",
        "--strategy", "box_only", "--out", folder,
    )  # fmt: skip
    assert "protocol ours" in output and (folder / "report.html").exists()
    file = tmp_path / "x.txt"
    file.write_text("the red block\n")
    out = tmp_path / "coco.json"
    told = run("annotate", pictures, "--expressions", file, "--out", out)
    assert "1 failures" in told
    assert len(json.loads(out.read_text())["images"]) == 3
    with pytest.raises(DatasetError, match="missing"):
        run("eval", "refcoco+", "--data", tmp_path, "--split", "val")


def test_the_published_benchmarks_have_their_commands():
    from sam4mllm_tool.cli.evaluate import BENCHMARKS
    from sam4mllm_tool.datasets import DATASETS

    assert {name: DATASETS[name].splits for name in BENCHMARKS} == BENCHMARKS
