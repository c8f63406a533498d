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

from minigpt4.engine import AnyEngine, Histogram, Totals
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
    yield from _under_others_names(engine, totals)
    yield _histogram(
        "minigpt4_time_to_first_token_seconds",
        "From the request to its first token, waiting included.",
        totals.seconds_to_first,
    )
    yield _histogram(
        "minigpt4_answer_tokens_per_second",
        "Of each answer, after its first token.",
        totals.tokens_per_s,
    )


def _under_others_names(engine: AnyEngine, totals: Totals) -> Iterator[Metric]:
    """What vLLM and llama.cpp report too, under their names: their dashboards work."""
    labels = {"model_name": engine.model.config.name}
    for name, value in (
        ("vllm:prompt_tokens", totals.prompt_tokens),
        ("vllm:generation_tokens", totals.tokens),
        ("vllm:prefix_cache_queries", totals.prompt_tokens),
        ("vllm:prefix_cache_hits", totals.reused_tokens),
    ):
        yield _labelled(CounterMetricFamily, name, value, labels)
    yield CounterMetricFamily("llamacpp:prompt_tokens", "Tokens of prompts.", totals.prompt_tokens)
    yield CounterMetricFamily("llamacpp:tokens_predicted", "Tokens generated.", totals.tokens)
    ended = CounterMetricFamily(
        "vllm:request_success", "Answers by reason.", labels=["model_name", "finished_reason"]
    )
    for reason, vllm_reason in (("stop", "stop"), ("length", "length"), ("closed", "abort")):
        ended.add_metric([labels["model_name"], vllm_reason], totals.endings[reason])
    yield ended
    gauges: list[tuple[str, str, float]] = [
        ("num_requests_running", "requests_processing", engine.running),
        ("num_requests_waiting", "requests_deferred", engine.waiting),
    ]
    if engine.cache_use is not None:
        gauges.append(("kv_cache_usage_perc", "kv_cache_usage_ratio", engine.cache_use))
    for vllm_name, llama_name, level in gauges:
        yield _labelled(GaugeMetricFamily, f"vllm:{vllm_name}", level, labels)
        yield GaugeMetricFamily(f"llamacpp:{llama_name}", llama_name, level)
    for name, histogram in (
        ("time_to_first_token_seconds", totals.seconds_to_first),
        ("inter_token_latency_seconds", totals.gaps),
        ("e2e_request_latency_seconds", totals.seconds),
        ("request_queue_time_seconds", totals.seconds_waiting),
        ("request_prefill_time_seconds", totals.seconds_prefill),
        ("request_decode_time_seconds", totals.seconds_decode),
        ("request_prompt_tokens", totals.prompt_lengths),
        ("request_generation_tokens", totals.answer_lengths),
    ):
        yield _histogram(f"vllm:{name}", "As in vLLM.", histogram, labels)


def _labelled(kind: type, name: str, value: float, labels: Mapping[str, str]) -> Metric:
    metric = kind(name, "As in vLLM.", labels=[*labels])
    metric.add_metric([*labels.values()], value)
    return metric


def _histogram(
    name: str, text: str, histogram: Histogram, labels: Mapping[str, str] | None = None
) -> Metric:
    buckets, count = [], 0
    for bound, own in zip([*histogram.bounds, "+Inf"], [*histogram.counts], strict=True):
        count += own
        buckets.append((str(bound), count))
    labels = labels or {}
    metric = HistogramMetricFamily(name, text, labels=[*labels])
    metric.add_metric([*labels.values()], buckets, histogram.sum)
    return metric
