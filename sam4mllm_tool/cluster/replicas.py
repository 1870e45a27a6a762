"""Models in other processes: replicas behind Ray Serve, used like the models themselves.

The result of a model's method depends on its arguments only (a cache changes the time, never the
result), so a call whose replica dies is repeated on another replica. Serve's multiplexing sends the
calls about a picture to the replica that has read it; any other replica can take over, and then
reads the picture again.
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
"""Maximum attempts per call: it is repeated whenever its replica dies."""

_PICTURE_BYTES = 256 * 1024**2
_CHECK_SECONDS = 0.5


class About(NamedTuple):
    """Description of a model."""

    name: str
    format_name: str = ""
    notes: CheckpointNotes | None = None
    own_format: DialogueFormat | None = None


class Replicas:
    """Client of one deployment of :mod:`sam4mllm_tool.cluster.deployments`.

    Args:
        handle: handle of the deployment.
        attempts: maximum number of attempts per call.
    """

    def __init__(self, handle: DeploymentHandle, attempts: int = ATTEMPTS) -> None:
        self._handle = handle
        self._attempts = attempts
        self._lock = threading.Lock()
        # A picture is put into Ray's object store once; Ray copies it to each machine once.
        self._pictures: LRUCache[str, Any] = LRUCache(_PICTURE_BYTES, lambda entry: entry[1])

    def about(self) -> About:
        """Description of the model.

        Raises:
            ClusterError: the replica died in every attempt.
        """
        return self._retried(lambda: self._handle.about.remote())

    def call(self, method: str, image: RgbImage, *args: Any, **options: Any) -> Any:
        """Call a method, if possible on a replica that has read the picture.

        Raises:
            Sam4MllmError: what the model itself raised.
            Busy: Serve's queue is full.
            ClusterError: the replica died in every attempt.
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
            except RayTaskError as error:  # raised by the model itself
                raise error.cause from None
            except (RayActorError, ObjectLostError) as error:
                failure: Exception = error
            except BackPressureError as error:
                raise Busy("the replicas' queue is full", retry_after=5) from error
            except (RayError, RayServeException) as error:
                raise ClusterError(f"Ray cannot run the call: {error}", retryable=True) from error
            with self._lock:  # its object store may be lost, so store the picture again
                self._pictures.pop(forget, None)
            time.sleep(min(2.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
            check_cancelled()
        raise ClusterError(
            f"{self._attempts} replicas in turn died during a call: {failure}",
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
    """Wait for the result; if the caller is cancelled, cancel the remote call, too."""
    while True:
        try:
            return response.result(timeout_s=_CHECK_SECONDS)
        except RayTaskError:  # a model's own time-out is an instance of both
            raise
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
        """Likely alternative replies."""
        return self._replicas.call("alternates", image, dialogue, grammar=grammar, count=count)

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """Replies drawn from the model's distribution."""
        return self._replicas.call("sample", image, dialogue, grammar=grammar, count=count)

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """Answers to yes-no questions."""
        return self._replicas.call("answer_yes_no", image, dialogue, words=words, count=count)

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """Answers to several questions, with one remote call per picture."""
        answers: dict[int, list[YesNo]] = {}
        for digest in dict.fromkeys(one.image.digest for one in questions):
            places = [n for n, one in enumerate(questions) if one.image.digest == digest]
            asked = [(questions[n].dialogue, questions[n].count) for n in places]
            image = questions[places[0]].image
            replies = self._replicas.call("answer_each", image, asked, words=words)
            answers |= zip(places, replies, strict=True)
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
        """Low-resolution logits, resized to the image."""
        return self._replicas.call("logits_at_image_size", image, logits)
