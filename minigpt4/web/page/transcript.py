"""A conversation written down: as Markdown, to be read; as JSON, in a file or in the browser's
store, to be opened again."""

import base64
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from minigpt4.conversation import Conversation
from minigpt4.data.files import replace_surrogates
from minigpt4.engine import Stats
from minigpt4.errors import UserError
from minigpt4.model.image import Picture, data_url
from minigpt4.model.prompt import ImageRef, Message
from minigpt4.web.guard import decoding
from minigpt4.web.guard.limits import FILES_AT_ONCE
from minigpt4.web.guard.uploads import uploaded
from minigpt4.web.page import looks
from minigpt4.web.page.session import About, Remark, Session
from minigpt4.web.page.titles import title
from minigpt4.web.page.versions import Fork, Forks, Tail, hidden_messages

FORMAT = "minigpt4-conversation"
VERSION = 1
FULL_SIDE = 1024  # pixels of a picture's longest side, in a download and in the browser's store
MARKDOWN_SIDE = 512
MAX_BYTES = 100 * 2**20
MAX_MESSAGES = 1000
MAX_CHARACTERS = 1_000_000
MAX_TITLE = 200
MAX_REMARK = 500
# The fields of an answer's `Stats` that are kept.
FIGURES = ("prompt_tokens", "reused_tokens", "tokens", "seconds_to_first", "seconds")
STOP_REASONS = {"stop", "length", "time", "closed", "interrupted"}
LAST_TIME = 8_640_000_000_000_000  # ms; browsers know no later date
_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)  # of an entry of the browser's list
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")  # characters that change the direction


def to_data(session: Session, model: str = "", side: int | None = FULL_SIDE) -> dict:
    """Plain data for JSON; pictures as JPEG `data:` URLs, at most `side` pixels long.

    side: None leaves the pictures out, for the browser, which has its own keys for them. A running
    answer is written down as if it were interrupted now.
    """
    conversation, keys = session.conversation, session.keys if side is None else {}
    used = used_pictures(conversation, session.forks)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "title": title(conversation, session.captions),
        "model": model,
        "system": conversation.system,
        "stop": session.stop_reason or ("interrupted" if session.busy else ""),
        "messages": _messages(conversation.messages, keys),
        "forks": _forks(session.forks, keys),
        "figures": _figures(session.statistics),
        "remarks": [[remark.before, remark.text] for remark in session.remarks],
        "captions": {
            keys.get(key, key): caption
            for key in sorted(used)
            if (caption := looks.find(key).caption or session.captions.get(key, ""))
        },
    }
    if side is not None:
        pictures = conversation.pictures.items()
        data["pictures"] = {k: data_url(p, side) for k, p in pictures if k in used}
    return data


def used_pictures(conversation: Conversation, forks: Forks) -> set[str]:
    """The keys of the pictures that any version shows."""
    messages = [*conversation.messages, *hidden_messages(forks)]
    return {i.key for m in messages for i in m.images}


def _messages(messages: Sequence[Message], keys: Mapping[str, str]) -> list[dict]:
    return [{"role": m.role, "parts": [_part(p, keys) for p in m.parts]} for m in messages]


def _forks(forks: Forks, keys: Mapping[str, str]) -> dict:
    return {
        str(place): {"shown": fork.shown, "tails": [_tail(tail, keys) for tail in fork.tails]}
        for place, fork in forks.items()
        if any(fork.tails)
    }


def _tail(tail: Tail | None, keys: Mapping[str, str]) -> dict | None:
    if tail is None:
        return None
    return {
        "messages": _messages(tail.messages, keys),
        "forks": _forks(tail.forks, keys),
        "figures": _figures(tail.statistics),
        "stop": tail.stop_reason,
    }


def _figures(statistics: Mapping[int, Stats]) -> dict[str, list[float]]:
    return {
        str(place): [round(getattr(stats, name), 3) for name in FIGURES]
        for place, stats in statistics.items()
        if stats.tokens
    }


def to_markdown(conversation: Conversation, model: str = "", heading: str = "") -> str:
    """A document with the pictures inside, as `data:` URLs."""
    lines = [f"# {heading or title(conversation) or 'Conversation'}", ""]
    if model:
        lines += [f"With MiniGPT-4, {model}.", ""]
    for message in conversation.messages:
        lines += ["## Question" if message.role == "user" else "## Answer", ""]
        for part in message.parts:
            if isinstance(part, ImageRef):
                url = data_url(conversation.pictures[part.key], MARKDOWN_SIDE)
                lines += [f"![picture]({url})", ""]
            else:
                lines += [part, ""]
    return "\n".join(lines)


