"""Replicas of the whole pipeline on a Ray cluster, behind one OpenAI-compatible API.

    serve run minigpt4.remote.ray:app model=vicuna-7b max_replicas=8

An `Ingress` has tokenizer and endpoints; it asks `Replica`s, each with a model of its own. Ray
starts and ends replicas by how many requests there are, and a conversation stays with the replica
that remembers it. Where that one dies, the ingress goes on at another one from the last token.
"""

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from ray import cluster_resources, serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from minigpt4.config import ModelConfig, get_model
from minigpt4.engine.faults import FULL, fault
from minigpt4.engine.task import Request
from minigpt4.errors import UserError
from minigpt4.model.image import Picture
from minigpt4.model.prompt import Prompt
from minigpt4.remote.engine import Part, RemoteEngine, Unavailable

# A session's replica by consistent hashing: when one comes or goes, few conversations move.
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
ELSEWHERE = {"ending", "hanging", "queue_full", "loading"}  # errors that another replica may spare
PROBE_SECONDS = 10.0

log = logging.getLogger(__name__)


class Options(BaseModel):
    """What `serve run` takes as NAME=VALUE; the defaults are MINIGPT4_NAME's, where it is set.

    cpus, gpus: of one replica (gpus None: one where the cluster has any). max_running, max_queue:
    answers at once and waiting, in one replica. target: requests a replica has on average before
    another one is started; upscale_seconds, downscale_seconds: how long it must be so.
    """

    model_config = ConfigDict(extra="forbid")
    model: str = os.environ.get("MINIGPT4_MODEL", "nano")
    quantize: str = os.environ.get("MINIGPT4_QUANTIZE", "auto")
    projection: str | None = os.environ.get("MINIGPT4_PROJECTION")
    min_replicas: int = 1
    max_replicas: int = 2
    ingresses: int = 1
    cpus: float = 2
    gpus: float | None = None
    max_running: int = 32
    max_queue: int = 32
    target: float = 16
    upscale_seconds: float = 10
    downscale_seconds: float = 300
    image_hosts: str = os.environ.get("MINIGPT4_IMAGE_HOSTS", "")
    max_upload_mb: int = 20


def app(options: Options) -> serve.Application:
    """What Ray serves. The API's key comes from MINIGPT4_API_KEY."""
    get_model(options.model)
    gpus = options.gpus
    if gpus is None:
        gpus = 1 if cluster_resources().get("GPU") else 0
    replicas = Replica.options(
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": gpus},
        max_ongoing_requests=options.max_running + options.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target,
            upscale_delay_s=options.upscale_seconds,
            downscale_delay_s=options.downscale_seconds,
            look_back_period_s=max(options.upscale_seconds, 2),
            metrics_interval_s=min(options.upscale_seconds, 10),
        ),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    ).bind(options)
    # What an ingress does is to wait, mostly: it needs no processor of its own.
    ingress = Ingress.options(
        num_replicas=options.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
    )
    return ingress.bind(replicas, options, os.environ.get("MINIGPT4_API_KEY", ""))


