"""POST /v1/responses: OpenAI's Responses API, over the conversation of chat completions.

A request becomes the same `ChatRequest`; item i of `input` becomes message i, so that errors can
name the field as the client sent it. Nothing is kept between requests.
"""

import re
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from itertools import islice
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from minigpt4.conversation import Answer, texts_of
from minigpt4.engine import AnyEngine
from minigpt4.web.api.body import NAMED, read_chat
from minigpt4.web.api.errors import ApiError, quotable
from minigpt4.web.api.reply import HEARTBEAT, HEARTBEAT_SECONDS, ChoiceWriter, event, refusal, used
from minigpt4.web.api.schemas import ChatRequest, Object, as_object
from minigpt4.web.api.validation_errors import validated

# Fields' names in chat completions, which errors use -> their names in this API.
NAMES = {"messages": "input", "response_format": "text.format"}
FIELDS = r"^messages\b|\bmessages(?=\[)|(?<![.\w])response_format\b"
# Other parts of sentences and paths that differ in this API.
FORMS = {
    '{"type": "text", "text": …}': '{"type": "input_text", "text": …}',
    '{"type": "image_url", "image_url": {"url": …}}': '{"type": "input_image", "image_url": …}',
    '"json_schema": {"schema": …}': '"name": …, "schema": …',
    "text.format.json_schema": "text.format",
    ".image_url.url": ".image_url",
}
KEPT_STATE = {
    "previous_response_id": "this server keeps nothing. Send all of the input.",
    "conversation": "this server keeps nothing. Send all of the input.",
    "background": "leave it out, and wait for the answer or stream it.",
    "prompt": "this server has no stored prompts. Send the text as instructions and input.",
}
# Fields that this API adds to a message and to its text. Clients send them back.
ECHOED, ECHOED_IN_TEXT = ("type", "id", "status"), ("annotations", "logprobs")
LOGPROBS = "message.output_text.logprobs"  # in `include`


class AsSent(ApiError):
    """A refusal that already names the field as the client sent it."""


class ResponsesBody(Object):
    """The fields that a chat completion does not have. The rest is read as a chat completion."""

    text: dict[str, Any] | None = None
    include: list[Any] | None = None
    # Only strings: it is sent back, and could be nested too deeply for that.
    metadata: Annotated[
        dict[str, str] | None,
        Field(description="must be an object of strings."),
        BeforeValidator(as_object),
    ] = None


def read_response(body: dict, ignore_tools: bool = False) -> tuple[ChatRequest, list[str]]:
    """(the request, JSON paths of the first fields that are ignored), as `read_chat` reads them."""
    for name, reason in KEPT_STATE.items():
        if body.get(name):
            raise ApiError(f"{name} is not supported: {reason}", param=name)
    if body.get("response_format") is not None:
        sentence = "response_format is called text.format here: send that."
        raise AsSent(sentence, param="response_format")
    own = validated(ResponsesBody, body)
    if body.get("input") is None:
        raise ApiError("input is missing: add it.", param="input")
    if not isinstance(body["input"], str | list):
        raise ApiError("input must be a string or a list of messages.", param="input")
    if isinstance(body["input"], str) and not body["input"].strip():
        raise ApiError("input is empty: write a question.", param="input")
    apart = ("input", "text", "include", "max_output_tokens", "n", "messages")
    chat = _without(body, apart)
    ignored = [name for name in ("n", "messages") if body.get(name) is not None]
    chat["messages"] = _messages(body["input"])
    limit = "max_tokens" if body.get("max_output_tokens") is None else "max_output_tokens"
    if limit == "max_output_tokens":
        rivals = ("max_tokens", "max_completion_tokens")
        ignored += [name for name in rivals if chat.pop(name, None) is not None]
        chat["max_tokens"] = body[limit]
    if own.text is not None:
        chat["response_format"] = _format(own.text.get("format"))
        rest = (name for name, value in own.text.items() if name != "format" and value is not None)
        ignored += [f"text.{quotable(name)}" for name in islice(rest, NAMED)]
    included = own.include or []
    if LOGPROBS in included:
        chat["logprobs"] = True
    elif chat.pop("top_logprobs", None):
        ignored.append("top_logprobs")
    ignored += ["include"] if any(name != LOGPROBS for name in included) else []
    try:
        request, others = read_chat(chat, ignore_tools)
    except ApiError as error:
        raise error.sent_as("max_tokens", limit) from None
    return request, [*ignored, *map(_rename, others)][:NAMED]


def renamed(error: ApiError) -> ApiError:
    """An error about a chat completion, with the names of the Responses API."""
    if isinstance(error, AsSent):
        return error
    param = _rename(error.param) if error.param else error.param
    return ApiError(_rename(str(error)), error.status, error.code, param, error.headers)


def _rename(text: str) -> str:
    text = re.sub(FIELDS, lambda found: NAMES[found[0]], text)
    for there, here in FORMS.items():
        text = text.replace(there, here)
    return text


def _messages(items: str | list) -> list:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    return [_message(item, i) for i, item in enumerate(items)]


