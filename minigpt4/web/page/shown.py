"""A conversation as gr.Chatbot shows it. Whatever was written, nothing of it runs in the page."""

import html
import re
from collections import OrderedDict
from pathlib import Path

from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from minigpt4.model import image
from minigpt4.model.image import Picture
from minigpt4.model.prompt import ImageRef
from minigpt4.web.page import preview
from minigpt4.web.page.session import Session

ASSETS = Path(__file__).parent / "assets"
THUMBNAIL_SIDE = 512
THUMBNAILS_KNOWN = 1000
# Markdown would read these as markup. Written with zeros that nobody else writes, so that
# assets/page.js can turn them back where a message is copied or edited.
_ENTITIES = {"<": "&#0060;", "![": "!&#0091;"}
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)


def literal(text: str) -> str:
    """Markdown that shows tags and picture links as they were written."""
    parts = _CODE.split(text)  # code: every second
    for written, entity in _ENTITIES.items():
        parts[::2] = [p.replace(written, entity) for p in parts[::2]]
    return "".join(parts)


def written(text: str) -> str:
    """What `literal` was made from."""
    for mark, entity in _ENTITIES.items():
        text = text.replace(entity, mark)
    return text


def show(session: Session) -> tuple[list[dict], list[int]]:
    """The messages as gr.Chatbot has them, and for each the place in the conversation (-1: none).

    A picture is a message of its own: gr.Chatbot can edit only messages that hold nothing but text.
    """
    shown, places = [], []

    def add(place: int, role: str, content: str | dict) -> None:
        shown.append({"role": role, "content": content})
        places.append(place)

    def remarks(place: int) -> None:
        for remark in session.remarks:
            if remark.before == place:
                add(-1, "assistant", f"<small>{literal(html.escape(remark.text))}</small>")

    messages = session.conversation.messages
    for place, message in enumerate(messages):
        remarks(place)
        for part in message.parts:
            if isinstance(part, ImageRef):
                add(place, "user", thumbnail(session.conversation.pictures[part.key]))
            elif message.role == "user":
                add(place, "user", literal(part))
            elif part:
                add(place, "assistant", literal(preview.fenced(part)))
    remarks(len(messages))
    return shown, places


_thumbnails: OrderedDict[str, str] = OrderedDict()  # picture's key -> its file


def thumbnail(picture: Picture) -> dict | str:
    """A small copy of the picture in a file that the page may show; without a disk, words."""
    path = _thumbnails.get(picture.key, "")
    if not path or not Path(path).exists():  # old ones are deleted
        try:
            large = max(picture.rgb.size) > THUMBNAIL_SIDE
            small = image.fitted(picture.rgb, THUMBNAIL_SIDE) if large else picture.rgb
            path = save_pil_to_cache(small, get_upload_folder(), "picture")
        except OSError:
            return "(picture)"
        _thumbnails[picture.key] = path
        while len(_thumbnails) > THUMBNAILS_KNOWN:
            _thumbnails.popitem(last=False)
    return {"path": path, "alt_text": "Your picture"}
