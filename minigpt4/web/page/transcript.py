"""A conversation written down: as Markdown to be read, as JSON to be opened again."""

import base64
import json
from typing import Any, Literal

from minigpt4.conversation import Conversation
from minigpt4.errors import UserError
from minigpt4.model.image import Picture, data_url
from minigpt4.model.prompt import ImageRef, Message
from minigpt4.web.guard import decoding
from minigpt4.web.guard.gradio_patches import replace_surrogates
from minigpt4.web.guard.limits import FILES_AT_ONCE
from minigpt4.web.page.titles import subject

FORMAT = "minigpt4-conversation"
VERSION = 1
# Pixels of a picture's longest side: in a download, in the browser's list.
FULL_SIDE, SMALL_SIDE = 1024, 256
MAX_BYTES = 100 * 2**20
MAX_MESSAGES = 1000
MAX_CHARACTERS = 1_000_000
MAX_NAME = 64  # characters of an entry's name in the browser's list
TITLE_LENGTH = 60


def title(conversation: Conversation) -> str:
    """The beginning of what it is about; "" where there are only pictures."""
    line = " ".join(subject(conversation).split())
    return line[:TITLE_LENGTH] + ("…" if len(line) > TITLE_LENGTH else "")


def to_data(conversation: Conversation, side: int, model: str = "") -> dict:
    """Plain data for JSON; pictures as JPEG `data:` URLs, at most `side` pixels long."""
    used = {i.key for m in conversation.messages for i in m.images}
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title(conversation),
        "model": model,
        "system": conversation.system,
        "messages": [
            {"role": m.role, "parts": [_part(p) for p in m.parts]} for m in conversation.messages
        ],
        "pictures": {
            key: data_url(picture, side, quality=75 if side <= SMALL_SIDE else 90)
            for key, picture in conversation.pictures.items()
            if key in used
        },
    }


def to_markdown(conversation: Conversation, model: str = "") -> str:
    """A document with the pictures inside, as `data:` URLs."""
    lines = [f"# {title(conversation) or 'Conversation'}", ""]
    if model:
        lines += [f"With MiniGPT-4, {model}.", ""]
    for message in conversation.messages:
        lines += ["## Question" if message.role == "user" else "## Answer", ""]
        for part in message.parts:
            if isinstance(part, ImageRef):
                url = data_url(conversation.pictures[part.key], SMALL_SIDE * 2)
                lines += [f"![picture]({url})", ""]
            else:
                lines += [part, ""]
    return "\n".join(lines)


def _part(part: str | ImageRef) -> dict:
    if isinstance(part, ImageRef):
        return {"type": "image", "key": part.key}
    return {"type": "text", "text": part}


# --- reading: whatever a file or a browser sends is checked here ----------------------------------


def from_file(path: str) -> Conversation:
    """The conversation in a downloaded JSON file. UserError where it is something else."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        _require(len(text) <= MAX_BYTES)
        data = replace_surrogates(json.loads(text))
    except (OSError, ValueError, RecursionError):
        raise _wrong() from None
    return from_data(data)


def from_record(record: object) -> tuple[object, str]:
    """The data and the name of an entry of the browser's list. UserError where it is none."""
    fields = _typed(record, dict)
    _require("data" in fields)
    return fields["data"], _typed(fields.get("name"), str)[:MAX_NAME]


def from_data(data: object) -> Conversation:
    """The conversation that `to_data` wrote. UserError where the data is something else."""
    fields = _typed(data, dict)
    _require(fields.get("format") == FORMAT and fields.get("version") == VERSION)
    urls = _typed(fields.get("pictures"), dict)
    _require(len(urls) <= FILES_AT_ONCE)
    messages = _typed(fields.get("messages"), list)
    _require(len(messages) <= MAX_MESSAGES)
    system = fields.get("system")
    _require(system is None or isinstance(system, str))
    pictures = {key: _picture(url) for key, url in urls.items()}
    conversation = Conversation(pictures={p.key: p for p in pictures.values()}, system=system)
    conversation.messages = [_message(m, i, pictures) for i, m in enumerate(messages)]
    texts = [p for m in conversation.messages for p in m.parts if isinstance(p, str)]
    _require(sum(map(len, texts)) + len(system or "") <= MAX_CHARACTERS)
    return conversation


def _message(data: object, place: int, pictures: dict[str, Picture]) -> Message:
    """Questions and answers take turns; only questions hold pictures."""
    fields = _typed(data, dict)
    role: Literal["user", "assistant"] = "assistant" if place % 2 else "user"
    _require(fields.get("role") == role)
    parts = tuple(_read_part(part, pictures) for part in _typed(fields.get("parts"), list))
    _require(bool(parts))
    _require(role == "user" or all(isinstance(part, str) for part in parts))
    return Message(role, parts)


def _read_part(data: object, pictures: dict[str, Picture]) -> str | ImageRef:
    part = _typed(data, dict)
    if part.get("type") != "image":
        _require(part.get("type") == "text")
        return _typed(part.get("text"), str)
    key = _typed(part.get("key"), str)
    _require(key in pictures)
    return ImageRef(pictures[key].key)  # decoded again, the picture has another key


def _picture(url: object) -> Picture:
    head, _, encoded = _typed(url, str).partition(",")
    _require(head.startswith("data:image/") and head.endswith(";base64"))
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise _wrong() from None
    picture = decoding.load(content)
    _require(max(picture.rgb.size) <= FULL_SIDE)  # no download holds larger ones
    return picture


def _typed(value: object, kind: type) -> Any:
    _require(isinstance(value, kind))
    return value


def _require(condition: bool) -> None:
    """UserError unless the condition holds."""
    if not condition:
        raise _wrong()


def _wrong() -> UserError:
    return UserError(
        "This file holds no conversation that can be opened: choose one that was downloaded here.",
        message_id="no_conversation",
    )
