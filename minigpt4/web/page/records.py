"""Records of conversations that the visitor's browser keeps; assets/chats.js writes them there."""

import secrets
from dataclasses import asdict
from pathlib import Path

from minigpt4.web.page import render, transcript
from minigpt4.web.page.session import Session


def record(session: Session, model: str) -> dict:
    """The conversation as it is now, but for its pictures, which the browser fetches and keeps."""
    keys = session.keys
    used = transcript.used_pictures(session.conversation, session.forks)
    return {
        "name": session.name,
        "about": asdict(session.entry) if session.entry else None,
        "data": transcript.to_data(session, model, None),
        "pictures": {
            keys.get(key, key): {"path": path, "name": Path(session.files.get(key, "")).name}
            for key in sorted(used)
            if (path := render.thumbnail(key))
        },
    }


def forgotten(name: str) -> dict:
    """What assets/chats.js is told where the server no longer has the conversation it shows."""
    return {"mark": secrets.token_hex(4), "forgotten": name, "records": []}


def told(session: Session, *records: dict, settled: bool = False) -> dict:
    """What assets/chats.js is told: records, and the name of the conversation that the page shows.

    settled: the page has just been made to show it. The mark is new each time, so that nothing that
    is told goes unnoticed.
    """
    return {
        "mark": secrets.token_hex(4),
        "shown": session.latest.name,
        "settled": settled,
        "records": list(records),
    }
