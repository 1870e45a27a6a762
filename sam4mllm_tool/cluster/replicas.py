"""Models in other processes: replicas behind Ray Serve, used like the models themselves.

A model's methods are functions of their arguments alone (a cache changes the time they take, never
their result), so a call whose replica dies is simply made again, on another one. Serve sends the
calls about one picture to the replica that has it, by its multiplexing; any other one can take
over, and then reads the picture anew.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from cachetools import LRUCache
from numpy.typing import NDArray
from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from sam4mllm_tool.concurrency import CallCancelled, check_cancelled
from sam4mllm_tool.errors import Busy, ClusterError
from sam4mllm_tool.formats import DialogueFormat
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.protocols import (
    CheckpointNotes,
    Dialogue,
    MaskCandidate,
    Question,
    Reply,
    SegmentPrompt,
    YesNoWords,
)
from sam4mllm_tool.types import RgbImage, YesNo

ATTEMPTS = 10
"""How often a call is made before it fails because replicas keep dying."""

_PICTURE_BYTES = 256 * 1024**2
_CHECK_SECONDS = 0.5


class About(NamedTuple):
    """What a model says of itself."""

    name: str
    format_name: str = ""
    notes: CheckpointNotes | None = None
    own_format: DialogueFormat | None = None


class Replicas:
    """Calls to one deployment of :mod:`sam4mllm_tool.cluster.deployments`.

    Args:
        handle: of the deployment.
        attempts: bound on the attempts at a call whose replicas die.
    """

    def __init__(self, handle: DeploymentHandle, attempts: int = ATTEMPTS) -> None:
        self._handle = handle
        self._attempts = attempts
        self._lock = threading.Lock()
        # A picture goes into Ray's object store once, which brings it to each machine once.
        self._pictures: LRUCache[str, Any] = LRUCache(_PICTURE_BYTES, lambda entry: entry[1])

    def about(self) -> About:
        """What the model says of itself.

        Raises:
            ClusterError: the replicas keep dying.
        """
        return self._retried(lambda: self._handle.about.remote())

    def call(self, method: str, image: RgbImage, *args: Any, **options: Any) -> Any:
        """A method's result, from the replica that has the picture if there is one.

        Raises:
            Sam4MllmError: what the model itself raised.
            Busy: Serve's queue is full.
            ClusterError: the replicas keep dying.
        """
        handle = self._handle.options(multiplexed_model_id=image.digest)
        return self._retried(
            lambda: handle.call.remote(method, self._stored(image), *args, **options),
            forget=image.digest,
        )

    def _retried(self, send: Any, forget: str = "") -> Any:
        for attempt in range(self._attempts):
            try:
                return _result(send())
            except RayTaskError as error:  # the model's own
                raise error.cause from None
            except (RayActorError, ObjectLostError) as error:
                failure: Exception = error
            except BackPressureError as error:
                raise Busy("the replicas' queue is full", retry_after=5) from error
            except (RayError, RayServeException) as error:
                raise ClusterError(f"Ray cannot make the call: {error}", retryable=True) from error
            with self._lock:  # where the store's machine has died, the picture is stored anew
                self._pictures.pop(forget, None)
            time.sleep(min(2.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
            check_cancelled()
        raise ClusterError(
            f"{self._attempts} replicas in turn ended during a call: {failure}",
            hint="See their logs: the memory may be too small, or the picture too large.",
        ) from failure

    def _stored(self, image: RgbImage) -> Any:
        with self._lock:
            if image.digest not in self._pictures:
                bare = RgbImage(image.pil, image.digest)  # without the array it may have cached
                size = min(image.width * image.height * 3, _PICTURE_BYTES)
                self._pictures[image.digest] = ray.put(bare), size
            return self._pictures[image.digest][0]


def _result(response: DeploymentResponse) -> Any:
    """The response's result; a cancelled caller cancels the call."""
    while True:
        try:
            return response.result(timeout_s=_CHECK_SECONDS)
        except TimeoutError:
            try:
                check_cancelled()
            except CallCancelled:
                response.cancel()
                raise


class RemoteMllm:
    """An MLLM behind replicas; see :class:`~sam4mllm_tool.protocols.Mllm`."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        about = replicas.about()
        self.name = about.name
        self.format_name = about.format_name
        self.notes = about.notes or CheckpointNotes()
        self.own_format = about.own_format

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """The greedy reply."""
        options = {"grammar": grammar, "max_new_tokens": max_new_tokens}
        return self._replicas.call("generate", image, dialogue, **options)

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """Different likely replies."""
        return self._replicas.call("alternates", image, dialogue, grammar=grammar, count=count)

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """Answers to yes-no questions."""
        return self._replicas.call("answer_yes_no", image, dialogue, words=words, count=count)

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """Answers to several questions, those about one picture in one call."""
        answers: dict[int, list[YesNo]] = {}
        for digest in dict.fromkeys(one.image.digest for one in questions):
            places = [n for n, one in enumerate(questions) if one.image.digest == digest]
            asked = [(questions[n].dialogue, questions[n].count) for n in places]
            image = questions[places[0]].image
            found = self._replicas.call("answer_each", image, asked, words=words)
            answers |= zip(places, found, strict=True)
        return [answers[n] for n in range(len(questions))]


class RemoteSegmenter:
    """A segmenter behind replicas; see :class:`~sam4mllm_tool.protocols.Segmenter`."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self.name = replicas.about().name

    def embed(self, image: RgbImage) -> None:
        """Compute and keep the image embedding."""
        self._replicas.call("embed", image)

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """Three candidate masks per prompt."""
        return self._replicas.call("predict", image, prompts)

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Low-resolution logits brought to the image."""
        return self._replicas.call("logits_at_image_size", image, logits)