def _message(item: Any, place: int) -> Any:
    """A message for an item; that for an item of reasoning, which clients send back, is empty."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type") or "message"
    if kind == "reasoning":
        return {"role": "system", "content": ""}
    if kind == "item_reference":
        sentence = f"input[{place}] refers to an earlier output, which this server does not keep: "
        sentence += "send the message itself (clients do so with store: false)."
        raise ApiError(sentence, param=f"input[{place}]")
    if kind != "message":
        name = quotable(kind) if isinstance(kind, str) else "unknown"
        sentence = f"input[{place}] is of type “{name}”: only messages are supported."
        raise ApiError(sentence, param=f"input[{place}].type")
    message = _without(item, ECHOED)
    if isinstance(content := message.get("content"), list):
        path = f"input[{place}].content"
        message["content"] = [_part(part, f"{path}[{i}]") for i, part in enumerate(content)]
    return message


def _part(part: Any, path: str) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") == "output_text":
        return _without(part, ECHOED_IN_TEXT)
    if part.get("type") != "input_image":
        return part
    if part.get("file_id") is None and not isinstance(part.get("image_url"), str | dict):
        end = "is missing: add it." if "image_url" not in part else "must be a string."
        raise ApiError(f"{path}.image_url {end}", param=f"{path}.image_url")
    return _without(part, ("detail",))  # as in chat


def _without(fields: dict, names: Collection[str]) -> dict:
    return {name: value for name, value in fields.items() if name not in names}


def _format(wanted: Any) -> Any:
    """`text.format` as chat completions' response_format, which nests the schema once more."""
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": _without(wanted, ("type",))}
    return wanted


class ResponseReply:
    """An answer as OpenAI's response, whole or as events."""

    def __init__(self, engine: AnyEngine, answers: Sequence[Answer], request: ChatRequest) -> None:
        (self._answer,) = self._answers = answers
        self._choice = ChoiceWriter(engine, self._answer, 0, request)
        self._item = f"msg_{uuid.uuid4().hex}"
        self._number = -1  # of the last event
        self._logprobs: list[dict] = []
        sampling = request.sampling(engine.model.config)
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": engine.model.config.name,
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "temperature": sampling.temperature,
            "text": {"format": _echo(request)},
            "tool_choice": "none",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": request.truncation or "auto",
        }

    def whole(self) -> dict:
        """The response, once the answer has ended."""
        self._logprobs += self._new_logprobs()
        reason = None if self._complete else {"reason": "max_output_tokens"}
        status = "completed" if self._complete else "incomplete"
        message = self._message(status, [self._text])
        ends = {"status": status, "incomplete_details": reason, "output": [message]}
        return self._head | ends | {"usage": usage(*used(self._answers))}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events with the answer's text as it is generated."""
        begun = self._head | {"status": "in_progress", "incomplete_details": None, "output": []}
        begun |= {"usage": None}
        empty = self._text | {"text": ""}
        yield self._event("created", response=begun)
        yield self._event("in_progress", response=begun)
        yield self._event(
            "output_item.added", output_index=0, item=self._message("in_progress", [])
        )
        yield self._event("content_part.added", **self._place, part=empty)
        try:
            async for number, text in texts_of(self._answers, HEARTBEAT_SECONDS):
                if number is None:
                    yield HEARTBEAT
                elif text is not None:
                    new = self._new_logprobs()
                    self._logprobs += new
                    yield self._event("output_text.delta", **self._place, delta=text, logprobs=new)
        except Exception as error:
            refused = {"code": "server_error", "message": str(refusal(error))}
            yield self._event("failed", response=begun | {"status": "failed", "error": refused})
            return
        done = self.whole()
        (message,) = done["output"]
        (part,) = message["content"]
        whole = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("output_text.done", **self._place, **whole)
        yield self._event("content_part.done", **self._place, part=part)
        yield self._event("output_item.done", output_index=0, item=message)
        yield self._event(done["status"], response=done)

    def _event(self, name: str, **content: Any) -> bytes:
        self._number += 1
        kind = f"response.{name}"
        data = {"type": kind, "sequence_number": self._number, **content}
        return f"event: {kind}\n".encode() + event(data)

    @property
    def _place(self) -> dict:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    @property
    def _complete(self) -> bool:
        return self._choice.finish_reason == "stop"

    @property
    def _text(self) -> dict:
        about = {"annotations": [], "logprobs": self._logprobs}
        return {"type": "output_text", "text": self._answer.text} | about

    def _message(self, status: str, content: list[dict]) -> dict:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _new_logprobs(self) -> list[dict]:
        """The log-probabilities since the last call. Here, `bytes` is always a list."""

        def listed(token: dict) -> dict:
            return token | {"bytes": token["bytes"] or []}

        found = (self._choice.logprobs() or {}).get("content", ())
        return [
            listed(token) | {"top_logprobs": [listed(top) for top in token["top_logprobs"]]}
            for token in found
        ]


def usage(prompt: int, tokens: int, reused: int) -> dict:
    """OpenAI's usage. reused: tokens of the prompt that were taken from the cache."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": reused, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + tokens,
    }


def _echo(request: ChatRequest) -> dict:
    """The format as it was asked for."""
    wanted = request.response_format
    if wanted is None or wanted.json_schema is None:
        return {"type": wanted.type if wanted else "text"}
    schema = wanted.json_schema
    name = schema.name if isinstance(schema.name, str) else "answer"
    return {"type": "json_schema", "name": name, "schema": schema.content}