def _part(part: str | ImageRef, keys: Mapping[str, str]) -> dict:
    if isinstance(part, ImageRef):
        return {"type": "image", "key": keys.get(part.key, part.key)}
    return {"type": "text", "text": part}


# --- for the browser's store, which assets/chats.js writes ----------------------------------------


def record(session: Session, model: str) -> dict:
    """The conversation as it is now, without its pictures, which the browser fetches and keeps."""
    keys = session.keys
    used = used_pictures(session.conversation, session.forks)
    return {
        "name": session.name,
        "about": asdict(session.entry) if session.entry else None,
        "data": to_data(session, model, None),
        "pictures": {
            keys.get(key, key): {"path": path, "name": Path(session.files.get(key, "")).name}
            for key in sorted(used)
            if (path := looks.find(key).thumbnail)
        },
    }


def forgotten(name: str, text: str = "") -> dict:
    """Tells assets/chats.js that the server no longer has the conversation that the page shows.

    text: an edited question, which the page puts into the message box.
    """
    return {"mark": secrets.token_hex(4), "forgotten": name, "text": text, "records": []}


def told(session: Session, *records: dict, settled: bool = False) -> dict:
    """A message for assets/chats.js: records, and the name of the conversation that the page shows.

    settled: the page has just switched to it. The mark is new each time, so that the browser
    notices every message.
    """
    return {
        "mark": secrets.token_hex(4),
        "shown": session.latest.name,
        "settled": settled,
        "records": list(records),
    }


# --- reading: all data from a file or a browser is checked here -----------------------------------


def from_file(path: str) -> Session:
    """The session in a downloaded JSON file. UserError if it is something else."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        _require(len(text) <= MAX_BYTES)
        data = replace_surrogates(json.loads(text))
    except (OSError, ValueError, RecursionError):
        raise _wrong() from None
    return from_data(data)


def from_record(record: object) -> Session:
    """The session in a browser's record; its pictures are files that the browser has uploaded.
    UserError if it is something else."""
    files: dict[str, str] = {}

    def load(path: object) -> Picture:
        picture = decoding.load(uploaded(path))
        files[picture.key] = str(path)
        return picture

    try:
        read = from_data(_typed(record, dict).get("data"), load)
    except UserError as error:
        raise _damaged() if error.message_id == _wrong().message_id else error from None
    read.entry, read.files = read_about(_typed(record, dict).get("about")), files
    return read


def read_about(data: object) -> About:
    """An entry of the browser's list; invalid values are left out."""
    given = data if isinstance(data, dict) else {}
    name, title, time = given.get("id"), given.get("title"), given.get("time")
    return About(
        name if isinstance(name, str) and _NAME.fullmatch(name) else "",
        _DIRECTIONS.sub("", title)[:MAX_TITLE] if isinstance(title, str) else "",
        time if isinstance(time, int) and 0 < time <= LAST_TIME else 0,
        given.get("named") is True,
        given.get("pinned") is True,
    )


def from_data(data: object, load: Callable[[object], Picture] | None = None) -> Session:
    """The session that `to_data` wrote. UserError if the data is something else. load: opens a
    picture that the browser keeps; by default, pictures are `data:` URLs."""
    fields = _typed(data, dict)
    _require(fields.get("format") == FORMAT and fields.get("version") == VERSION)
    given = _typed(fields.get("pictures"), dict)
    _require(len(given) <= FILES_AT_ONCE)
    system, model = fields.get("system"), fields.get("model")
    _require(system is None or isinstance(system, str))
    pictures = {key: _checked((load or _of_url)(value)) for key, value in given.items()}
    conversation = Conversation(pictures={p.key: p for p in pictures.values()}, system=system)
    try:
        tail = _read_tail(fields, 0, pictures, "assistant")
    except RecursionError:
        raise _wrong() from None
    conversation.messages = tail.messages
    messages = [*tail.messages, *hidden_messages(tail.forks)]
    _require(0 < len(messages) <= MAX_MESSAGES)
    texts = [p for m in messages for p in m.parts if isinstance(p, str)]
    _require(sum(map(len, texts)) + len(system or "") <= MAX_CHARACTERS)
    return Session(
        conversation,
        remarks=_remarks(fields.get("remarks"), len(tail.messages)),
        keys={picture.key: key for key, picture in pictures.items()} if load else {},
        captions=_captions(fields.get("captions"), pictures),
        entry=read_about(fields.get("about")),
        stop_reason=tail.stop_reason,
        model=model if isinstance(model, str) else "",
        statistics=tail.statistics,
        forks=tail.forks,
    )