@serve.deployment(
    health_check_period_s=10, health_check_timeout_s=60, graceful_shutdown_timeout_s=60
)
class Replica:
    """One whole model."""

    def __init__(self, options: Options) -> None:
        from minigpt4.start import open_engine

        self._engine = open_engine(
            Namespace(
                model=options.model,
                quantize=options.quantize,
                projection=options.projection,
                device="auto",
                llm_url=None,
            ),
            log.info,
            max_running=options.max_running,
            max_waiting=options.max_queue,
        )

    async def generate(
        self, request: Request, said: list[int], limit: int
    ) -> AsyncIterator[Part | UserError]:
        """What follows the prompt and `said`; an error comes as the last item."""
        prompt = request.prompt
        request = replace(
            request,
            prompt=Prompt([*prompt.ids, *said], [*prompt.keys, *said], prompt.images),
            sampling=replace(request.sampling, max_new_tokens=limit),
            penalized=(*request.penalized, *said),
        )
        try:
            stream = await asyncio.to_thread(self._engine.submit, request)
            count = 0
            try:
                async for token in stream:
                    count += 1
                    reused = stream.stats.reused_tokens if count == 1 else 0
                    yield Part([token], stream.logprobs[count - 1 : count], reused_tokens=reused)
            finally:
                stream.close()
            ended = stream.stop_reason
            if ended in ("stop", "length"):
                yield Part(ended=ended)
        except UserError as error:
            yield error

    async def encode(self, picture: Picture) -> np.ndarray:
        return await asyncio.to_thread(self._engine.encode, picture)

    async def alive(self, seconds: float) -> bool:
        """Does a token come, whoever's?"""
        before = self._engine.totals.tokens
        answered = await asyncio.to_thread(self._engine.health, seconds)
        return answered or self._engine.totals.tokens > before

    async def check_health(self) -> None:
        """Ray asks from time to time, and starts another replica where this raises."""
        if not await self.alive(PROBE_SECONDS):
            raise RuntimeError(self._engine.fault or "the model gives no token")


@dataclass(frozen=True)
class Described:
    """What an ingress needs to know of the model that its replicas have."""

    config: ModelConfig
    tokenizer: Any
    quantize: str = "remote"
    device: str = "ray"


class Replicas:
    """Ray's replicas as an engine's backend."""

    attempts, pause = 5, 0.5

    def __init__(self, handle: DeploymentHandle, config: ModelConfig) -> None:
        self._handle, self._config = handle, config

    def check(self, request: Request) -> None:
        """They can do all that an engine can."""

    def encode(self, picture: Picture) -> np.ndarray:
        handle = self._handle.options(session_id=picture.key)
        return handle.encode.remote(self._small(picture)).result()

    def _small(self, picture: Picture) -> Picture:
        """The picture as the encoder would scale it, which is less to send."""
        from minigpt4.model.vision import squash

        return Picture(squash(picture.rgb, self._config.vision.image_size), picture.key)

    async def generate(self, request: Request, said: list[int], limit: int) -> AsyncIterator[Part]:
        shown = {image.key for _, image in request.prompt.images}
        pictures = {
            key: await asyncio.to_thread(self._small, request.pictures[key]) for key in shown
        }
        handle = self._handle.options(stream=True, session_id=request.session)
        reply = handle.generate.remote(replace(request, pictures=pictures), said, limit)
        try:
            async for part in reply:
                if isinstance(part, UserError):
                    if part.kind in ELSEWHERE:
                        raise Unavailable(str(part), part)
                    raise part
                yield part
        except BackPressureError:
            raise Unavailable("every replica is full", fault(FULL)) from None
        except (RayError, RayServeException) as error:
            raise Unavailable(type(error).__name__) from None
        finally:
            reply.cancel()

    async def probe(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._handle.alive.remote(seconds)
        except (TimeoutError, RayError, RayServeException):
            return False

    async def close(self) -> None:
        """Ray ends its replicas itself."""


@serve.deployment
@serve.ingress()
class Ingress:
    """The API before the replicas."""

    def __init__(self, replicas: DeploymentHandle, options: Options, api_key: str) -> None:
        from minigpt4.weights.llm import load_tokenizer
        from minigpt4.weights.load import find_weights

        config = get_model(options.model)
        tokenizer = load_tokenizer(find_weights(config, options.projection).llm)
        self._engine = RemoteEngine(
            Described(config, tokenizer),
            Replicas(replicas, config),
            max_running=options.max_running * options.max_replicas,
            max_waiting=options.max_queue * options.max_replicas,
        )
        self._options, self._key = options, api_key

    def __serve_build_asgi_app__(self):
        """Ray calls it once, and then what it returned with every request."""
        from minigpt4.web.api.endpoints import application

        options = self._options
        return application(self._engine, self._key, options.image_hosts, options.max_upload_mb)
