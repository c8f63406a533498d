"""The body of a request: its JSON object, the request in it, and the fields that are ignored."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NoReturn

from minigpt4.data.files import replace_surrogates
from minigpt4.web.api.errors import ApiError, json_path, quotable
from minigpt4.web.api.schemas import ChatRequest, Object
from minigpt4.web.api.validation_errors import validated

NAMED = 20  # ignored fields that are named; a request may hold millions
ALIASES = {"repeat_penalty": "repetition_penalty"}  # as llama.cpp, Ollama and LM Studio call it
JSON_TYPES = ("json_object", "json_schema")  # of `response_format`
# vLLM's constraints on an answer -> (is the value valid?, what it must be).
GUIDES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "json": (lambda value: isinstance(value, dict), "an object: a JSON schema"),
    "regex": (lambda value: isinstance(value, str), "a string: a regular expression"),
    "choice": (lambda value: _are_texts(value), "a list of texts, one of which is the answer"),
    "json_object": (lambda value: value is True, "true"),
}
# Further constraints, as llama.cpp, SGLang, Ollama, Gemini and vLLM call them. They are refused: an
# answer that does not keep to them would be worse than none.
UNBOUND = (
    "grammar",
    "json_schema",
    "ebnf",
    "format",
    "response_schema",
    "structural_tag",
    "allowed_token_ids",
)
# Prefixes of fields that say how a constraint is applied, not what it is.
MANNER = ("disable_", "whitespace_", "decoding_", "_")
CALLS = {"tool_choice": "tools", "function_call": "functions"}  # today's and the older names
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it
FORM = re.compile(rb"--|[\w.%+\[\]-]+=")  # how a body of form data begins
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # how gzip and zstd begin


def read_chat(body: dict, ignore_tools: bool = False) -> tuple[ChatRequest, list[str]]:
    """(the request, JSON paths of the first fields that are ignored). ApiError for a mistake.

    ignore_tools: ignore tools that the model may call; those that it must call are refused.
    """
    sent = body
    body, guide = _renamed(body)
    uncalled = ("none", "auto", None) if ignore_tools else ("none",)
    dropped = []
    for choice, tools in CALLS.items():
        if body.get(choice) in uncalled and body.pop(tools, None):
            dropped.append(tools)
    try:
        request = validated(ChatRequest, body)
    except ApiError as error:
        for alias, name in ALIASES.items():
            error = error if name in sent else error.sent_as(name, alias)
        raise error from None
    if guide and request.response_format:
        request.response_format.comes_from(guide)
    return request, [*dropped, *islice(unread(request), NAMED)]


def _renamed(body: dict) -> tuple[dict, str]:
    """(the fields under OpenAI's names, the field of vLLM from which `response_format` comes, or
    ""). If a field is given under both names, OpenAI's counts."""
    renamed = {ALIASES.get(name, name): value for name, value in body.items()}
    renamed |= {name: value for name, value in body.items() if name not in ALIASES}
    wanted = renamed.get("response_format")
    guide, taken = _taken_guide(renamed)
    if wanted is None or wanted == {"type": "text"}:
        renamed["response_format"] = taken or wanted
        return renamed, guide
    if guide:
        raise _both("response_format", guide)
    if isinstance(wanted, dict) and wanted.get("type") in JSON_TYPES:
        rest = {name: value for name, value in wanted.items() if name != "schema"}
        schema = wanted.get("schema")  # as llama.cpp, Together and Fireworks take it
        if schema is not None and "json_schema" not in wanted:
            renamed["response_format"] = _as_schema(rest, schema)
    elif isinstance(wanted, dict) and wanted.get("type") == "json":  # as TGI takes it
        renamed["response_format"] = _as_schema({}, wanted.get("value"))
    return renamed, ""


