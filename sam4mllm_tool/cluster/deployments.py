"""The models as Ray Serve deployments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from sam4mllm_tool.cluster.replicas import About
from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.protocols import Dialogue, Question, YesNoWords, answer_each
from sam4mllm_tool.types import RgbImage, YesNo

PICTURES_KNOWN = 64
"""Pictures per replica that Serve remembers. A replica that has dropped one reads it again."""

LOAD_ATTEMPTS = 2
"""Attempts to load the weights, of all replicas together, before a deployment is given up."""

_METHODS = {
    "generate", "alternates", "sample", "answer_yes_no", "answer_each",
    "embed", "predict", "logits_at_image_size",
}  # fmt: skip


class ModelReplica:
    """One model in its own process.

    Args:
        load: loads the model.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._model = load()

    def about(self) -> About:
        """The model's name, format and checkpoint notes."""
        model = self._model
        described = {name: getattr(model, name, None) for name in About._fields[2:]}
        return About(model.name, getattr(model, "format_name", ""), **described)

    async def call(self, method: str, image: RgbImage, *args: Any, **options: Any) -> Any:
        """Call a method of the model's protocol, in a worker thread."""
        if method not in _METHODS:
            raise AttributeError(method)
        await self._has_picture(serve.get_multiplexed_model_id() or image.digest)
        function = self._answer_each if method == "answer_each" else getattr(self._model, method)
        return await run_in_thread(function, image, *args, **options)

    def _answer_each(
        self, image: RgbImage, asked: Sequence[tuple[Dialogue, int]], *, words: YesNoWords
    ) -> list[list[YesNo]]:
        questions = [Question(image, dialogue, count) for dialogue, count in asked]
        return answer_each(self._model, questions, words=words)

    @serve.multiplexed(max_num_models_per_replica=PICTURES_KNOWN)
    async def _has_picture(self, digest: str) -> str:
        """Tells Serve to send further calls about this picture to this replica."""
        return digest


def model_deployment(
    name: str,
    load: Callable[[], Any],
    *,
    replicas: int,
    cpus: float,
    gpus: float,
    calls: int,
) -> Application:
    """Replicas of one model.

    Args:
        name: name of the deployment, also used in a Serve config file.
        load: loads the model; called in each replica.
        replicas: number of replicas.
        cpus, gpus: what Ray reserves per replica.
        calls: concurrent calls per replica; a local model runs one and queues the others.
    """
    deployment: Any = serve.deployment(
        ModelReplica,
        name=name,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=calls,
        # Notice and replace a killed replica within seconds.
        health_check_period_s=2,
        graceful_shutdown_timeout_s=120,
        max_constructor_retry_count=LOAD_ATTEMPTS,
        # Only the tool servers call replicas, and log the tool calls themselves.
        logging_config=LoggingConfig(enable_access_log=False),
    )
    bound: Application = deployment.bind(load)
    return bound
