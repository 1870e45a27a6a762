"""Evaluation with bad pictures, full disks, damaged files and two processes at once."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam4mllm_tool.annotate import annotate
from sam4mllm_tool.datasets import load_examples
from sam4mllm_tool.errors import DatasetError, InputError, StorageError
from sam4mllm_tool.evaluation.benchmark import benchmark_cases, evaluate, evaluate_benchmark
from sam4mllm_tool.evaluation.bootstrap import Bootstrap
from sam4mllm_tool.evaluation.cases import Case, sampled
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.evaluation.run import Shard, measure, read_lines
from sam4mllm_tool.journal import open_journal, read_journal
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.protocols import NO_NOTES, CheckpointNotes
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.types import Box, Mask, RgbImage

SIDE = 48


@dataclass
class MoodyMllm:
    """Answers truly; how sure it is depends on how much it was asked about the picture before."""

    truths: dict[str, dict[str, list[Mask]]]
    name: str = "moody"
    format_name: str = "sam4mllm"
    notes: CheckpointNotes = NO_NOTES
    asked: dict[str, int] = field(default_factory=dict)

    def generate(self, image, dialogue, **options):
        self.asked[image.digest] = self.asked.get(image.digest, 0) + 1
        return self._of(image).generate(image, dialogue, **options)

    def alternates(self, image, dialogue, **options):
        return self._of(image).alternates(image, dialogue, **options)

    def answer_yes_no(self, image, dialogue, **options):
        return self._of(image).answer_yes_no(image, dialogue, **options)

    def _of(self, image):
        certainty = 0.9 + 0.01 * self.asked.get(image.digest, 0) % 0.05
        return TruthfulMllm(self.truths[image.digest], certainty=certainty)


def picture(number: int) -> bytes:
    """A red block, somewhere else in each picture."""
    pixels = np.full((SIDE, SIDE + 8, 3), 255, np.uint8)
    pixels[4 + number : 20 + number, 8:30] = (214, 40, 40)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def folder_cases(folder, pictures=4, each=3):
    """``each`` expressions about each picture file."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(pictures):
        (folder / f"{n}.png").write_bytes(picture(n))

    def cases():
        for n in range(pictures):
            pixels = np.zeros((SIDE, SIDE + 8), bool)
            pixels[4 + n : 20 + n, 8:30] = True
            for k in range(each):
                yield Case(
                    f"{n}:{k}", f"{n}.png", f"block {n} {k}",
                    lambda n=n: _opened(folder / f"{n}.png"), lambda m=pixels: [Mask(m)],
                    (Box(8, 4 + n, 30, 20 + n),),
                )  # fmt: skip

    return cases


def _opened(path):
    from sam4mllm_tool.images.loading import load_image

    return load_image(path).image


def moody(pictures=4, each=3) -> Sam4MLLM:
    truths = {}
    for n in range(pictures):
        image = RgbImage.from_pil(Image.open(BytesIO(picture(n))))
        pixels = (image.array == (214, 40, 40)).all(axis=2)
        truths[image.digest] = {f"block {n} {k}": [Mask(pixels)] for k in range(each)}
    return Sam4MLLM(MoodyMllm(truths), ColourSegmenter())


def timeless(report):
    return re.sub(r'"seconds": (\[[^]]*\]|[^,}\]]+)', '"seconds": 0', json.dumps(report))