def _taken_guide(body: dict) -> tuple[str, dict | None]:
    """(the name of the field that constrains the answer, the same as `response_format`). Takes the
    fields out of the body: vLLM's `structured_outputs`, its older names, and SGLang's `regex`."""
    outputs = body.pop("structured_outputs", None) or {}
    if not isinstance(outputs, dict):
        raise ApiError("structured_outputs must be an object.", param="structured_outputs")
    given = {f"structured_outputs.{kind}": value for kind, value in outputs.items()}
    for name in [name for name in body if name.startswith("guided_")] + ["regex", *UNBOUND]:
        given[name] = body.pop(name, None)
    bound = {n: v for n, v in given.items() if v is not None and v != "" and v is not False}
    found: list[tuple[str, dict]] = []
    for name, value in bound.items():
        kind = name.removeprefix("structured_outputs.").removeprefix("guided_")
        if kind in GUIDES:
            found.append((name, _of_guide(name, kind, value)))
        elif kind.startswith(MANNER):
            body[name] = value  # to be named as ignored
        else:
            name = quotable(name)
            sentence = f"{name} is not supported: use response_format, or leave it out."
            raise ApiError(sentence, param=name)
    if len(found) > 1:
        raise _both(*(name for name, _ in found[:2]))
    return found[0] if found else ("", None)


def _both(first: str, second: str) -> ApiError:
    sentence = f"{first} and {second} both constrain the answer: send one of them."
    return ApiError(sentence, param=second)


def _of_guide(name: str, kind: str, value: Any) -> dict:
    """A field of `GUIDES` as `response_format`."""
    right, sentence = GUIDES[kind]
    if kind == "json" and isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if not right(value):
        raise ApiError(f"{name} must be {sentence}.", param=name)
    if kind == "json":
        return _as_schema({}, value)
    if kind == "json_object":
        return {"type": "json_object"}
    expression = value if kind == "regex" else "|".join(map(re.escape, value))
    return {"type": "regex", "value": expression}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def _as_schema(rest: dict, schema: Any) -> dict:
    return rest | {"type": "json_schema", "json_schema": {"schema": schema}}


def unread(value: Any, location: tuple[int | str, ...] = ()) -> Iterator[str]:
    """JSON paths of the fields that an `Object`, or one inside it, does not know. Those that are
    null are left out: they ask for nothing."""
    if isinstance(value, Object):
        for name, other in (value.model_extra or {}).items():
            if other is not None:
                yield json_path((*location, name))
        inner = [
            (getattr(value, name), (*location, field.alias or name))
            for name, field in type(value).model_fields.items()
        ]
        # Lists come last: they may have more such fields than the limit.
        for field_value, place in sorted(inner, key=lambda pair: isinstance(pair[0], list)):
            yield from unread(field_value, place)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from unread(item, (*location, number))


# --- JSON ----------------------------------------------------------------------------------------


def parse_body(body: bytes | bytearray) -> dict:
    """The body's JSON object, with "?" for each lone surrogate. ApiError if there is none."""
    overflows: list[str] = []

    def number(text: str) -> float:
        if math.isinf(value := float(text)):
            overflows.append(text)
        return value

    try:
        text = body.decode(json.detect_encoding(body))
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=number)
        if overflows:
            path = json_path(next(_overflowing(value)))
            sentence = f"{path} is a number that is too large: send a smaller one."
            raise ApiError(sentence, param=path)
        if SURROGATE.search(text):  # pydantic and UTF-8 cannot hold lone ones
            value = replace_surrogates(value)
    except RecursionError:
        raise ApiError("The body's JSON is nested too deeply: make it flatter.") from None
    except ValueError as error:
        raise ApiError(_why_no_json(body, error)) from None
    if not isinstance(value, dict):
        raise ApiError("The body must be a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(f"The body has {name}, which is not JSON: send a number, or null.")


def _overflowing(value: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[int | str, ...]]:
    """The places of numbers that are too large for a float."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _overflowing(inner, (*path, name))
    elif isinstance(value, float) and math.isinf(value):
        yield path


def _why_no_json(body: bytes | bytearray, error: ValueError) -> str:
    if not body.strip():
        return "The body is empty: send a JSON object."
    if body.startswith(COMPRESSED):
        return "The body is compressed: send plain JSON."
    if FORM.match(body):
        return "The body is form data: send a JSON object."
    if isinstance(error, UnicodeDecodeError):
        return "The body is not UTF-8: send JSON in UTF-8."
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno}, column {error.colno}"
        return f"The body is not JSON: correct it at {where}."
    return "The body's JSON has a number with too many digits: shorten it."
