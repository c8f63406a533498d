"""The API's own description, in OpenAPI 3.1: GET /v1/openapi.json.

What `chat_request` checks beyond it (who speaks first and last, what fits) is a 400, too.
"""

from typing import Any

from minigpt4.engine import Sampling
from minigpt4.web.api.chat_request import (
    IGNORED,
    MAX_MESSAGES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    ONLY,
    SAMPLING,
)

Schema = dict[str, Any]


def description() -> Schema:
    """The whole document."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MiniGPT-4",
            "version": "1",
            "description": "Questions about pictures, in OpenAI's format. More: docs/api.md.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _complete()},
            "/v1/models": {
                "get": _operation("listModels", "The model that is served.", "Models", (401, 503))
            },
            "/v1/models/{name}": {
                "parameters": [name],
                "get": _operation("getModel", "The model of that name.", "Model", (401, 404, 503)),
            },
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
        (400, 401, 404, 408, 413, 429, 500, 503),
    )
    events = {"type": "string", "description": "`data: ` and a chat.completion.chunk, or [DONE]"}
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": events}
    operation["requestBody"] = {"required": True, "content": _json("ChatRequest")}
    return operation


def _operation(name: str, summary: str, schema: str, errors: tuple[int, ...]) -> Schema:
    """A status that says how long to wait, or how to log in, does so in a header."""
    headers = {
        **dict.fromkeys((429, 503), {"Retry-After": {"schema": {"type": "string"}}}),
        401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    }
    refused = {
        str(status): {
            "description": "One sentence that says what is wrong.",
            "content": _json("Error"),
            **({"headers": headers[status]} if status in headers else {}),
        }
        for status in errors
    }
    answered = {"description": summary, "content": _json(schema)}
    return {"operationId": name, "summary": summary, "responses": {"200": answered, **refused}}


def _json(schema: str) -> Schema:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _object(properties: Schema, *optional: str) -> Schema:
    """With just these properties, all but the optional ones required."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _or_null(**schema: Any) -> Schema:
    """What may be left out may also be null."""
    return {"anyOf": [schema, {"type": "null"}]}


def _number(field: str) -> Schema:
    """The range of one of Sampling's fields."""
    low, high, inclusive = Sampling.RANGES[field]
    kind = "integer" if isinstance(low, int) else "number"
    return {"type": kind, "minimum" if inclusive else "exclusiveMinimum": low, "maximum": high}


def _schemas() -> Schema:
    text, count = {"type": "string"}, {"type": "integer", "minimum": 0}
    model = _object({"id": text, "object": {"const": "model"}, "created": count, "owned_by": text})
    models = {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}
    error = {"message": text, "type": text, "param": {"type": "null"}}
    return {
        "Model": model,
        "Models": _object({"object": {"const": "list"}, "data": models}),
        "Error": _object({"error": _object({**error, "code": {"type": ["string", "null"]}})}),
        "ChatRequest": _chat_request(),
        "ChatCompletion": _chat_completion(text, count),
    }


def _chat_request() -> Schema:
    part = {
        "oneOf": [
            {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "image_url"},
                    "image_url": {
                        "type": "object",
                        "properties": {"url": {"type": "string"}},
                        "required": ["url"],
                    },
                },
                "required": ["type", "image_url"],
            },
        ]
    }
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"oneOf": [{"type": "string"}, {"type": "array", "items": part}]},
        },
        "required": ["role", "content"],
    }
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
    switch = "boolean"
    include = {"include_usage": _or_null(type=switch), "include_obfuscation": {}}
    properties = {
        "model": _or_null(type="string"),
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": message,
        },
        **{name: _or_null(**_number(field)) for name, field in SAMPLING.items()},
        "stop": {"anyOf": [stop, {"type": "array", "maxItems": MAX_STOPS, "items": stop}]},
        "stream": _or_null(type=switch),
        "stream_options": _or_null(**_object(include, *include)),
        "logprobs": _or_null(type=switch),
        **{name: _or_null(enum=allowed) for name, (allowed, _) in ONLY.items()},
        **{name: {} for name in sorted(IGNORED)},
    }
    properties["stop"]["anyOf"].append({"type": "null"})
    return _object(properties, *(name for name in properties if name != "messages"))


def _chat_completion(text: Schema, count: Schema) -> Schema:
    token = _object(
        {
            "token": text,
            "logprob": {"type": "number"},
            "bytes": _or_null(type="array", items={"type": "integer"}),
            "top_logprobs": {"type": "array", "maxItems": 0},
        }
    )
    logprobs = _object({"content": {"type": "array", "items": token}, "refusal": {"type": "null"}})
    said = {"role": {"const": "assistant"}, "content": text, "refusal": {"type": "null"}}
    choice = _object(
        {
            "index": {"const": 0},
            "message": _object(said),
            "logprobs": _or_null(**logprobs),
            "finish_reason": {"enum": ["stop", "length"]},
        }
    )
    usage = {name: count for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    usage["prompt_tokens_details"] = _object({"cached_tokens": count})
    return _object(
        {
            "id": text,
            "created": count,
            "model": text,
            "object": {"const": "chat.completion"},
            "choices": {"type": "array", "items": choice, "minItems": 1, "maxItems": 1},
            "usage": _object(usage),
        }
    )
