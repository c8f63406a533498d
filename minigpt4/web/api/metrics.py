"""GET /metrics: the engines' counts for the page and the API, in Prometheus's format."""

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
from starlette.responses import Response
from starlette.routing import Route

from minigpt4.engine import AnyEngine, Histogram, Totals
from minigpt4.errors import Kind
from minigpt4.web.api.access import Keys
from minigpt4.web.api.errors import ApiError, plain

# vLLM's name of a histogram -> (the field of `Totals`, its description).
VLLM_HISTOGRAMS = {
    "time_to_first_token_seconds": (
        "seconds_to_first",
        "From the request to its first token, waiting included.",
    ),
    "inter_token_latency_seconds": ("gaps", "Between two tokens of an answer."),
    "e2e_request_latency_seconds": (
        "seconds",
        "From the request to its last token, waiting included.",
    ),
    "request_queue_time_seconds": ("seconds_waiting", "From the request to its start."),
    "request_prefill_time_seconds": ("seconds_prefill", "From the start to the first token."),
    "request_decode_time_seconds": ("seconds_decode", "From the first token to the last."),
    "request_prompt_tokens": ("prompt_lengths", "Tokens of each prompt."),
    "request_generation_tokens": ("answer_lengths", "Tokens of each answer."),
}


class Metrics(Collector):
    """find_engines: the models' engines, none while they are loading; responses: the API's number
    of responses by endpoint and status."""

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
            return plain(error)
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # a version that is no number
            encode, content_type = choose_encoder("")
        return Response(encode(self._registry), media_type=content_type)

    def describe(self) -> list[Metric]:
        """Nothing, so that the registry does not collect when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The counts of the engines and the API, read at each request."""
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
    """The sums over all models, also under llama.cpp's names; each model's counts under vLLM's
    names. So dashboards for llama.cpp and vLLM work."""
    each = [engine.totals.snapshot() for engine in engines]
    totals = Totals()
    for one in each:
        totals.merge(one)
    for name, text, value in (
        ("minigpt4_requests", "Answers asked for, by the page and by programs.", totals.requests),
        ("minigpt4_tokens", "Tokens generated.", totals.tokens),
        ("minigpt4_prompt_tokens", "Tokens of prompts.", totals.prompt_tokens),
        ("minigpt4_reused_tokens", "Tokens of prompts taken from the cache.", totals.reused_tokens),
        ("llamacpp:prompt_tokens", "Tokens of prompts.", totals.prompt_tokens),
        ("llamacpp:tokens_predicted", "Tokens generated.", totals.tokens),
    ):
        yield CounterMetricFamily(name, text, value)
    errors = CounterMetricFamily(
        "minigpt4_errors", "Requests refused or failed, by kind.", labels=["kind"]
    )
    for kind in get_args(Kind):  # zeros too
        errors.add_metric([kind], totals.errors[kind])
    yield errors
    running, waiting = sum(e.running for e in engines), sum(e.waiting for e in engines)
    for name, text, value in (
        ("minigpt4_queue_length", "Requests that wait.", waiting),
        ("minigpt4_active_chats", "Answers being generated.", running),
        ("llamacpp:requests_deferred", "Requests that wait.", waiting),
        ("llamacpp:requests_processing", "Answers being generated.", running),
    ):
        yield GaugeMetricFamily(name, text, value)
    if uses := [engine.cache_use for engine in engines if engine.cache_use is not None]:
        yield GaugeMetricFamily("llamacpp:kv_cache_usage_ratio", "The fullest cache.", max(uses))
    decoders = ", ".join(dict.fromkeys(engine.decoder_name for engine in engines))
    yield InfoMetricFamily("minigpt4_decoder", "What runs the language model.", {"name": decoders})
    for name, text, histogram in (
        (
            "minigpt4_time_to_first_token_seconds",
            "From the request to its first token, waiting included.",
            totals.seconds_to_first,
        ),
        (
            "minigpt4_answer_tokens_per_second",
            "Of each answer, after its first token.",
            totals.tokens_per_s,
        ),
    ):
        yield HistogramMetricFamily(name, text, _buckets(histogram), histogram.sum)
    yield from _under_vllms_names(engines, each)


def _under_vllms_names(engines: Sequence[AnyEngine], each: Sequence[Totals]) -> Iterator[Metric]:
    """Each model's metrics that vLLM has, too, so that its dashboards work. each: their totals."""
    names = [engine.model.config.name for engine in engines]
    prompts, hits = [t.prompt_tokens for t in each], [t.reused_tokens for t in each]
    looked_up = "Tokens of prompts that were looked up in the cache."
    share = "Share of the cache that running answers hold, 0 to 1."
    uses = [engine.cache_use for engine in engines]
    counter, gauge = CounterMetricFamily, GaugeMetricFamily
    for kind, name, text, values in (
        (counter, "prompt_tokens", "Tokens of prompts.", prompts),
        (counter, "generation_tokens", "Tokens generated.", [t.tokens for t in each]),
        (counter, "prefix_cache_queries", looked_up, prompts),
        (counter, "prefix_cache_hits", "Tokens of prompts taken from the cache.", hits),
        (gauge, "num_requests_running", "Answers being generated.", [e.running for e in engines]),
        (gauge, "num_requests_waiting", "Requests that wait.", [e.waiting for e in engines]),
        (gauge, "kv_cache_usage_perc", share, uses),
    ):
        metric = kind(f"vllm:{name}", text, labels=["model_name"])
        for model, value in zip(names, values, strict=True):
            if value is not None:
                metric.add_metric([model], value)
        if metric.samples:
            yield metric
    ended = CounterMetricFamily(
        "vllm:request_success", "Answers by reason.", labels=["model_name", "finished_reason"]
    )
    for reason, vllm_reason in (("stop", "stop"), ("length", "length"), ("closed", "abort")):
        for model, totals in zip(names, each, strict=True):
            ended.add_metric([model, vllm_reason], totals.endings[reason])
    yield ended
    for name, (field, text) in VLLM_HISTOGRAMS.items():
        histograms = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        for model, totals in zip(names, each, strict=True):
            histogram = getattr(totals, field)
            histograms.add_metric([model], _buckets(histogram), histogram.sum)
        yield histograms


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper bound, how many values are at most that)"""
    buckets, count = [], 0
    for bound, own in zip([*histogram.bounds, "+Inf"], [*histogram.counts], strict=True):
        count += own
        buckets.append((str(bound), float(count)))
    return buckets
