"""Errors as OpenAI's error object: status, one sentence, code and the field at fault."""

import json
from collections.abc import Mapping

from starlette.responses import PlainTextResponse, Response

from minigpt4.errors import UserError
from minigpt4.web.guard.image_url import TooLarge

RETRY_SECONDS = 5
# UserError.kind -> HTTP status and OpenAI's code; every other kind is a plain 400.
STATUS: dict[str, tuple[int, str]] = {
    "too_long": (400, "context_length_exceeded"),
    "queue_full": (429, "queue_full"),
    "loading": (503, "loading"),
    "memory": (503, "out_of_memory"),
    "hanging": (503, "hanging"),
    "ending": (503, "ending"),
    "broken": (500, "internal_error"),
}


class ApiError(UserError):
    """An error with everything that a program is told.

    code: OpenAI's, None if there is none; param: the JSON path of the wrong field, such as
    messages[0].content; headers: further headers of the response.
    """

    def __init__(
        self,
        sentence: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: UserError, param: str | None = None) -> "ApiError":
        """Any UserError as an ApiError; `param` is used if the error does not name a field."""
        if isinstance(error, cls):
            return error
        if isinstance(error, TooLarge):
            return cls(str(error), 413, "request_too_large", param)
        status, code = STATUS.get(error.kind, (400, None))
        retry = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
        return cls(str(error), status, code, param, retry)

    def sent_as(self, name: str, sent: str) -> "ApiError":
        """The same error; a wrong field `name` is called `sent`, as the client sent it."""
        if self.param != name:
            return self
        return ApiError(str(self).replace(name, sent), self.status, self.code, sent, self.headers)

    @property
    def body(self) -> dict:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        message = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": message}

    @property
    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def plain(error: ApiError) -> Response:
    """The response for endpoints that are not OpenAI's: the sentence alone."""
    return PlainTextResponse(f"{error}\n", error.status, error.headers)


def json_path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> messages[0].role; names as `quotable` makes them."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (path.endswith("]") and step.startswith("<")):  # not the tag of a union's member
            path += ("." if path else "") + quotable(step)
    return path


def quotable(name: str, most: int = 60) -> str:
    """A name from a request, shortened, with "?" for characters that could break a message."""
    return "".join(c if c.isprintable() and c not in "<>“”" else "?" for c in name[:most])


def json_response(
    content: dict, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON in ASCII: text may hold lone surrogates, which UTF-8 cannot encode."""
    return Response(
        json.dumps(content, allow_nan=False), status, dict(headers or {}), "application/json"
    )
