"""GET /metrics: what the engine has done for the page and the API, as Prometheus reads it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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

# What vLLM's names stand for.
VLLM = {
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Tokens of prompts that were looked up in the cache.",
    "prefix_cache_hits": "Tokens of prompts taken from the cache.",
    "num_requests_running": "Answers being generated.",
    "num_requests_waiting": "Requests that wait.",
    "kv_cache_usage_perc": "Share of the cache that running answers hold, 0 to 1.",
    "time_to_first_token_seconds": "From the request to its first token, waiting included.",
    "inter_token_latency_seconds": "Between two tokens of an answer.",
    "e2e_request_latency_seconds": "From the request to its last token, waiting included.",
    "request_queue_time_seconds": "From the request to its start.",
    "request_prefill_time_seconds": "From the start to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_prompt_tokens": "Tokens of each prompt.",
    "request_generation_tokens": "Tokens of each answer.",
}


class Metrics(Collector):
    """find_engines: the models' engines, none while they are loading; responses: how many the API
    gave, by endpoint and status."""

    def __init__(
        self,
        find_engines: Callable[[], Sequence[AnyEngine]],
        responses: Mapping[tuple[str, int], int],
        keys: Keys,
    ) -> None:
        self._find_engines, self._responses, self._keys = find_engines, responses, keys
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)  # memory, processor time, file handles: Linux
        self.routes = [Route("/metrics", self._metrics)]

    async def _metrics(self, request: Request) -> Response:
        try:
            self._keys.check(request)
        except ApiError as error:
            return PlainTextResponse(f"{error}\n", error.status, error.headers)
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # a version that is no number
            encode, content_type = choose_encoder("")
        return Response(encode(self._registry), media_type=content_type)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not collect to know the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What the engines and the API counted, read when it is asked for."""
        api = CounterMetricFamily(
            "minigpt4_api_responses",
            "Responses of the API by endpoint and status.",
            labels=["path", "status"],
        )
        for (path, status), count in sorted(self._responses.items()):
            api.add_metric([path, str(status)], count)
        yield api
        if engines := self._find_engines():
            yield from _of_engines(engines)


def _of_engines(engines: Sequence[AnyEngine]) -> Iterator[Metric]:
    """Of all models together; under vLLM's names, of each."""
    each = [engine.totals.snapshot() for engine in engines]
    totals = Totals()
    for one in each:
        totals.merge(one)
    running, waiting = sum(e.running for e in engines), sum(e.waiting for e in engines)
    for name, text, value in (
        ("requests", "Answers asked for, by the page and by programs.", totals.requests),
        ("tokens", "Tokens generated.", totals.tokens),
        ("prompt_tokens", "Tokens of prompts.", totals.prompt_tokens),
        ("reused_tokens", "Tokens of prompts taken from the cache.", totals.reused_tokens),
    ):
        yield CounterMetricFamily(f"minigpt4_{name}", text, value)
    decoders = ", ".join(dict.fromkeys(engine.decoder_name for engine in engines))
    yield InfoMetricFamily("minigpt4_decoder", "What runs the language model.", {"name": decoders})
    errors = CounterMetricFamily(
        "minigpt4_errors", "Requests refused or failed, by kind.", labels=["kind"]
    )
    for kind in get_args(Kind):  # zeros too
        errors.add_metric([kind], totals.errors[kind])
    yield errors
    for name, text, value in (
        ("queue_length", "Requests that wait.", waiting),
        ("active_chats", "Answers being generated.", running),
    ):
        yield GaugeMetricFamily(f"minigpt4_{name}", text, value)
    yield from _under_llama_cpps_names(engines, totals)
    yield from _under_vllms_names(engines, each)
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


def _under_llama_cpps_names(engines: Sequence[AnyEngine], totals: Totals) -> Iterator[Metric]:
    """What llama.cpp reports too: its dashboards work."""
    yield CounterMetricFamily("llamacpp:prompt_tokens", "Tokens of prompts.", totals.prompt_tokens)
    yield CounterMetricFamily("llamacpp:tokens_predicted", "Tokens generated.", totals.tokens)
    running, waiting = sum(e.running for e in engines), sum(e.waiting for e in engines)
    yield GaugeMetricFamily("llamacpp:requests_processing", "Answers being generated.", running)
    yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait.", waiting)
    if uses := [engine.cache_use for engine in engines if engine.cache_use is not None]:
        yield GaugeMetricFamily("llamacpp:kv_cache_usage_ratio", "The fullest cache.", max(uses))


def _under_vllms_names(engines: Sequence[AnyEngine], each: Sequence[Totals]) -> Iterator[Metric]:
    """What vLLM reports too, of each model: its dashboards work. each: the engines' totals."""
    names = [engine.model.config.name for engine in engines]

    def family(kind: type, name: str, values: Sequence[float | None]) -> Metric:
        metric = kind(f"vllm:{name}", VLLM[name], labels=["model_name"])
        for model, value in zip(names, values, strict=True):
            if value is not None:
                metric.add_metric([model], value)
        return metric

    yield family(CounterMetricFamily, "prompt_tokens", [t.prompt_tokens for t in each])
    yield family(CounterMetricFamily, "generation_tokens", [t.tokens for t in each])
    yield family(CounterMetricFamily, "prefix_cache_queries", [t.prompt_tokens for t in each])
    yield family(CounterMetricFamily, "prefix_cache_hits", [t.reused_tokens for t in each])
    ended = CounterMetricFamily(
        "vllm:request_success", "Answers by reason.", labels=["model_name", "finished_reason"]
    )
    for reason, vllm_reason in (("stop", "stop"), ("length", "length"), ("closed", "abort")):
        for model, totals in zip(names, each, strict=True):
            ended.add_metric([model, vllm_reason], totals.endings[reason])
    yield ended
    yield family(GaugeMetricFamily, "num_requests_running", [e.running for e in engines])
    yield family(GaugeMetricFamily, "num_requests_waiting", [e.waiting for e in engines])
    uses = [engine.cache_use for engine in engines]
    if any(use is not None for use in uses):
        yield family(GaugeMetricFamily, "kv_cache_usage_perc", uses)
    for name, field in (
        ("time_to_first_token_seconds", "seconds_to_first"),
        ("inter_token_latency_seconds", "gaps"),
        ("e2e_request_latency_seconds", "seconds"),
        ("request_queue_time_seconds", "seconds_waiting"),
        ("request_prefill_time_seconds", "seconds_prefill"),
        ("request_decode_time_seconds", "seconds_decode"),
        ("request_prompt_tokens", "prompt_lengths"),
        ("request_generation_tokens", "answer_lengths"),
    ):
        metric = HistogramMetricFamily(f"vllm:{name}", VLLM[name], labels=["model_name"])
        for model, totals in zip(names, each, strict=True):
            histogram = getattr(totals, field)
            metric.add_metric([model], _buckets(histogram), histogram.sum)
        yield metric


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    metric = HistogramMetricFamily(name, text, labels=[])
    metric.add_metric([], _buckets(histogram), histogram.sum)
    return metric


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper bound, how many values are at most that)"""
    buckets, count = [], 0
    for bound, own in zip([*histogram.bounds, "+Inf"], [*histogram.counts], strict=True):
        count += own
        buckets.append((str(bound), float(count)))
    return buckets
