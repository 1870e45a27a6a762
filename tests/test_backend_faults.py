"""What models may do wrong: every fault is a typed error, and the next call is answered."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from mcp import Client, MCPError
from sam4mllm_integrations.question_thinkers import LocalThinker
from test_integration_mcp import ERAS, RED, over_http

from sam4mllm_tool.errors import BackendError, DeviceOutOfMemory, EndpointError
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.protocols import MaskCandidate, Proposal, Reply
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import Box, Mask, YesNo

FULL = Mask(np.ones((120, 200), bool))
NAN_LOGITS = np.full((120, 200), math.nan, np.float32)


class Broken:
    """A model, one of whose methods goes wrong once it is told how."""

    def __init__(self, inner) -> None:
        self.inner, self.method, self.fault = inner, "", None
        self.calls = []

    def breaks(self, method, fault) -> None:
        self.method, self.fault = method, fault

    def __getattr__(self, name):
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def call(*args, **options):
            self.calls.append(name)
            if self.method != name:
                return found(*args, **options)
            self.method = ""
            if isinstance(self.fault, BaseException):
                raise self.fault
            return self.fault

        return call


@dataclass
class OneProposer:
    name: str = "one"

    def propose(self, image, phrase, limit):
        return [Proposal(Box(70, 15, 190, 45), 0.8)]


class Bench:
    """A toolbox over models that can be broken, and a call of each tool that asks one."""

    def __init__(self, truth, path) -> None:
        self.models = {
            "mllm": Broken(TruthfulMllm(truth)),
            "segmenter": Broken(ColourSegmenter()),
            "proposer": Broken(OneProposer()),
        }
        self.box = Toolbox(Sam4MLLM(**self.models))
        self.image = str(path)
        self.call("locate_object", RED)

    def call(self, name, arguments):
        return self.box.call(name, {"image": self.image} | arguments)

    def broken(self, model, method, fault, name, arguments) -> BackendError:
        """The error of a call in which a model goes wrong, after which the same call works."""
        broken = self.models[model]
        broken.calls.clear()
        broken.breaks(method, fault)
        with pytest.raises(BackendError) as caught:
            self.call(name, arguments)
        assert broken.calls[-1] == method  # it was asked, and then nothing more
        assert self.call(name, arguments).result.text
        return caught.value


@pytest.fixture
def bench(truth, blocks_file) -> Bench:
    return Bench(truth, blocks_file)


def segment(strategy):
    return "segment_object", RED | {"strategy": strategy}


POINTS = "is_point_inside_object", RED
PROMPTS = "segment_with_prompts", {"box": [70, 15, 190, 45]}
PROPOSE = "propose_objects", {"phrase": "block", **RED}
ASKED = [
    ("mllm", "generate", *segment("pqpp")),
    ("mllm", "generate", "locate_object", RED),
    ("mllm", "alternates", "locate_object", RED | {"alternates": 1}),
    ("mllm", "answer_yes_no", *segment("pqpp")),
    ("mllm", "answer_yes_no", *segment("adaptive")),
    ("mllm", "answer_yes_no", *segment("propose")),
    ("mllm", "answer_yes_no", *POINTS),
    ("mllm", "answer_yes_no", *PROPOSE),
    ("segmenter", "embed", *segment("pqpp")),
    ("segmenter", "embed", *segment("adaptive")),
    ("segmenter", "predict", *segment("box_only")),
    ("segmenter", "predict", *segment("adaptive")),
    ("segmenter", "predict", *PROMPTS),
    ("segmenter", "predict", *PROPOSE),
    ("proposer", "propose", *segment("propose")),
    ("proposer", "propose", *PROPOSE),
]
EACH_QUESTION = pytest.mark.parametrize(
    ("model", "method", "name", "arguments"),
    ASKED,
    ids=[f"{m}-{n}-{a.get('strategy', '')}" for _, m, n, a in ASKED],
)


def chained(error: Exception, cause: Exception) -> Exception:
    """An error as a client library raises it."""
    error.__cause__ = cause
    return error


RAISED = [
    (RuntimeError("CUDA error: device-side assert triggered"), BackendError, False),
    (KeyError("logits"), BackendError, False),
    (MemoryError(), DeviceOutOfMemory, True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), DeviceOutOfMemory, True),
    (TimeoutError("too late"), EndpointError, True),
    (ConnectionResetError(104, "reset\nby peer"), EndpointError, True),
    (chained(ValueError("no answer"), ConnectionRefusedError()), EndpointError, True),
]


@EACH_QUESTION
def test_whatever_a_model_raises_is_a_typed_error(bench, model, method, name, arguments):
    for raised, kind, retryable in RAISED:
        error = bench.broken(model, method, raised, name, arguments)
        assert type(error) is kind and error.retryable is retryable, raised
        assert error.hint and error.__cause__ is raised
        assert "\n" not in str(error) and type(raised).__name__ in error.message


def test_a_typed_error_stays_as_it_is(bench):
    gone = BackendError("gone", hint="come back", retryable=True)
    assert bench.broken("segmenter", "predict", gone, *segment("pqpp")) is gone


def reply(**options) -> Reply:
    return replace(Reply("[350, 125, 950, 375]", -0.1, 4, 1), **options)


def candidate(**options) -> tuple[MaskCandidate, ...]:
    return (replace(MaskCandidate(FULL, None, 0.9), **options),)


BOX = Box(70, 15, 190, 45)
NO_ANSWERS = {
    "generate": [None, "text", reply(text=None), reply(log_probability=math.nan),
                 reply(log_probability=math.inf), reply(log_probability=2.0)],
    "alternates": [[], None, [reply(log_probability=math.nan)]],
    "answer_yes_no": [None, [YesNo(math.nan, math.nan)] * 9, [YesNo(7.0, 0.0)] * 9,
                      [YesNo(-0.2, 0.5)] * 9, [YesNo(0.9, 0.8)] * 9, [0.5] * 9],
    "predict": [None, [], [()], [candidate()] * 2, [candidate(mask=Mask(FULL.pixels.T))],
                [candidate(predicted_iou=math.nan)], [candidate(logits=NAN_LOGITS)]],
    "propose": [None, [Proposal(Box(math.nan, 1, 2, 3))], [Proposal(BOX, 7.0)],
                [Proposal(BOX, math.nan)], [Proposal(BOX, 0.5, Mask(FULL.pixels.T))]],
}  # fmt: skip


@EACH_QUESTION
def test_an_answer_that_is_none_is_a_typed_error(bench, model, method, name, arguments):
    """NaN is below every threshold, and 7 above: read as answers, they would give some mask."""
    for fault in NO_ANSWERS.get(method, []):
        error = bench.broken(model, method, fault, name, arguments)
        assert not error.retryable and error.hint
        assert len(str(error).splitlines()) == 1 and bench.models[model].name in error.message


def test_probabilities_that_are_rounded_are_probabilities(bench):
    """Sums of a softmax in half precision are a little off."""
    bench.models["mllm"].breaks("answer_yes_no", [YesNo(1.0005, 0.0)] * 9)
    assert bench.call(*POINTS).result.points


def test_models_that_cannot_be_loaded_are_a_typed_error_every_time(model, blocks_file):
    faults = [RuntimeError("no kernel image"), ConnectionError("hub"), None]

    def load():
        if fault := faults.pop(0):
            raise fault
        return model

    box = Toolbox(load)
    for retryable in (False, True):
        with pytest.raises(BackendError) as caught:
            box.call("segment_object", RED | {"image": str(blocks_file)})
        assert caught.value.retryable is retryable
    assert box.call("segment_object", RED | {"image": str(blocks_file)}).result.objects


def test_the_workflows_own_questions_too(bench):
    bench.models["mllm"].breaks("generate", RuntimeError("CUDA error"))
    with pytest.raises(BackendError, match="CUDA error"):
        LocalThinker(bench.box).understand("what is red?", "img_1", None)


class BrokenSampler(Broken):
    def sample(self, *args, **options):  # looked for on the class
        return self.__getattr__("sample")(*args, **options)


@pytest.mark.parametrize("fault", [RuntimeError("CUDA error"), [], [reply(text=None)]])
def test_sampled_replies_too(truth, blocks, fault):
    broken = BrokenSampler(TruthfulMllm(truth))
    model = Sam4MLLM(broken, ColourSegmenter(), Settings(verification="posterior"))
    broken.breaks("sample", fault)
    with pytest.raises(BackendError):
        model.verify(blocks, "the red block", [BOX])
    assert model.verify(blocks, "the red block", [BOX])


# -- through the server --------------------------------------------------------------------------


@ERAS
async def test_a_client_is_told_in_one_line_and_the_next_call_is_answered(era, truth, blocks_file):
    broken = Broken(TruthfulMllm(truth))
    model = Sam4MLLM(broken, ColourSegmenter())
    arguments = RED | {"image": str(blocks_file)}
    with over_http(lambda: model, allow_dirs=[blocks_file.parent]) as url:
        async with Client(url, mode=era) as client:
            for raised, kind, retryable in RAISED:
                broken.breaks("generate", raised)
                # The same call again: it was not answered, and is made.
                for fails in (True, False):
                    meta = {"sam4mllm/call-id": f"{raised!r}"}
                    if fails:
                        with pytest.raises(MCPError) as caught:
                            await client.call_tool("segment_object", arguments, meta=meta)
                        error = caught.value.error
                        assert error.code == -32603 and "\n" not in error.message
                        assert error.data["error"] == kind.__name__
                        assert error.data["retryable"] is retryable
                        assert len(error.data["request_id"]) == 16
                    else:
                        answer = await client.call_tool("segment_object", arguments, meta=meta)
                        assert len(answer.structured_content["objects"]) == 1


@ERAS
async def test_a_bug_is_an_error_of_the_server_that_says_nothing_more(
    era, model, blocks_file, monkeypatch, caplog
):
    def bug(*_):
        raise LookupError("secret\nTraceback")

    monkeypatch.setattr("sam4mllm_tool.tools.workspace.Workspace.objects", bug)
    with over_http(lambda: model, allow_dirs=[blocks_file.parent]) as url:
        async with Client(url, mode=era) as client:
            with pytest.raises(MCPError) as caught:
                await client.call_tool("view_objects", {"image": str(blocks_file)})
            error = caught.value.error
            assert error.code == -32603 and "secret" not in json.dumps(error.model_dump())
            assert error.data["request_id"] in error.message
            assert "secret" in caplog.text and error.data["request_id"] in caplog.text


# -- the models' own processes -------------------------------------------------------------------


def test_a_timeout_of_a_replicas_model_is_not_taken_for_one_of_waiting():
    """Ray's error is an instance of the model's: read as "not yet", it would be waited for."""
    from ray.exceptions import RayTaskError

    from sam4mllm_tool.cluster.replicas import Replicas

    class Handle:
        asked = 0

        def options(self, **_):
            return self

        @property
        def call(self):
            return self

        def remote(self, *_):
            return self

        def result(self, timeout_s):
            self.asked += 1
            if self.asked == 1:
                raise TimeoutError("not yet")
            assert self.asked == 2, "asked again for an answer that is known"
            raise RayTaskError("call", "", TimeoutError("late")).as_instanceof_cause()

    handle = Handle()
    replicas = Replicas(handle)
    replicas._stored = lambda image: None
    with pytest.raises(TimeoutError, match="late"):
        replicas.call("generate", type("Image", (), {"digest": "a"}))
    assert handle.asked == 2
