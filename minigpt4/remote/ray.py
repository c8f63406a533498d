"""Replicas of the whole pipeline on a Ray cluster, behind one OpenAI-compatible API.

    serve run minigpt4.remote.ray:app model=vicuna-7b max_replicas=8

An `Ingress` has the tokenizer and the endpoints, and asks `Replica`s, each with its own model. Ray
starts and stops replicas as the number of requests changes. A conversation stays with the replica
that has it cached; if that one dies, another one continues from the last token.
"""

import asyncio
import logging
from argparse import Namespace
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from ray import cluster_resources, serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from minigpt4.config import DEFAULT_MODEL, ModelConfig, get_model
from minigpt4.engine import Request
from minigpt4.engine.stream import FULL, failure
from minigpt4.errors import UserError
from minigpt4.model.image import Encoded, Picture
from minigpt4.options import (
    DTYPE,
    EMBEDDINGS_MB,
    MODEL,
    PLACES,
    QUANTIZE,
    Option,
    from_mapping,
    integer,
    number,
)
from minigpt4.remote.engine import Part, RemoteEngine, Unavailable
from minigpt4.web.options import (
    API_KEY,
    IGNORE_TOOLS,
    IMAGE_HOSTS,
    MAX_QUEUE,
    MAX_RUNNING,
    MAX_UPLOAD,
)

# Consistent hashing of the session: when a replica starts or ends, few conversations move.
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
ELSEWHERE = {"ending", "hanging", "queue_full", "loading"}  # errors that another replica may avoid
PROBE_SECONDS = 10.0

log = logging.getLogger(__name__)


REPLICAS = (
    Option("min-replicas", "Minimum number of replicas.", 1, integer(0)),
    Option("max-replicas", "Maximum number of replicas.", 2, integer(1)),
    Option("ingresses", "Number of processes that serve the API.", 1, integer(1)),
    Option("cpus", "Processor cores of a replica.", 2.0, number(0)),
    Option("gpus", "GPUs of a replica. By default 1 if the cluster has any.", None, number(0)),
    Option(
        "target", "Average requests per replica above which another one starts.", 16.0, number(0)
    ),
    Option("upscale-seconds", "How long that must last, in seconds.", 10.0, number(0)),
    Option("downscale-seconds", "Seconds after which an idle replica ends.", 300.0, number(0)),
)
OPTIONS = (
    replace(MODEL, default=DEFAULT_MODEL),
    *(QUANTIZE, DTYPE, *PLACES, EMBEDDINGS_MB),
    *REPLICAS,
    *(MAX_RUNNING, MAX_QUEUE, MAX_UPLOAD, IMAGE_HOSTS, IGNORE_TOOLS, API_KEY),
)


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application that Ray serves. arguments: the NAME=VALUE of `serve run`; see OPTIONS."""
    options = from_mapping(OPTIONS, arguments)
    get_model(options.model)
    gpus = options.gpus
    if gpus is None:
        gpus = 1 if cluster_resources().get("GPU") else 0
    # `serve.deployment` turns the classes into deployments, which type checkers do not see.
    replica: serve.Deployment = Replica
    replicas = replica.options(
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
    # An ingress mostly waits: it needs no processor of its own.
    ingress: serve.Deployment = Ingress
    return ingress.options(
        num_replicas=options.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
    ).bind(replicas, options)


def _log_progress(line: str, passing: bool = False) -> None:
    """A `Report` that writes into the replica's log."""
    if not passing:
        log.info(line)


@serve.deployment(
    health_check_period_s=10, health_check_timeout_s=60, graceful_shutdown_timeout_s=60
)
class Replica:
    """One complete model."""

    def __init__(self, options: Namespace) -> None:
        from minigpt4.start import open_engine

        self._engine = open_engine(
            Namespace(**vars(options), device="auto", llm_url=None),
            _log_progress,
            max_running=options.max_running,
            max_waiting=options.max_queue,
        )

    async def generate(
        self, request: Request, generated: list[int], limit: int
    ) -> AsyncGenerator[Part | UserError, None]:
        """The tokens after the prompt and those generated so far; an error is the last item."""
        request = replace(
            request,
            prompt=request.prompt.followed_by(generated),
            sampling=replace(request.sampling, max_new_tokens=limit),
            penalized=(*request.penalized, *generated),
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

    async def encode(self, picture: Picture) -> Encoded | None:
        return await asyncio.to_thread(self._engine.encode, picture)

    async def alive(self, seconds: float) -> bool:
        """Does any request get a token within `seconds`?"""
        before = self._engine.totals.tokens
        answered = await asyncio.to_thread(self._engine.health, seconds)
        return answered or self._engine.totals.tokens > before

    async def check_health(self) -> None:
        """Ray calls this regularly, and replaces the replica if it raises."""
        if not await self.alive(PROBE_SECONDS):
            raise RuntimeError(self._engine.fault or "the model gives no token")


@dataclass(frozen=True)
class Described:
    """A description of the replicas' model, for an ingress."""

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
        """Nothing: replicas can answer every request that an engine can."""

    def encode(self, picture: Picture) -> Encoded:
        handle = self._handle.options(session_id=picture.key)
        return handle.encode.remote(self._small(picture)).result()

    def _small(self, picture: Picture) -> Picture:
        """The picture at the encoder's size, so that less is sent."""
        from minigpt4.model.vision import squash

        return Picture(squash(picture.rgb, self._config.vision.image_size), picture.key)

    async def generate(
        self, request: Request, generated: list[int], limit: int
    ) -> AsyncGenerator[Part, None]:
        pictures = {
            key: await asyncio.to_thread(self._small, request.pictures[key])
            for key in request.prompt.picture_keys
        }
        handle = self._handle.options(stream=True, session_id=request.session)
        reply = handle.generate.remote(replace(request, pictures=pictures), generated, limit)
        try:
            async for part in reply:
                if isinstance(part, UserError):
                    if part.kind in ELSEWHERE:
                        raise Unavailable(str(part), part)
                    raise part
                yield part
        except BackPressureError:
            raise Unavailable("every replica is full", failure(FULL)) from None
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
        """Nothing: Ray ends its replicas itself."""


@serve.deployment
@serve.ingress()
class Ingress:
    """The API in front of the replicas."""

    def __init__(self, replicas: DeploymentHandle, options: Namespace) -> None:
        from minigpt4.start import given_places
        from minigpt4.weights.load import find_weights
        from minigpt4.weights.tokenizer import load_tokenizer

        config = get_model(options.model)
        tokenizer = load_tokenizer(find_weights(config, given=given_places(options)).llm)
        self._engine = RemoteEngine(
            Described(config, tokenizer),
            Replicas(replicas, config),
            max_running=options.max_running * options.max_replicas,
            max_waiting=options.max_queue * options.max_replicas,
        )
        self._options = options

    def __serve_build_asgi_app__(self):
        """Ray calls this once, and passes every request to the application that it returns."""
        from minigpt4.web.api.routes import application

        options = self._options
        return application(
            self._engine,
            options.api_key or "",
            options.image_hosts or "",
            options.max_upload_mb,
            options.ignore_tools,
        )