def _remarks(data: object, last: int) -> list[Remark]:
    """The page's remarks, before place `last` at most; invalid ones are left out."""
    given = data if isinstance(data, list) else []
    pairs = [pair for pair in given[:MAX_MESSAGES] if isinstance(pair, list) and len(pair) == 2]
    return [
        Remark(before, _DIRECTIONS.sub("", text)[:MAX_REMARK])
        for before, text in pairs
        if isinstance(before, int) and 0 <= before <= last and isinstance(text, str)
    ]


def _captions(data: object, pictures: Mapping[str, Picture]) -> dict[str, str]:
    """Picture's key -> its caption; invalid ones are left out."""
    return {
        pictures[key].key: caption[:MAX_TITLE]
        for key, caption in (data if isinstance(data, dict) else {}).items()
        if key in pictures and isinstance(caption, str)
    }


def _read_tail(data: object, start: int, pictures: dict[str, Picture], before: str) -> Tail:
    """Messages from place `start` on, and their further versions. before: the role of the message
    before them.

    A question without an answer may stand before another one; an answer follows a question.
    """
    fields = _typed(data, dict)
    given = _typed(fields.get("messages"), list)
    _require(len(given) <= MAX_MESSAGES)
    messages = [_message(m, pictures) for m in given]
    roles = [before, *(m.role for m in messages)]
    _require(("assistant", "assistant") not in pairwise(roles))
    forks = {}
    for place, fork in _typed(fields.get("forks") or {}, dict).items():
        _require(place.isdecimal() and len(place) < 5)
        _require(start <= int(place) <= start + len(messages))
        forks[int(place)] = _read_fork(fork, int(place), pictures, roles[int(place) - start])
        _require((forks[int(place)].shown < 0) == (int(place) == start + len(messages)))
    stop = fields.get("stop")
    known = isinstance(stop, str) and stop in STOP_REASONS
    figures = _read_figures(fields.get("figures"))
    return Tail(messages, forks, str(stop) if known else "", figures)


def _read_figures(data: object) -> dict[int, Stats]:
    """The statistics that `_figures` wrote; invalid ones are left out."""
    found = {}
    for place, given in (data if isinstance(data, dict) else {}).items():
        numbers = given if isinstance(given, list) else []
        sound = all(isinstance(n, int | float) and 0 <= n < 1e9 for n in numbers)
        if place.isdecimal() and len(place) < 5 and len(numbers) == len(FIGURES) and sound:
            found[int(place)] = Stats(**dict(zip(FIGURES, numbers, strict=True)))
    return found


def _read_fork(data: object, place: int, pictures: dict[str, Picture], before: str) -> Fork:
    fields = _typed(data, dict)
    shown, given = _typed(fields.get("shown"), int), _typed(fields.get("tails"), list)
    _require(-1 <= shown < len(given) <= MAX_MESSAGES)
    tails: list[Tail | None] = []
    for number, tail in enumerate(given):
        _require((tail is None) == (number == shown))
        tails.append(None if tail is None else _read_tail(tail, place, pictures, before))
        _require(tails[-1] is None or bool(tails[-1].messages))
    return Fork(tails, shown)


def _message(data: object, pictures: dict[str, Picture]) -> Message:
    """Only questions hold pictures."""
    fields = _typed(data, dict)
    role: Literal["user", "assistant"] = "user" if fields.get("role") == "user" else "assistant"
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
    return ImageRef(pictures[key].key)  # the decoded copy has a key of its own


def _of_url(url: object) -> Picture:
    head, _, encoded = _typed(url, str).partition(",")
    _require(head.startswith("data:image/") and head.endswith(";base64"))
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise _wrong() from None
    return decoding.load(content)


def _checked(picture: Picture) -> Picture:
    _require(max(picture.rgb.size) <= FULL_SIDE)  # `to_data` writes no larger ones
    return picture


def _typed(value: object, kind: type) -> Any:
    _require(isinstance(value, kind))
    return value


def _require(condition: bool) -> None:
    """UserError unless the condition holds."""
    if not condition:
        raise _wrong()


def _damaged() -> UserError:
    return UserError(
        "This conversation is damaged and cannot be opened: delete it, and start a new one.",
        message_id="damaged_conversation",
    )


def _wrong() -> UserError:
    return UserError(
        "This file holds no conversation that can be opened: choose one that was downloaded here.",
        message_id="no_conversation",
    )
