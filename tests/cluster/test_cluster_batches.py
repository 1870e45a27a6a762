"""Batches on Ray Data: the same documents as one process makes, whatever dies meanwhile."""

import json
import os
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sam4mllm_tool.annotate import annotate
from sam4mllm_tool.cli import app as cli
from sam4mllm_tool.errors import CheckpointError, ClusterError, InputError
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.types import Mask

TEXTS = ["the red block", "all blocks"]
# The first test waits for the cluster too.
pytestmark = pytest.mark.timeout(900)


@dataclass
class Mortal(TruthfulMllm):
    """Ends its process, as often as ``deaths`` has lines, at the picture of that width."""

    deaths: str = ""
    at_width: int = 0

    def generate(self, image, dialogue, **options):
        lives = Path(self.deaths)
        if image.width == self.at_width and lives.read_text():
            lives.write_text(lives.read_text()[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(image, dialogue, **options)


def mortal(truth: dict[str, list[Mask]], deaths: str = "", at_width: int = 0) -> Sam4MLLM:
    return Sam4MLLM(Mortal(truth, deaths=deaths, at_width=at_width), ColourSegmenter())


def no_weights() -> Sam4MLLM:
    raise CheckpointError("nothing there", hint="Check the path.")


@pytest.fixture
def by_value(ray_cluster):
    """Workers do not have the tests: what is of this module travels whole."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(__import__(__name__))


@pytest.fixture
def pictures(tmp_path, blocks):
    """Forty pictures, each of its own width, so that no two are taken for each other."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        wider = Image.new("RGB", (blocks.width + number, blocks.height), (255, 255, 255))
        wider.paste(blocks.pil, (0, 0))
        wider.save(folder / f"{number:02}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def wide_truth(truth):
    import numpy as np

    def widened(mask: Mask) -> Mask:
        return Mask(np.pad(mask.pixels, ((0, 0), (0, 40))))

    return {text: [widened(mask) for mask in masks] for text, masks in truth.items()}


def workers(load, number=2):
    from sam4mllm_tool.cluster.batches import RayAnnotation, Workers

    return RayAnnotation(Workers(load, number, cpus=0.5))


def journal(out: Path) -> list[str]:
    lines = out.with_name(out.name + ".journal.jsonl").read_text().splitlines()
    return sorted(json.loads(line)["picture"] for line in lines[1:])


def test_the_document_of_one_process_though_workers_die(by_value, pictures, wide_truth, tmp_path):
    alone = tmp_path / "alone.json"
    expected = annotate(mortal(wide_truth), pictures, TEXTS, alone)
    assert list(expected.failures) == ["broken.jpg"]
    deaths = tmp_path / "deaths"
    deaths.write_text("xx")
    out = tmp_path / "ray.json"
    load = partial(mortal, wide_truth, str(deaths), 217)
    done = annotate(workers(load), pictures.as_uri(), TEXTS, out)
    assert deaths.read_text() == "", "nobody died"
    assert out.read_bytes() == alone.read_bytes()
    assert done.failures.keys() == expected.failures.keys()
    assert journal(out) == sorted(path.name for path in pictures.iterdir())


def test_a_picture_that_ends_every_worker_is_a_failure_of_its_own(
    by_value, pictures, wide_truth, tmp_path
):
    deaths = tmp_path / "deaths"
    deaths.write_text("x" * 100)
    out = tmp_path / "ray.json"
    load = partial(mortal, wide_truth, str(deaths), 239)
    done = annotate(workers(load), pictures, TEXTS, out)
    assert sorted(done.failures) == ["39.png", "broken.jpg"]
    assert "3 workers died on this picture" in done.failures["39.png"]
    assert len(done.document["images"]) == 39 and len(done.document["annotations"]) == 117
    assert len(deaths.read_text()) == 97
    # It is tried again by the next run, with more memory perhaps.
    deaths.write_text("")
    done = annotate(workers(load), pictures, TEXTS, out)
    assert done.done_before == 39 and list(done.failures) == ["broken.jpg"]
    assert len(done.document["images"]) == 40


def test_what_a_worker_raises_keeps_its_type(by_value, pictures, tmp_path):
    with pytest.raises(CheckpointError, match="nothing there") as raised:
        annotate(workers(no_weights), pictures, TEXTS, tmp_path / "a.json")
    assert raised.value.hint == "Check the path."


def test_evaluation_reports_what_one_process_reports(by_value, tmp_path):
    from test_evaluation import timeless

    from sam4mllm_tool.cluster.batches import RayEvaluation, Workers
    from sam4mllm_tool.evaluation.scenes import evaluate_scenes
    from sam4mllm_tool.pipeline.results import Settings

    settings = Settings(points=4)
    load = partial(nothing_known, settings)
    options = {"seed": 3, "limit": 12, "strategies": ["pqpp", "box_only"]}
    alone = evaluate_scenes(load(), tmp_path / "alone", **options)
    seen = []
    engine = RayEvaluation(Workers(load, 2, cpus=0.5), settings)
    spread = evaluate_scenes(engine, tmp_path / "ray", **options, on_case=seen.append)
    assert timeless(spread) == timeless(alone)
    assert len(seen) == len(set(seen)) == 12


def nothing_known(settings) -> Sam4MLLM:
    return replace(mortal({}), settings=settings)


def test_the_command_line_needs_ray_and_finds_no_cluster(monkeypatch, pictures, tmp_path):
    from benchmarks.load_server import free_port

    (tmp_path / "texts.txt").write_text("the red block\n")
    options = ["--expressions", str(tmp_path / "texts.txt"), "--engine", "ray"]
    run = partial(CliRunner().invoke, cli)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "ray", None)
        failed = run(["annotate", str(pictures), *options]).exception
        assert isinstance(failed, InputError) and "[ray]" in failed.hint
    failed = run(["eval", "scenes", "--engine", "ray", "--shard", "0/2"]).exception
    assert isinstance(failed, InputError) and "shard" in failed.hint
    if not __import__("ray").is_initialized():
        address = f"127.0.0.1:{free_port()}"
        failed = run(["annotate", str(pictures), *options, "--address", address]).exception
        assert isinstance(failed, ClusterError)
