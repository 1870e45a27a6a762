"""The tools on Ray Serve: processes are killed, added and removed, and no call notices."""

import os
import pickle
import signal
import time
from functools import partial
from pathlib import Path

import anyio
import pytest
from PIL import Image
from typer.testing import CliRunner

from sam4mllm_tool.cli import app as cli
from sam4mllm_tool.errors import (
    Busy,
    ClusterError,
    DialogueError,
    InputError,
    PointOutsideImage,
    ThoughtCutOff,
)
from sam4mllm_tool.protocols import NO_NOTES, Reply, Turn
from sam4mllm_tool.types import RgbImage

CLIENTS, CALLS = 5, 4
# The first test waits for the cluster too.
pytestmark = pytest.mark.timeout(900)
EXAMPLES = Path(__file__).parents[2] / "examples" / "ray"


@pytest.mark.parametrize(
    "error",
    [
        DialogueError("no box", raw_reply="[1, 2", hint="Ask again."),
        ThoughtCutOff(raw_reply="hm", budget=9),
        Busy("full", retry_after=3.0),
        PointOutsideImage("(9, 9)", retryable=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_arrive_whole_from_another_process(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert (str(arrived), vars(arrived)) == (str(error), vars(error))


# -- the command line, without a cluster -----------------------------------------------------------


def test_without_ray_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    failed = CliRunner().invoke(cli, ["serve", "--engine", "ray"]).exception
    assert isinstance(failed, InputError)
    assert failed.hint == 'Run: pip install "sam4mllm-tool[ray]"'


def test_more_processes_need_ray_and_more_servers_a_state():
    for wrong in (["--replicas", "2"], ["--engine", "ray", "--servers", "2"]):
        assert isinstance(CliRunner().invoke(cli, ["serve", *wrong]).exception, InputError)


def test_no_cluster_at_the_address():
    from benchmarks.load_server import free_port
    from sam4mllm_tool.cluster.connect import cluster

    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        with pytest.raises(ClusterError, match=f"no Ray cluster at {address}"), cluster(address):
            pass


def test_the_options_arrive(monkeypatch, tmp_path):
    from sam4mllm_integrations import mcp_ray

    given = []
    monkeypatch.setattr(mcp_ray, "serve_ray", lambda settings, address, **_: given.append(settings))
    monkeypatch.chdir(tmp_path)
    options = "--engine ray --replicas 3 --sam-replicas 2 --gpus 0.5 --servers 2 --state here"
    result = CliRunner().invoke(cli, ["serve", *options.split(), "--allow-dir", "pictures"])
    assert result.exception is None, result.output
    (settings,) = given
    assert (settings.replicas, settings.segmenters, settings.gpus) == (3, 2, 0.5)
    assert (settings.state, settings.allow_dirs) == (tmp_path / "here", (tmp_path / "pictures",))


def test_an_open_address_needs_a_token(monkeypatch):
    from sam4mllm_integrations.mcp_ray import ServeSettings, app

    with pytest.raises(InputError, match="can be reached from other machines"):
        app(ServeSettings(host="0.0.0.0"))
    monkeypatch.setenv("SAM4MLLM_TOKEN", "secret")
    app(ServeSettings(host="0.0.0.0"))


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_the_example_configurations_are_as_serve_and_we_read_them(name):
    import yaml
    from ray.serve.schema import ServeDeploySchema
    from sam4mllm_integrations.mcp_ray import ServeSettings

    document = yaml.safe_load((EXAMPLES / name).read_text())
    if name == "kuberay.yaml":
        document = yaml.safe_load(document["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(document).applications
    assert application.import_path == "sam4mllm_integrations.mcp_ray:app"
    assert {one.name for one in application.deployments} == {"Mllm", "Segmenter", "Tools"}
    settings = ServeSettings(**application.args)
    assert settings.model_calls == 2 * application.deployments[0].autoscaling_config["max_replicas"]


# -- on a cluster ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(ray_cluster, tmp_path_factory):
    """The application with stand-ins, two replicas of each."""
    from benchmarks.ray_app import served

    one = served(tmp_path_factory.mktemp("serve"), ray_cluster, CLIENTS, think=0.05)
    one.deploy(2)
    return one


def outcome(served, events, repeat):
    """Run the clients until all events are over; each waits for that many calls to be answered."""
    from benchmarks import ray_app, replicas

    async def happen(tally):
        for answered, event, what in events:
            while tally.outcomes["ok"] < answered:
                await anyio.sleep(0.02)
            await anyio.to_thread.run_sync(event, what)

    begin = partial(replicas.run, events=happen, repeat=repeat)
    report = anyio.run(begin, served.url, ray_app.block_questions(CLIENTS), CALLS)
    wrong = {name: report[name] for name in replicas.OUTCOMES if name != "ok"}
    assert wrong == dict.fromkeys(wrong, 0), report["examples"]
    assert report["ok"] >= CLIENTS * CALLS


def replace_one(deployment):
    """End a process and wait for its successor."""
    from benchmarks.ray_app import processes

    others = set(processes(deployment))
    victim = others.pop()
    victim.kill()
    until = time.monotonic() + 200
    while len(set(processes(deployment)) - {victim}) <= len(others):
        assert time.monotonic() < until, f"no new {deployment}"
        time.sleep(0.2)


def test_killed_replicas_and_tool_servers_fail_no_call(served):
    """The short form of ``python -m benchmarks.replicas``.

    Clients make a call again if its connection breaks, and all of them at the end.
    """
    victims = enumerate(("Mllm", "Segmenter", "Tools"), 1)
    outcome(served, [(6 * n, replace_one, name) for n, name in victims], repeat=True)


def test_replicas_come_and_go_under_load(served):
    outcome(served, [(6, served.deploy, 1), (12, served.deploy, 2)], repeat=False)


class Witness:
    """Says which process answers; ends it, or fails, if it is told to."""

    name, format_name, notes = "witness", "sam4mllm", NO_NOTES

    def generate(self, image, dialogue, *, grammar=None, max_new_tokens=256):
        if dialogue[-1].text == "end":
            os.kill(os.getpid(), signal.SIGKILL)
        if dialogue[-1].text == "fail":
            raise DialogueError("no box", raw_reply="[1, 2", hint="Ask again.")
        return Reply(str(os.getpid()), tokens=image.width)


@pytest.fixture(scope="module")
def witness(ray_cluster):
    from ray import cloudpickle, serve

    from sam4mllm_tool.cluster.deployments import model_deployment
    from sam4mllm_tool.cluster.replicas import RemoteMllm, Replicas

    cloudpickle.register_pickle_by_value(__import__(__name__))
    options = {"replicas": 2, "cpus": 0.1, "gpus": 0, "calls": 4}
    handle = serve.run(model_deployment("Witness", Witness, **options), name="witness",
                       route_prefix=None)  # fmt: skip
    yield RemoteMllm(Replicas(handle, attempts=2))
    serve.delete("witness")


def asked(mllm, shade: int, text: str = "where?") -> Reply:
    image = RgbImage.from_pil(Image.new("RGB", (30 + shade, 20), (shade, 0, 0)))
    return mllm.generate(image, (Turn("user", text),))


def test_a_picture_is_read_by_one_replica(witness):
    pictures = range(8)
    first = {shade: asked(witness, shade) for shade in pictures}
    assert {shade: reply.tokens for shade, reply in first.items()} == {n: 30 + n for n in pictures}
    assert len({reply.text for reply in first.values()}) == 2  # both have work
    anyio.run(anyio.sleep, 1)  # replicas tell what they have ten times a second
    for _ in range(3):
        assert {shade: asked(witness, shade) for shade in pictures} == first


def test_what_a_model_raises_arrives_and_a_deadly_call_has_an_end(witness):
    with pytest.raises(DialogueError, match="no box") as raised:
        asked(witness, 1, "fail")
    assert type(raised.value) is DialogueError
    assert (raised.value.raw_reply, raised.value.hint) == ("[1, 2", "Ask again.")
    with pytest.raises(ClusterError, match="2 replicas in turn died"):
        asked(witness, 1, "end")
    assert asked(witness, 1).tokens == 31  # the others' calls are served again


def test_what_the_cluster_cannot_place_is_refused(ray_cluster):
    from sam4mllm_integrations.mcp_ray import ServeSettings, app, deploy

    for too_much in ({"gpus": 1}, {"cpus": 50}):
        settings = ServeSettings(**too_much)
        with pytest.raises(ClusterError, match=r"are needed and the cluster has"):
            deploy(app(settings), settings)


def test_weights_that_cannot_be_loaded_end_the_start(ray_cluster):
    """The last test: it replaces what is served."""
    from sam4mllm_integrations.mcp_ray import ServeSettings, deploy, front

    from benchmarks.ray_app import processes
    from sam4mllm_tool.cluster.deployments import model_deployment
    from sam4mllm_tool.segmenter import load_segmenter

    settings = ServeSettings(port=ray_cluster, cpus=0.1)
    options = {"replicas": 1, "cpus": 0.1, "gpus": 0, "calls": 1}
    load = partial(load_segmenter, "/no/such/checkpoint")
    models = [model_deployment(name, load, **options) for name in ("Mllm", "Segmenter")]
    with pytest.raises(ClusterError, match=r"started: CheckpointError: .*/no/such/checkpoint"):
        deploy(front(settings, *models), settings)
    assert not processes("Mllm")
