"""Answers to requests for unknown addresses (404) and with wrong methods (405)."""

from fastapi.exception_handlers import http_exception_handler
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from minigpt4.web.api.errors import ApiError, quotable
from minigpt4.web.guard.limits import inner_path

# The endpoints, without /v1/, and their methods.
ENDPOINTS = {
    "chat/completions": "POST",
    "responses": "POST",
    "decisions": "POST",
    "models": "GET",
    "openapi.json": "GET",
}
# Addresses of other programs -> ours.
MEANT = {
    "health": "/healthz or /readyz",
    "healthcheck": "/healthz or /readyz",
    "api/chat": "/v1/chat/completions",
    "api/generate": "/v1/chat/completions",
    "api/tags": "/v1/models",
    "api/show": "/v1/models",
    "api/version": "/v1/models",
    "v1/completions": "/v1/chat/completions",
    "completions": "/v1/chat/completions",
    "completion": "/v1/chat/completions",
    "chat/completion": "/v1/chat/completions",
    "chat": "/v1/chat/completions",
    "messages": "/v1/chat/completions",
    "generate": "/v1/chat/completions",
}
UNSAID = ((404, "Not Found"), (405, "Method Not Allowed"))  # the library's own refusals
# Requests of Gradio's page get Gradio's own errors, which it can read.
PAGES_OWN = ("/gradio_api", "/static", "/assets", "/svelte", "/theme.css", "/custom_component")


def nowhere(path: str, method: str) -> ApiError:
    """The error for an unknown address, or for a known one with a wrong method."""
    path = quotable(path, 100)
    parts = [part for part in path.split("/") if part]
    while [part.lower() for part in parts[:2]] in (["v1", "v1"], ["api", "v1"], ["openai", "v1"]):
        del parts[0]
    whole = "/".join(parts)
    inner = "/".join(parts[1:]) if whole.lower().startswith("v1/") else whole
    models = inner.startswith("models/")  # a name follows, which keeps its upper case
    inner = inner if models else inner.lower()
    allowed = ENDPOINTS.get("models" if models else inner)
    if allowed and path == f"/v1/{inner}":
        sentence = f"This endpoint takes {allowed} only: use that method."
        return ApiError(sentence, 405, "wrong_method", headers={"Allow": allowed})
    asks = method == "POST" and inner.count("/") == 1  # such as OpenAI's responses/input_tokens
    if inner.startswith("responses/") and not asks:
        sentence = "This server keeps no responses: read each as it is answered, or as events."
        return ApiError(sentence, 404, "unknown_endpoint")
    meant = f"/v1/{inner}" if allowed else MEANT.get(whole.lower(), MEANT.get(inner, ""))
    # The client's base URL may end in another program's path, or in that of an endpoint.
    ending = next((f"/v1/{name}" for name in ENDPOINTS if inner.endswith(f"/{name}")), "")
    if meant := meant or ending:
        base = meant.startswith("/v1/") and (not path.startswith("/v1/") or meant == ending)
        end = ", with a base URL that ends in /v1." if base else "."
        sentence = f"There is no endpoint {path}: use {meant}{end}"
        return ApiError(sentence, 404, "unknown_endpoint")
    sentence = "There is no such endpoint: /v1/openapi.json lists those that exist."
    return ApiError(sentence, 404, "unknown_endpoint")


async def refuse(request: Request, error: Exception) -> Response:
    """Starlette's handler of HTTPException outside /v1: a sentence for programs."""
    if not isinstance(error, HTTPException):
        raise error
    path, headers = inner_path(request.scope), dict(error.headers or {})
    if path.startswith(PAGES_OWN) or (error.status_code, error.detail) not in UNSAID:
        return await http_exception_handler(request, error)
    if error.status_code == 404 or path.startswith("/v1/"):
        return nowhere(path, request.method).response
    allowed = headers.get("Allow", headers.get("allow", ""))
    methods = " or ".join(sorted(allowed.split(", "))) or "another method"
    sentence = f"This address takes {methods} only: use that."
    return ApiError(sentence, 405, "wrong_method", headers=headers).response
