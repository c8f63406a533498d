"""The API's own description in OpenAPI 3.1, GET /v1/openapi.json, with the schemas of its answers.

The description cannot express every rule: a request may follow it and still get a 400.
"""

import functools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from minigpt4.web.api.questions import DecisionRequest
from minigpt4.web.api.schemas import ChatRequest

Schema = dict[str, Any]
TEXT = {"schema": {"type": "string"}}
IGNORED, DROPPED = "X-Ignored-Fields", "X-Dropped-Turns"  # headers of an answer
# Fields of chat completions that the Responses API has, too.
SHARED = ("model", "instructions", "temperature", "top_p", "truncation", "stream", "user", "tools")
# Status -> its header: how long to wait, or how to log in.
HEADERS = {429: "Retry-After", 503: "Retry-After", 401: "WWW-Authenticate"}
ANSWERING = (400, 401, 404, 408, 413, 429, 500, 503)  # errors of endpoints that ask the model
Count = Annotated[int, Field(ge=0)]


class Response(BaseModel):
    """A JSON object with just these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LikelyToken(Response):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(LikelyToken):
    top_logprobs: list[LikelyToken]


class Logprobs(Response):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(Response):
    role: Literal["assistant"]
    content: str
    refusal: None


class CompletionChoice(Response):
    index: Count
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
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]
    usage: Usage


class ResponseObject(BaseModel):
    """A response of OpenAI's Responses API: the fields that every response has."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["response"]
    created_at: Count
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class Decision(Response):
    """Each answer is that of a predicate, a choice or a score, as OpenAI's client reads it."""

    model: str
    answers: list[dict[str, Any]]
    usage: dict[str, Any]


class Architecture(Response):
    input_modalities: list[Literal["text", "image"]]
    output_modalities: list[Literal["text"]]


class ModelInfo(Response):
    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count
    context_length: Count
    architecture: Architecture


class Models(Response):
    object: Literal["list"]
    data: list[ModelInfo]


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
    model = _operation("getModel", "Describe one model.", "ModelInfo", 401, 404, 503)
    name = {"name": "name", "in": "path", "required": True, **TEXT}
    events = "`data: ` and a chat.completion.chunk, or [DONE]"
    complete = _answering("createChatCompletion", "ChatRequest", "ChatCompletion", events)
    events = "`event: `, its type, `data: ` and the event"
    respond = _answering("createResponse", "ResponsesRequest", "ResponseObject", events)
    summary = "Answer questions with probabilities."
    decide = _operation("createDecision", summary, "Decision", *ANSWERING)
    decide["requestBody"] = {"required": True, "content": _json("DecisionRequest")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MiniGPT-4",
            "version": "1",
            "description": "Questions about pictures, in OpenAI's format.",
        },
        "paths": {
            "/v1/chat/completions": {"post": complete},
            "/v1/responses": {"post": respond},
            "/v1/decisions": {"post": decide},
            "/v1/models": {"get": models},
            "/v1/models/{name}": {"parameters": [name], "get": model},
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


# vLLM's field, which body.py turns into `response_format`.
STRUCTURED_OUTPUTS = {
    "type": "object",
    "description": "What the answer must be: {json: a schema}, {regex: a regular expression}, "
    "{choice: a list of texts} or {json_object: true}.",
}


def _answering(name: str, request: str, response: str, events: str) -> Schema:
    operation = _operation(
        name, "Answer a conversation, whole or as server-sent events.", response, *ANSWERING
    )
    answered = operation["responses"]["200"]
    stream = {"type": "string", "description": events}
    answered["content"]["text/event-stream"] = {"schema": stream}
    answered["headers"] = {
        IGNORED: {"description": "The first fields of the request that are not read.", **TEXT},
        DROPPED: {"description": "How many old turns are left out of the prompt.", **TEXT},
    }
    operation["requestBody"] = {"required": True, "content": _json(request)}
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
    models = (
        DecisionRequest,
        ChatRequest,
        ChatCompletion,
        ResponseObject,
        Decision,
        ModelInfo,
        Models,
        Error,
    )
    _, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = _untitled(found["$defs"])
    schemas["ChatRequest"]["properties"]["structured_outputs"] = STRUCTURED_OUTPUTS
    response = _responses_request(schemas["ChatRequest"])
    decision = schemas["DecisionRequest"]
    decision["properties"]["input"] = response["properties"]["input"]
    decision["required"].append("input")
    return schemas | {"ResponsesRequest": response}


def _responses_request(chat: Schema) -> Schema:
    """The schema of a Responses request: fields shared with chat completions, and its own."""
    shared = {name: chat["properties"][name] for name in SHARED}
    item = {"type": "object", "description": "a message of OpenAI's Responses API"}
    own = {
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": item, "minItems": 1}]},
        "max_output_tokens": chat["properties"]["max_tokens"],
        "text": {"description": "{format: as response_format, with the schema beside its type}"},
    }
    return {"type": "object", "properties": shared | own, "required": ["input"]}


def _untitled(schema: Any) -> Any:
    """The schema without the titles that pydantic makes from every field's name."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if isinstance(schema, dict):
        return {
            k: _untitled(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))
        }
    return schema
