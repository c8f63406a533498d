"""The body of POST /v1/chat/completions, checked field by field: JSON -> ChatRequest.

Whatever is wrong is a `UserError` that names the field: a program's author reads it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minigpt4.config import ModelConfig
from minigpt4.engine import Sampling
from minigpt4.errors import UserError
from minigpt4.start import default_sampling
from minigpt4.web.guard.limits import FILES_AT_ONCE

MAX_MESSAGES, MAX_CHARACTERS = 1000, 200_000
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 200

# field -> Sampling's
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",  # the newer name, which wins
    "seed": "seed",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "num_beams": "num_beams",
}
OTHERS = {"model", "messages", "stream", "stream_options", "stop", "logprobs"}
# What changes no answer here is accepted and not looked at.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
# field -> the values that ask for nothing, what to say of any other
ONLY: dict[str, tuple[list, str]] = {
    "n": ([1], "n must be 1: ask again for another answer."),
    "presence_penalty": ([0], "presence_penalty is not supported: use repetition_penalty."),
    "frequency_penalty": ([0], "frequency_penalty is not supported: use repetition_penalty."),
    "top_logprobs": ([0], "top_logprobs must be 0: only the chosen token's logprob is known."),
    "logit_bias": ([{}], "logit_bias is not supported."),
    "tools": ([[]], "Tools are not supported."),
    "tool_choice": (["none", "auto"], "Tools are not supported."),
    "parallel_tool_calls": ([True, False], "Tools are not supported."),
    "functions": ([[]], "Functions are not supported."),
    "function_call": (["none", "auto"], "Functions are not supported."),
    "response_format": ([{"type": "text"}], 'response_format must be {"type": "text"}.'),
    "modalities": ([["text"]], 'modalities must be ["text"].'),
}


@dataclass(frozen=True)
class Said:
    """One user's or assistant's message; `pictures` are its image_url's, not yet opened."""

    role: str
    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """What was asked for; `system` None: the model's own system text."""

    model: str | None
    system: str | None
    messages: tuple[Said, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool


def read_json(body: bytes) -> dict:
    """The body's JSON object."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise UserError("The body must be JSON, and not nested deeply.") from None
    if not isinstance(value, dict):
        raise UserError("The body must be a JSON object.")
    return value


def parse(body: dict, config: ModelConfig) -> ChatRequest:
    """Check the body's fields; sampling left out is the model's default."""
    body = {name: value for name, value in body.items() if value is not None}
    for name in body:
        if name not in SAMPLING and name not in ONLY and name not in OTHERS | IGNORED:
            raise UserError(f"There is no field “{_short(name)}”: leave it out.")
    for name, (allowed, sentence) in ONLY.items():
        if name in body and not any(_same(body[name], value) for value in allowed):
            raise UserError(sentence)
    sampling = {field: body[name] for name, field in SAMPLING.items() if name in body}
    request = ChatRequest(
        model=_typed(body, "model", str, None),
        **_conversation(_typed(body, "messages", list, [])),
        sampling=_sampling(config, sampling, body),
        stop=_stop(body.get("stop", [])),
        stream=_typed(body, "stream", bool, False),
        include_usage=_include_usage(_typed(body, "stream_options", dict, {})),
        logprobs=_typed(body, "logprobs", bool, False),
    )
    if request.logprobs and request.sampling.num_beams > 1:
        raise UserError("logprobs cannot be had of a beam search: set num_beams to 1.")
    return request


def _sampling(config: ModelConfig, given: dict, body: dict) -> Sampling:
    try:
        return default_sampling(config, **given)
    except UserError as error:  # it calls the field by our name
        theirs = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        raise UserError(str(error).replace("max_new_tokens", theirs)) from None


def _include_usage(options: dict) -> bool:
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise UserError("stream_options may hold include_usage only.")
    return _typed(options, "include_usage", bool, False)


def _stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    good = isinstance(strings, list) and len(strings) <= MAX_STOPS
    if not good or not all(
        isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in strings
    ):
        raise UserError(
            f"stop must be a string of 1 to {MAX_STOP_CHARACTERS} characters, or a list of up to "
            f"{MAX_STOPS} of them."
        )
    return tuple(strings)


def _conversation(messages: list) -> dict:
    """The fields `system` and `messages` of a ChatRequest."""
    if not messages:
        raise UserError("messages must be a list of at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise UserError(f"messages must be at most {MAX_MESSAGES}.")
    system: list[str] = []
    said: list[Said] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise UserError(f"{where} must be an object with role and content.")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise UserError(f"{where}.role must be system, developer, user or assistant.")
        if message.get("tool_calls") or message.get("function_call"):
            raise UserError("Tools are not supported.")
        parts = list(_parts(message.get("content"), where + ".content"))
        text = "\n".join(value for kind, value in parts if kind == "text")
        pictures = tuple(value for kind, value in parts if kind == "image_url")
        if pictures and role != "user":
            raise UserError(f"{where}: only a user's message may hold pictures.")
        if role in ("system", "developer"):
            if said:
                raise UserError(f"{where}: system messages come before all others.")
            system.append(text)
        elif role == "user" and not text.strip() and not pictures:
            raise UserError(f"{where} is empty: write a question.")
        else:
            said.append(Said(role, text, pictures))
    if not said or said[0].role != "user" or said[-1].role != "user":
        raise UserError("The first and the last of messages, after system's, must be a user's.")
    if sum(len(m.pictures) for m in said) > FILES_AT_ONCE:
        raise UserError(f"A conversation may hold at most {FILES_AT_ONCE} pictures.")
    if sum(len(text) for text in [*system, *(m.text for m in said)]) > MAX_CHARACTERS:
        raise UserError(
            f"The conversation has more than {MAX_CHARACTERS} characters: shorten it.", "too_long"
        )
    return {"system": "\n".join(system) if system else None, "messages": tuple(said)}


def _parts(content: Any, where: str) -> Iterator[tuple[str, str]]:
    """("text", a text) or ("image_url", a URL), in order."""
    if isinstance(content, str):
        yield "text", content
        return
    if not isinstance(content, list):
        raise UserError(f"{where} must be a string or a list of parts.")
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield "text", part["text"]
            continue
        image = part.get("image_url") if kind == "image_url" else None
        url = image.get("url") if isinstance(image, dict) else None
        if not isinstance(url, str):
            raise UserError(
                f'{where}[{place}] must be {{"type": "text", "text": …}} or '
                '{"type": "image_url", "image_url": {"url": …}}.'
            )
        yield "image_url", url


def _typed(body: dict, name: str, kind: type, default: Any) -> Any:
    names = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}
    if body.get(name) is None:
        return default
    if not isinstance(body[name], kind):
        raise UserError(f"{name} must be {names[kind]}.")
    return body[name]


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and true is not 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _short(name: str) -> str:
    return "".join(c if c.isprintable() and c not in "<>" else "?" for c in name[:40])


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are no JSON