# --- pictures that cannot be read -----------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut off", "missing", "empty", "another size"])
def test_an_unreadable_picture_is_skipped_named_and_counted(tmp_path, fault):
    cases = folder_cases(tmp_path / "data")
    file = tmp_path / "data/2.png"
    whole = file.read_bytes()
    match fault:
        case "missing":
            file.unlink()
        case "cut off":
            file.write_bytes(whole[: len(whole) // 2])
        case "empty":
            file.write_bytes(b"")
        case "another size":
            file.write_text("not a picture")
    run = tmp_path / "run"
    report = evaluate(moody(), cases, ["pqpp"], run, {"title": "x"})
    assert report["cases"] == 9
    (skipped,) = report["skipped"]
    assert skipped["image"] == "2.png" and skipped["cases"] == ("2:0", "2:1", "2:2")
    for page in ("report.md", "report.html", "report.json"):
        assert "2.png" in (run / page).read_text()
    assert "1 pictures (3 cases) cannot be read" in (run / "report.md").read_text()
    # Once the picture is there, the same command fills the gap, and nothing else is asked again.
    file.write_bytes(whole)
    model = moody()
    report = evaluate(model, cases, ["pqpp"], run, {"title": "x"})
    assert report["skipped"] == [] and report["cases"] == 12
    assert len(model.mllm.asked) == 1
    again = evaluate(moody(), cases, ["pqpp"], tmp_path / "whole", {"title": "x"})
    assert timeless(report) == timeless(again)


def test_too_many_unreadable_pictures_end_the_run_and_keep_what_was_judged(tmp_path):
    cases = folder_cases(tmp_path / "data", pictures=6)
    for n in (1, 3, 4):
        (tmp_path / f"data/{n}.png").write_bytes(b"x")
    run = tmp_path / "run"
    with pytest.raises(DatasetError, match="3 pictures cannot be read") as error:
        measure(moody(6), cases(), ["pqpp"], run, {"title": "x"}, unreadable_limit=2)
    assert "--unreadable-limit" in error.value.hint
    assert {line.judged.outcome.image for line in read_lines(run)} == {"0.png", "2.png"}
    model = moody(6)
    measure(model, cases(), ["pqpp"], run, {"title": "x"}, unreadable_limit=3)
    assert {line.judged.outcome.image for line in read_lines(run)} == {"0.png", "2.png", "5.png"}


def test_a_corrupt_reasonseg_pair_is_passed_over(tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for n in range(3):
        Image.open(BytesIO(picture(n))).convert("RGB").save(folder / f"{n}.jpg")
        shape = {"label": "target", "points": [[8, 4 + n], [29, 4 + n], [29, 19 + n], [8, 19 + n]]}
        notes = {"text": [f"block {n}"], "is_sentence": True, "shapes": [shape]}
        (folder / f"{n}.json").write_text(json.dumps(notes))
    (folder / "0.json").write_text('{"text": ["cut o')
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:100])
    good = [e for e in load_examples("reasonseg", tmp_path, "val") if e.fault is None]
    assert [e.example_id for e in good] == ["2"]
    image = good[0].open_image()
    model = Sam4MLLM(MoodyMllm({image.digest: {"block 2": good[0].truth()}}), ColourSegmenter())
    run = tmp_path / "run"
    report = evaluate_benchmark(model, "reasonseg", tmp_path, "val", ["pqpp"], run)
    assert report["cases"] == 1
    assert [one["image"] for one in report["skipped"]] == ["0", "1"]
    assert "0.json" in report["skipped"][0]["error"]
    assert "1.j" in report["skipped"][1]["error"]


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [1, 3, 4, 8, 13, 20])
def test_probabilities_of_a_resumed_run_are_those_of_a_whole_one(tmp_path, lines):
    """Though the model's certainty depends on what it was asked before on the picture."""
    cases = folder_cases(tmp_path / "data")
    both = ["pqpp", "box_only"]
    whole = evaluate(moody(), cases, both, tmp_path / "whole", {"title": "x"})
    file = tmp_path / "whole/outcomes-0-of-1.jsonl"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_bytes((tmp_path / "whole/run.json").read_bytes())
    kept = file.read_bytes().splitlines(keepends=True)[:lines]
    (broken / file.name).write_bytes(b"".join(kept)[:-7])
    resumed = evaluate(moody(), cases, both, broken, {"title": "x"})
    assert timeless(resumed) == timeless(whole)
    said = [[line.judged.outcome.points for line in read_lines(tmp_path / name)]
            for name in ("whole", "broken")]  # fmt: skip
    assert said[0] == said[1] and len({p[0].p_yes for p in said[0] if p}) > 1


def test_a_damaged_line_names_the_file_and_the_line(tmp_path):
    cases = folder_cases(tmp_path / "data")
    evaluate(moody(), cases, ["pqpp"], tmp_path / "run", {"title": "x"})
    file = tmp_path / "run/outcomes-0-of-1.jsonl"
    text = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*text[:4], "\x00\x00\x00\n", *text[4:]]))
    with pytest.raises(InputError, match=r"outcomes-0-of-1\.jsonl, line 5 is damaged"):
        evaluate(moody(), cases, ["pqpp"], tmp_path / "run", {"title": "x"})


