"""A conversation written down: as Markdown to be read, as JSON to be opened again."""

import base64
import json
from binascii import Error as NotBase64

from minigpt4.conversation import Conversation
from minigpt4.errors import UserError
from minigpt4.model.image import Picture, data_url
from minigpt4.model.prompt import ImageRef, Message
from minigpt4.web.guard import decoding
from minigpt4.web.guard.events import whole
from minigpt4.web.guard.limits import FILES_AT_ONCE

FORMAT = "minigpt4-conversation"
VERSION = 1
FULL_SIDE, SMALL_SIDE = 1024, 256  # longest side of a picture in a download; in the browser's list
MAX_BYTES = 100 * 2**20
MAX_MESSAGES = 1000
MAX_CHARACTERS = 1_000_000
TITLE_LENGTH = 60
WRONG = "This file holds no conversation that can be opened: choose one that was downloaded here."


def title(conversation: Conversation) -> str:
    """The first words anyone wrote; "" where there are only pictures."""
    for message in conversation.messages:
        for part in message.parts:
            if isinstance(part, str) and message.role == "user" and part.strip():
                line = " ".join(part.split())
                return line[:TITLE_LENGTH] + ("…" if len(line) > TITLE_LENGTH else "")
    return ""


def to_data(conversation: Conversation, side: int, model: str = "") -> dict:
    """Plain data for JSON; pictures as JPEG `data:` URLs no longer than `side`."""
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


def from_data(data: object) -> Conversation:
    """The conversation in what `to_data` made. UserError where it is something else: whatever a
    file holds is checked here, and its pictures are opened like any others."""
    try:
        assert isinstance(data, dict)
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise UserError(WRONG)
        assert len(data["pictures"]) <= FILES_AT_ONCE
        loaded = {key: _picture(url) for key, url in dict(data["pictures"]).items()}
        conversation = Conversation(pictures={p.key: p for p in loaded.values()})
        system = data.get("system")
        assert system is None or isinstance(system, str)
        conversation.system = system
        assert len(data["messages"]) <= MAX_MESSAGES
        for i, message in enumerate(data["messages"]):
            # Questions and answers take turns; the last answer may be missing.
            assert message["role"] == ("user", "assistant")[i % 2]
            parts = tuple(_read_part(p, loaded) for p in message["parts"])
            assert parts
            assert i % 2 == 0 or all(isinstance(p, str) for p in parts)
            conversation.messages.append(Message(message["role"], parts))
        texts = [p for m in conversation.messages for p in m.parts if isinstance(p, str)]
        assert sum(len(text) for text in texts) + len(system or "") <= MAX_CHARACTERS
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(WRONG) from None
    return conversation


def from_file(path: str) -> Conversation:
    """The conversation in a downloaded JSON file. UserError where it is something else."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(WRONG)
        data = whole(json.loads(text))
    except (OSError, ValueError, RecursionError):
        raise UserError(WRONG) from None
    return from_data(data)


def to_markdown(conversation: Conversation, model: str = "") -> str:
    """To be read, or put into a document; pictures are inside, as `data:` URLs."""
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


def _read_part(part: dict, pictures: dict[str, Picture]) -> str | ImageRef:
    if part["type"] == "image":
        return ImageRef(pictures[part["key"]].key)  # decoded anew, it has another key
    assert isinstance(part["text"], str)
    return part["text"]


def _picture(url: str) -> Picture:
    head, _, encoded = url.partition(",")
    assert head.startswith("data:image/") and head.endswith(";base64")
    try:
        picture = decoding.load(base64.b64decode(encoded, validate=True))
    except NotBase64:
        raise UserError(WRONG) from None
    assert max(picture.rgb.size) <= FULL_SIDE  # larger ones are in no download, and take memory
    return picture
