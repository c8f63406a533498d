"""What the page's events must keep to before Gradio takes them."""

import json
from typing import Any

from gradio.queueing import Queue
from starlette.exceptions import HTTPException

MOST_UNREAD = 32  # events of one page whose end it has not been told yet
TOO_MANY = "This page has asked for too much without listening: load it again."
TOO_DEEP = "The request is nested too deeply."


def guard(queue: Queue) -> None:
    """Check what comes in. Gradio keeps what it has to say until somebody listens, without end;
    and it could not say halves of characters. HTTPException 429, or 400 where JSON is too deep.
    """
    push = queue.push

    async def guarded(body: Any, **others: Any) -> tuple:
        if len(queue.pending_event_ids_session.get(body.session_hash, ())) >= MOST_UNREAD:
            raise HTTPException(429, TOO_MANY)
        try:
            body.data, body.event_data = whole([body.data, body.event_data])
        except RecursionError:
            raise HTTPException(400, TOO_DEEP) from None
        return await push(body=body, **others)

    queue.push = guarded


def whole(data: Any) -> Any:
    """Plain data with "?" for each half of a character, which JSON can hold and UTF-8 cannot."""
    return json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
