"""What clients send in their own ways -> the body that `schemas` checks. Nothing is refused.

Everything stays in its place, so that an error names the field as the client sent it.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from pydantic import BaseModel

from minigpt4.web.api.errors import json_path
from minigpt4.web.api.mistakes import named_fields
from minigpt4.web.api.schemas import (
    PARTS,
    ChatMessage,
    ChatRequest,
    ImageUrl,
    JsonSchema,
    ResponseFormat,
    StreamOptions,
    TextPart,
    parse,
)

NAMED = 20  # ignored fields that are named; a request may hold millions
ALIASES = {"repeat_penalty": "repetition_penalty"}  # llama.cpp's, Ollama's and LM Studio's name
# Other types of parts: of the Responses API, which some clients send here, too.
PART_TYPES = {"input_text": "text", "output_text": "text", "input_image": "image_url"}
CALLS = {"tool_choice": "tools", "function_call": "functions"}  # by today's and the older name
# Values that stand for "not set", by field: as vLLM, llama.cpp and LM Studio read them.
UNSET = {"max_tokens": -1, "max_completion_tokens": -1, "seed": -1, "top_k": -1}
INTEGERS = (*UNSET, "n", "top_logprobs", "num_beams")
LOWEST_TEMPERATURE = 0.01  # below, clients mean 0
LOWEST_TOP_P = 1e-6  # keeps the most likely token alone, which is what clients mean by 0


def read_chat(body: dict) -> tuple[ChatRequest, list[str]]:
    """(the request, JSON paths of the first fields that are ignored). ApiError about a mistake."""
    normalized, ignored = normalize(body)
    return parse(normalized), ignored


def normalize(body: dict) -> tuple[dict, list[str]]:
    """(the body as `schemas` takes it, JSON paths of the first fields that are ignored).

    body: any JSON object; values of the wrong type stay as they are.
    """
    body = {name: _value(name, value) for name, value in _renamed(body).items()}
    dropped = []
    for choice, tools in CALLS.items():
        if body.get(choice) == "none" and body.pop(tools, None):
            dropped.append(tools)
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = [_message(message) for message in messages]
    return body, [*dropped, *islice(_unknown(body), NAMED)]


def _renamed(body: dict) -> dict:
    """Fields under OpenAI's names; a field that is there under both keeps OpenAI's value."""
    renamed = {ALIASES.get(name, name): value for name, value in body.items()}
    return renamed | {name: value for name, value in body.items() if name not in ALIASES}


def _value(name: str, value: Any) -> Any:
    if name in INTEGERS and isinstance(value, float) and value.is_integer():
        value = int(value)  # languages without integers send 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and value == UNSET.get(name):
        return None
    if number and name == "temperature" and 0 < value < LOWEST_TEMPERATURE:
        return 0.0
    if number and name == "top_p" and value == 0:
        return LOWEST_TOP_P
    if name == "stop" and isinstance(value, str | list):
        return [text for text in ([value] if isinstance(value, str) else value) if text != ""]
    return value


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if content is None and "content" in message:
        return message | {"content": ""}
    if isinstance(content, list):
        return message | {"content": [_part(part) for part in content]}
    return message


def _part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    part = part | {"type": PART_TYPES.get(kind, kind) if isinstance(kind, str) else kind}
    if isinstance(url := part.get("image_url"), str):
        part["image_url"] = {"url": url}
    return part


def _unknown(body: dict) -> Iterator[str]:
    """JSON paths of the fields that are not read; those that are null ask for nothing."""
    yield from unread(body, ChatRequest, ())
    yield from unread(body.get("stream_options"), StreamOptions, ("stream_options",))
    wanted = body.get("response_format")
    yield from unread(wanted, ResponseFormat, ("response_format",))
    schema = wanted.get("json_schema") if isinstance(wanted, dict) else None
    yield from unread(schema, JsonSchema, ("response_format", "json_schema"))
    messages = body.get("messages")
    for place, message in enumerate(messages if isinstance(messages, list) else ()):
        yield from unread(message, ChatMessage, ("messages", place))
        content = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            where = ("messages", place, "content", number)
            kind = part.get("type") if isinstance(part, dict) else None
            yield from unread(part, PARTS.get(str(kind), TextPart), where)
            if kind == "image_url":
                yield from unread(part.get("image_url"), ImageUrl, (*where, "image_url"))


def unread(data: Any, model: type[BaseModel], location: tuple[int | str, ...]) -> Iterator[str]:
    """JSON paths of an object's fields that the model lacks; null ones ask for nothing."""
    known = named_fields(model)
    for name, value in data.items() if isinstance(data, dict) else ():
        if name not in known and value is not None:
            yield json_path((*location, name))