# --- a sample -------------------------------------------------------------------------------------


def test_a_limit_is_a_seeded_sample_over_pictures(tmp_path):
    cases = folder_cases(tmp_path / "data", pictures=10, each=12)
    order = [case.case for case in cases()]
    drawn = {seed: [case.case for case in sampled(cases, 8, seed)()] for seed in range(5)}
    for names in drawn.values():
        assert len({name.partition(":")[0] for name in names}) == len(names) == 8
        assert names == sorted(names, key=order.index), "pictures stay together, in order"
    assert len({tuple(names) for names in drawn.values()}) == 5
    assert drawn[3] == [case.case for case in sampled(cases, 8, 3)()]
    more = [case.image for case in sampled(cases, 25, 0)()]
    assert {more.count(image) for image in set(more)} == {2, 3}
    assert [case.case for case in sampled(cases, 500, 0)()] == order


def test_every_expression_is_as_likely_as_any_other(tmp_path):
    """Over many seeds; pictures with more expressions are drawn more often."""
    sizes = (1, 2, 5)

    def cases():
        for n, size in enumerate(sizes):
            for k in range(size):
                yield Case(f"{n}:{k}", str(n), "x", lambda: None, lambda: [], ())

    first = [next(iter(sampled(cases, 1, seed)())).image for seed in range(1600)]
    shares = [first.count(str(n)) / len(first) for n in range(3)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.04)


def test_one_picture_gives_no_interval():
    outcomes = [Outcome(str(n), "one", 40 + n, 100, 50) for n in range(12)]
    found = Bootstrap().estimate(outcomes, METRICS["cIoU"])
    assert found.value == pytest.approx(sum(o.intersection for o in outcomes)
                                        / sum(o.union for o in outcomes))  # fmt: skip
    assert found.low is None and found.high is None


# --- two processes --------------------------------------------------------------------------------


def test_a_second_process_on_the_same_shard_is_refused(tmp_path):
    cases = folder_cases(tmp_path / "data")
    run = tmp_path / "run"
    refused = []

    def meanwhile(case):
        try:
            measure(moody(), cases(), ["pqpp"], run, {"title": "x"})
        except InputError as error:
            refused.append(error)

    measure(moody(), cases(), ["pqpp"], run, {"title": "x"}, on_case=meanwhile)
    assert len(refused) == 12
    assert all("another process" in error.message and error.retryable for error in refused)
    lines = (run / "outcomes-0-of-1.jsonl").read_text().splitlines()
    assert len(lines) == 12
    # The other half of a run in two is not in the way.
    one, two = Shard(0, 2), Shard(1, 2)
    both = tmp_path / "both"
    measure(moody(), cases(), ["pqpp"], both, {"title": "x"}, shard=one,
            on_case=lambda _: measure(moody(), cases(), ["pqpp"], both, {"title": "x"},
                                      shard=two))  # fmt: skip
    assert len(read_lines(both)) == 12


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from sam4mllm_tool.disk import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'x'):\n    os._exit(9)"
    )
    lock = tmp_path / ".lock-0-of-1"
    assert subprocess.run([sys.executable, "-c", code, str(lock)]).returncode == 9
    assert lock.exists()
    measure(moody(), folder_cases(tmp_path / "data")(), ["pqpp"], tmp_path, {"title": "x"})


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """After ``room`` bytes every write fails half-way, as on a full disk."""
    write = os.write

    def limit(room):
        left = [room]

        def some(descriptor, data):
            if len(data) > left[0]:
                written, left[0] = left[0], 0
                if written:
                    return write(descriptor, bytes(data)[:written])
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= len(data)
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", some)

    yield limit
    monkeypatch.setattr(os, "write", write)


