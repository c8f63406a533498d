"""What the API returns, and its own description in OpenAPI 3.1: GET /v1/openapi.json.

Who speaks first and last, and what fits, only code can say: a request may follow the description
and still get a 400.
"""

import functools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from minigpt4.web.api.schemas import ChatRequest

Schema = dict[str, Any]
TEXT = {"schema": {"type": "string"}}
# What a status says in its headers: how long to wait, how to log in.
HEADERS = {429: "Retry-After", 503: "Retry-After", 401: "WWW-Authenticate"}


Count = Annotated[int, Field(ge=0)]


class Response(BaseModel):
    """A JSON object with just these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenLogprob(Response):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: Annotated[list, Field(max_length=0)]


class Logprobs(Response):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(Response):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Response):
    index: Literal[0]
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class PromptDetails(Response):
    cached_tokens: Count


class Usage(Response):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails


class ChatCompletion(Response):
    id: str
    created: Count
    model: str
    object: Literal["chat.completion"]
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: Usage


class Model(Response):
    id: str
    object: Literal["model"]
    created: Count
    owned_by: str


class Models(Response):
    object: Literal["list"]
    data: list[Model]


class ErrorMessage(Response):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Response):
    error: ErrorMessage


# --- the document --------------------------------------------------------------------------------


@functools.cache
def description() -> Schema:
    """The whole document."""
    models = _operation("listModels", "List the model that is served.", "Models", 401, 503)
    model = _operation("getModel", "Describe one model.", "Model", 401, 404, 503)
    name = {"name": "name", "in": "path", "required": True, **TEXT}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MiniGPT-4",
            "version": "1",
            "description": "Questions about pictures, in OpenAI's format. More: docs/api.md.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _complete()},
            "/v1/models": {"get": models},
            "/v1/models/{name}": {"parameters": [name], "get": model},
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _complete() -> Schema:
    operation = _operation(
        "createChatCompletion",
        "Answer a conversation, whole or as server-sent events.",
        "ChatCompletion",
        *(400, 401, 404, 408, 413, 429, 500, 503),
    )
    events = {"type": "string", "description": "`data: ` and a chat.completion.chunk, or [DONE]"}
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": events}
    operation["requestBody"] = {"required": True, "content": _json("ChatRequest")}
    return operation


def _operation(name: str, summary: str, schema: str, *errors: int) -> Schema:
    refused = {
        str(status): {
            "description": "One sentence that says what is wrong.",
            "content": _json("Error"),
            **({"headers": {HEADERS[status]: TEXT}} if status in HEADERS else {}),
        }
        for status in errors
    }
    answered = {"description": summary, "content": _json(schema)}
    return {"operationId": name, "summary": summary, "responses": {"200": answered, **refused}}


def _json(schema: str) -> Schema:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _schemas() -> Schema:
    models = (ChatRequest, ChatCompletion, Model, Models, Error)
    _, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    return _untitled(found["$defs"])


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes of every field's name."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if isinstance(schema, dict):
        return {
            k: _untitled(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))
        }
    return schema
