"""What the page's events must keep to before Gradio takes them."""

import json
from typing import Any

from gradio.queueing import Queue
from starlette.exceptions import HTTPException

TOO_DEEP = "The request is nested too deeply."


def guard(queue: Queue) -> None:
    """Check what comes in: halves of characters Gradio could not send back. HTTPException 400 where
    the JSON is too deep."""
    push = queue.push

    async def guarded(body: Any, **others: Any) -> tuple:
        try:
            body.data, body.event_data = whole([body.data, body.event_data])
        except RecursionError:
            raise HTTPException(400, TOO_DEEP) from None
        return await push(body=body, **others)

    queue.push = guarded


def whole(data: Any) -> Any:
    """Plain data with "?" for each half of a character, which JSON can hold and UTF-8 cannot."""
    return json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