def test_a_full_disk_gives_a_typed_error_and_keeps_the_last_good_state(
    tmp_path, full_disk, monkeypatch
):
    cases = folder_cases(tmp_path / "data")
    whole = evaluate(moody(), cases, ["pqpp"], tmp_path / "whole", {"title": "x"})
    run, size = tmp_path / "run", (tmp_path / "whole/outcomes-0-of-1.jsonl").stat().st_size
    full_disk(size // 2)
    with pytest.raises(StorageError, match="No space left on device") as error:
        evaluate(moody(), cases, ["pqpp"], run, {"title": "x"})
    assert error.value.retryable and "outcomes-0-of-1.jsonl" in error.value.message
    kept = read_journal(run / "outcomes-0-of-1.jsonl")
    data = (run / "outcomes-0-of-1.jsonl").read_bytes()
    assert 3 < len(kept) < 9 and data.endswith(b"}\n")
    full_disk(10 * size)
    resumed = evaluate(moody(), cases, ["pqpp"], run, {"title": "x"})
    assert timeless(resumed) == timeless(whole)


REAL = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_evaluation_survives import *
where = Path(sys.argv[1])
cases = folder_cases(where / "data", pictures=12, each=8)
try:
    evaluate(moody(12, 8), cases, ["pqpp"], where / "small/run", {{"title": "x"}})
except StorageError as error:
    print("typed:", error.message)
    print("kept:", len(read_journal(where / "small/run/outcomes-0-of-1.jsonl")))
"""


def test_a_really_full_disk(tmp_path):
    """The same on a file system of 64 KiB, where the kernel says so."""
    (tmp_path / "small").mkdir()
    script = tmp_path / "fill.py"
    tests = Path(__file__).parent
    script.write_text(REAL.format(root=str(tests.parent), tests=str(tests)))
    mount = f"mount -t tmpfs -o size=64k none {tmp_path / 'small'} && exec {sys.executable}"
    command = ["unshare", "-Urm", "sh", "-c", f"{mount} {script} {tmp_path}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("file systems cannot be mounted here")
    assert "typed:" in done.stdout and "No space left on device" in done.stdout, done.stderr
    assert int(done.stdout.partition("kept: ")[2]) > 4


def test_annotation_on_a_full_disk_and_in_two_processes(
    model, blocks, tmp_path, full_disk, monkeypatch
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(4):
        blocks.pil.save(folder / f"{n}.png")
    out = tmp_path / "coco.json"
    whole = annotate(model, folder, ["all blocks"], tmp_path / "whole.json").document
    full_disk(900)
    with pytest.raises(StorageError, match="No space left"):
        annotate(model, folder, ["all blocks"], out)
    full_disk(10**6)
    refused = []

    def meanwhile(_):
        try:
            annotate(model, folder, ["all blocks"], out)
        except InputError as error:
            refused.append(error.message)

    done = annotate(model, folder, ["all blocks"], out, on_picture=meanwhile)
    assert done.done_before >= 1 and done.document == whole
    assert len(refused) == 4 and "another process" in refused[0]


def test_a_journal_that_cannot_be_opened_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError), open_journal(tmp_path / "file" / "a.jsonl"):
        pass


# --- as typed -------------------------------------------------------------------------------------


def test_limits_by_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sam4mllm_tool.cli import app, evaluate
    from sam4mllm_tool.scenes.export import export_scenes
    from sam4mllm_tool.scenes.world import SMALL_WORLD

    blind = Sam4MLLM(TruthfulMllm({}), ColourSegmenter())
    monkeypatch.setattr(evaluate, "load_models", lambda *_, **__: blind)
    data = export_scenes(tmp_path / "data", 3, 5, "val", "refcoco", world=SMALL_WORLD)
    pictures = sorted(data.rglob("*.jpg"))
    pictures[1].write_bytes(pictures[1].read_bytes()[:300])
    limit = ["--data", str(data), "--split", "val", "--strategy", "box_only", "--limit", "5"]
    arguments = ["eval", "refcoco", *limit, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["cases"] == 4 and len(report["skipped"]) == 1
    lines = read_lines(tmp_path / "run")
    assert len({line.judged.outcome.image for line in lines}) == 4
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(DatasetError, match="1 pictures cannot be read"):
        CliRunner().invoke(app, [*arguments, "--unreadable-limit", "0"], catch_exceptions=False)
    cases = benchmark_cases("refcoco", data, "val", 5, seed=1)
    assert len({replace(case).image for case in cases()}) == 5
