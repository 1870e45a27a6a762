"""Calls to replicas, without a cluster: retries, their number, and what one call carries."""

import asyncio
import pickle

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError

from sam4mllm_tool.cluster import replicas
from sam4mllm_tool.cluster.deployments import ModelReplica
from sam4mllm_tool.cluster.replicas import RemoteMllm, Replicas
from sam4mllm_tool.concurrency import CallCancelled, CallContext, call_context
from sam4mllm_tool.errors import Busy, ClusterError, DeviceOutOfMemory
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.protocols import Question, Turn

LOST = ObjectLostError("00", None, "here")


class Scripted:
    """In place of Serve's handle: each call ends as the next of ``ends`` says."""

    def __init__(self, *ends):
        self.ends, self.pictures = list(ends), []
        self.call = self.about = self

    def options(self, **_):
        return self

    def remote(self, *arguments):
        self.pictures += arguments[1:2]
        return self

    def result(self, timeout_s):
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def cancel(self):
        self.ends.append("cancelled")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Objects are numbered as they are stored, and nobody waits."""
    numbers = iter(range(100))
    monkeypatch.setattr(replicas.ray, "put", lambda _: next(numbers))
    monkeypatch.setattr(replicas.time, "sleep", lambda _: None)


@pytest.mark.parametrize("death", [ActorDiedError(), LOST], ids=["replica", "object"])
def test_a_call_is_made_again_and_its_picture_stored_again(death, blocks):
    handle = Scripted(death, death, "done", "next")
    some = Replicas(handle)
    assert some.call("generate", blocks) == "done"
    assert handle.pictures == [0, 1, 2]
    assert some.call("generate", blocks) == "next"
    assert handle.pictures[3:] == [2], "what is stored is not stored again"


def test_there_is_a_last_attempt(blocks):
    handle = Scripted(*[ActorDiedError()] * 4)
    with pytest.raises(ClusterError, match="3 replicas in turn died"):
        Replicas(handle, attempts=3).call("generate", blocks)
    assert len(handle.ends) == 1


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (BackPressureError(1, 2), Busy),
        (RayError("the store is full"), ClusterError),
        (
            RayTaskError("call", "…", DeviceOutOfMemory("no room", hint="Use a smaller picture.")),
            DeviceOutOfMemory,
        ),
    ],
    ids=["full", "ray", "model"],
)
def test_what_is_not_tried_again(end, kind, blocks):
    handle = Scripted(end, "never")
    with pytest.raises(kind) as raised:
        Replicas(handle).call("generate", blocks)
    assert type(raised.value) is kind
    assert handle.ends == ["never"]


def test_a_cancelled_caller_cancels_the_call(blocks):
    handle = Scripted(TimeoutError(), "never")
    context = CallContext()
    context.cancelled.set()
    with call_context(context), pytest.raises(CallCancelled):
        Replicas(handle).call("generate", blocks)
    assert handle.ends == ["never", "cancelled"]


class Here(ModelReplica):
    """A replica in this process; what it is asked and answers travels as to another one."""

    calls = 0

    def call(self, *arguments, **options):
        self.calls += 1
        arguments, options = pickle.loads(pickle.dumps((arguments, options)))
        return pickle.loads(pickle.dumps(asyncio.run(super().call(*arguments, **options))))

    async def _has_picture(self, digest):
        return digest


def test_questions_about_one_picture_are_one_call_and_share_passes(embedded_model, demo_image):
    mllm, form = embedded_model.mllm, Sam4MllmFormat()
    image, expression = demo_image
    other = type(image).from_pil(image.pil.rotate(180))
    questions = [
        Question((image, other)[n % 2], (Turn("user", form.ask_marks(expression, [n])),), 1)
        for n in range(10)
    ]
    replica, passes = Here(lambda: mllm), []
    hook = mllm.model.register_forward_pre_hook(lambda *_: passes.append(1))

    def asked(one, some):
        mllm.engine.store.clear()
        passes.clear()
        return one.answer_each(some, words=form.yes_no), len(passes)

    try:
        asked(mllm, questions)  # the first shared pass tries out whether the model keeps them apart
        alone = [asked(mllm, [one]) for one in questions]
        answers, number = asked(RemoteMllm(replica), questions)
    finally:
        hook.remove()
    assert replica.calls == 2
    assert number <= 4 < sum(each for _, each in alone)
    for ((one,), _), together in zip(alone, answers, strict=True):
        expected = [pytest.approx(tuple(answer), abs=1e-4) for answer in one]
        assert list(map(tuple, together)) == expected
