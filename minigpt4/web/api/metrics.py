"""GET /metrics: what the engine has done for the page and the API, as Prometheus reads it."""

from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from minigpt4.engine import AnyEngine, Histogram
from minigpt4.errors import Kind
from minigpt4.web.api.access import Keys
from minigpt4.web.api.errors import ApiError


class Metrics(Collector):
    """find_engine: the engine, None while it is loading; responses: how many the API gave, by
    endpoint and status."""

    def __init__(
        self,
        find_engine: Callable[[], AnyEngine | None],
        responses: Mapping[tuple[str, int], int],
        keys: Keys,
    ) -> None:
        self._find_engine, self._responses, self._keys = find_engine, responses, keys
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)  # memory, processor time, file handles: Linux
        self.routes = [Route("/metrics", self._metrics)]

    async def _metrics(self, request: Request) -> Response:
        try:
            self._keys.check(request)
        except ApiError as error:
            return PlainTextResponse(f"{error}\n", error.status, error.headers)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), media_type=content_type)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not collect to know the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What the engine and the API counted, read when it is asked for."""
        api = CounterMetricFamily(
            "minigpt4_api_responses",
            "Responses of the API by endpoint and status.",
            labels=["path", "status"],
        )
        for (path, status), count in sorted(self._responses.items()):
            api.add_metric([path, str(status)], count)
        yield api
        if (engine := self._find_engine()) is not None:
            yield from _of_engine(engine)


def _of_engine(engine: AnyEngine) -> Iterator[Metric]:
    totals = engine.totals.snapshot()
    for name, text, value in (
        ("requests", "Answers asked for, by the page and by programs.", totals.requests),
        ("tokens", "Tokens generated.", totals.tokens),
        ("prompt_tokens", "Tokens of prompts.", totals.prompt_tokens),
        ("reused_tokens", "Tokens of prompts taken from the cache.", totals.reused_tokens),
    ):
        yield CounterMetricFamily(f"minigpt4_{name}", text, value)
    yield InfoMetricFamily(
        "minigpt4_decoder", "What runs the language model.", {"name": engine.decoder_name}
    )
    errors = CounterMetricFamily(
        "minigpt4_errors", "Requests refused or failed, by kind.", labels=["kind"]
    )
    for kind in get_args(Kind):  # zeros too
        errors.add_metric([kind], totals.errors[kind])
    yield errors
    for name, text, value in (
        ("queue_length", "Requests that wait.", engine.waiting),
        ("active_chats", "Answers being generated.", engine.running),
    ):
        yield GaugeMetricFamily(f"minigpt4_{name}", text, value)
    yield _histogram(
        "time_to_first_token_seconds",
        "From the request to its first token, waiting included.",
        totals.seconds_to_first,
    )
    yield _histogram(
        "answer_tokens_per_second", "Of each answer, after its first token.", totals.tokens_per_s
    )


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets, count = [], 0
    for bound, own in zip([*histogram.bounds, "+Inf"], [*histogram.counts], strict=True):
        count += own
        buckets.append((str(bound), count))
    return HistogramMetricFamily(f"minigpt4_{name}", text, buckets, histogram.sum)
