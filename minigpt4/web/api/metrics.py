"""GET /metrics: what the engine has done for the page and the API, as Prometheus reads it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from minigpt4.engine import Engine, Histogram
from minigpt4.errors import Kind
from minigpt4.web.api.keys import Keys

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """find_engine: the engine, None while it is being loaded; responses: the API's, by endpoint
    and status."""

    def __init__(
        self,
        find_engine: Callable[[], Engine | None],
        responses: Mapping[tuple[str, int], int],
        keys: Keys,
    ) -> None:
        self._find_engine, self._responses, self._keys = find_engine, responses, keys
        self.routes = [Route("/metrics", self._metrics)]

    async def _metrics(self, request: Request) -> Response:
        try:
            self._keys.check(request)
        except HTTPException as error:
            return PlainTextResponse(error.detail + "\n", error.status_code, error.headers)
        return PlainTextResponse(self.text(), media_type=CONTENT_TYPE)

    def text(self) -> str:
        """In Prometheus's text format, version 0.0.4."""
        lines = [
            *_counter(
                "api_responses",
                "Responses of the API by endpoint and status.",
                {
                    f'path="{path}",status="{status}"': count
                    for (path, status), count in sorted(self._responses.items())
                },
            ),
            *_resident_memory(),
        ]
        if (engine := self._find_engine()) is not None:
            lines += _of_engine(engine)
        return "\n".join(lines) + "\n"


def _of_engine(engine: Engine) -> list[str]:
    totals = engine.totals.snapshot()
    errors = {f'kind="{kind}"': totals.errors[kind] for kind in get_args(Kind)}  # zeros too
    return [
        *_counter("requests", "Answers asked for, by the page and by programs.", totals.requests),
        *_counter("tokens", "Tokens generated.", totals.tokens),
        *_counter("prompt_tokens", "Tokens of the prompts that were read.", totals.prompt_tokens),
        *_counter("reused_tokens", "Those whose computation was reused.", totals.reused_tokens),
        *_counter("errors", "Requests refused or failed, by kind.", errors),
        *_gauge("queue_length", "Requests that wait for their turn.", engine.waiting),
        *_gauge("active_chats", "Answers being given.", engine.running),
        *_histogram(
            "time_to_first_token_seconds",
            "From asking to the first token, waiting included.",
            totals.seconds_to_first,
        ),
        *_histogram(
            "answer_tokens_per_second", "Of each answer, after its first.", totals.tokens_per_s
        ),
    ]


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _counter(name: str, text: str, value: int | dict[str, int]) -> list[str]:
    name = f"minigpt4_{name}_total"
    if isinstance(value, dict):
        return _head(name, "counter", text) + [f"{name}{{{k}}} {v}" for k, v in value.items()]
    return [*_head(name, "counter", text), f"{name} {value}"]


def _gauge(name: str, text: str, value: int) -> list[str]:
    name = f"minigpt4_{name}"
    return [*_head(name, "gauge", text), f"{name} {value}"]


def _histogram(name: str, text: str, histogram: Histogram) -> list[str]:
    name, lines, count = f"minigpt4_{name}", [], 0
    for bound, own in zip([*histogram.bounds, "+Inf"], [*histogram.counts], strict=True):
        count += own
        lines.append(f'{name}_bucket{{le="{bound}"}} {count}')
    sums = [f"{name}_sum {histogram.sum}", f"{name}_count {count}"]
    return [*_head(name, "histogram", text), *lines, *sums]


def _resident_memory() -> list[str]:
    """The name is that of Prometheus's own clients. Nothing where there is no Linux /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return []
    name = "process_resident_memory_bytes"
    head = _head(name, "gauge", "Resident memory size in bytes.")
    return [*head, f"{name} {pages * os.sysconf('SC_PAGE_SIZE')}"]
