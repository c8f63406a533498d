"""What goes wrong, as OpenAI's error objects."""

import json

from starlette.responses import Response

from minigpt4.errors import UserError
from minigpt4.web.guard.image_url import TooLarge

RETRY_SECONDS = 5
# UserError.kind -> HTTP status and OpenAI's code; the others are 400
STATUS: dict[str, tuple[int, str]] = {
    "too_long": (400, "context_length_exceeded"),
    "queue_full": (429, "queue_full"),
    "loading": (503, "loading"),
    "memory": (503, "out_of_memory"),
    "hanging": (503, "hanging"),
    "ending": (503, "ending"),
    "broken": (500, "internal_error"),
}


def failure(error: UserError) -> Response:
    """What a UserError is to a program."""
    if isinstance(error, TooLarge):
        return error_response(413, str(error), "request_too_large")
    status, code = STATUS.get(error.kind, (400, None))
    retry = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    return error_response(status, str(error), code, retry)


def error_response(
    status: int, sentence: str, code: str | None, headers: dict | None = None
) -> Response:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    error = {"message": sentence, "type": kind, "param": None, "code": code}
    return json_response({"error": error}, status, headers)


def json_response(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    """JSON in ASCII: text may hold halves of characters, which UTF-8 cannot."""
    return Response(json.dumps(content), status, headers, "application/json")
