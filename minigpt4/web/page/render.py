"""A conversation as gr.Chatbot shows it, escaped so that nothing in the texts runs in the page."""

import html
import json
import re
import secrets
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from gradio.components.chatbot import FileMessage, TextMessage
from gradio.components.chatbot import Message as ChatbotMessage
from gradio.data_classes import FileData
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from gradio_client.utils import encode_file_path, get_mimetype

from minigpt4.conversation import Conversation
from minigpt4.model import image
from minigpt4.model.image import Detection, Picture
from minigpt4.model.prompt import Message
from minigpt4.web.guard.gradio_patches import Prepared
from minigpt4.web.page import looks
from minigpt4.web.page.parts import asset
from minigpt4.web.page.session import Remark, Session
from minigpt4.web.page.texts import translate

THUMBNAIL_SIDE = 1024  # pixels
FILE_URL = "/gradio_api/file="
# Characters that Markdown would read as markup are written as entities with leading zeros, which
# nobody else uses: assets/page.js turns them back when a message is copied or edited.
_ENTITY = re.compile(r"&#00(\d{2,3});")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]|^\s|(?<=[ \t])[ \t]|\d(?=[.)])", re.MULTILINE)
# Code is shown as it is: a fence, a span of backticks in one paragraph, or lines that are indented.
_CODE = re.compile(
    r"(?P<fence>`{3,}).*?(?:(?P=fence)|\Z)|^[ \t]*~~~.*?(?:^[ \t]*~~~|\Z)|"
    r"(?<![\\`])(?P<ticks>``?)(?!`)(?:[^\n]|\n(?![ \t]*(?:\n|[-*+>#|]|\d+[.)])))*?"
    r"(?<!`)(?P=ticks)(?!`)|"
    r"(?:\A|(?<=\n\n))(?P<indented>(?:(?: {4}|\t)[^\n]*(?:\n|\Z))+\n*)",
    re.DOTALL | re.MULTILINE,
)
_IN_LIST = re.compile(r"\s|(?:[-*+]|\d+[.)])\s")  # after such a line, indented lines are no code
_TAG = re.compile(r"<(?!https?://[^\s<>]+>)")  # <https://…> is a link
# $x^2$, but no amounts of money: no space inside the dollars, no digit after them (Pandoc's rule).
_FORMULA = re.compile(r"(?<![\\$\w])\$(?![\s$])([^$\n]{1,500})(?<![\s\\])\$(?![\w$])")
_MARKED_FORMULA = re.compile(r"\\\(\{\}(.*?)\\\)")
# How gr.Chatbot finds formulas. Not by single dollars: amounts of money would be taken for some.
FORMULAS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


def literal(text: str) -> str:
    """Markdown that renders formulas, but shows tags and picture links as they were written.

    The {} in a formula tells assets/page.js that it was written with dollars.
    """
    shown, done, at = "", 0, 0
    while found := _CODE.search(text, at):
        at = found.end()
        if found["indented"] and found.start() > done:  # not the next paragraph of code
            before = text[: found.start()].rstrip()
            if _IN_LIST.match(before, before.rfind("\n") + 1):
                at = found.start() + 1
                continue
        shown += _plain(text[done : found.start()]) + found[0]
        done = at
    return shown + _plain(text[done:])


def _plain(text: str) -> str:
    """`literal` for a part of a message that has no code."""
    text = _TAG.sub(_entity("<"), text).replace("![", "!" + _entity("["))
    return _FORMULA.sub(lambda f: f"\\({{}}{f[1]}\\)" if _balanced(f[1]) else f[0], text)


def _balanced(formula: str) -> bool:
    depth = 0
    for character in re.sub(r"\\.", "", formula):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def verbatim(text: str) -> str:
    """Markdown that shows all of the text as it was typed."""
    return _PUNCTUATION.sub(lambda found: _entity(found[0]), text)


def unescape(text: str) -> str:
    """The inverse of `literal` and `verbatim`."""
    text = _MARKED_FORMULA.sub(r"$\1$", text)
    return _ENTITY.sub(lambda found: chr(int(found[1])), text)


def _entity(character: str) -> str:
    return f"&#00{ord(character)};"


# --- messages -------------------------------------------------------------------------------------


def show(session: Session) -> tuple[Prepared, list[int]]:
    """The messages for gr.Chatbot, and each one's place in the conversation (-1: a remark).

    Only messages that have changed since the last call are rendered. A picture is a message of its
    own: gr.Chatbot can edit only messages that hold nothing but text.
    """
    shown, places = Prepared(), []
    messages = session.conversation.messages
    remarks: dict[int, list[Remark]] = {}
    for remark in session.remarks:
        remarks.setdefault(remark.before, []).append(remark)
    for place in range(len(messages) + 1):
        for remark in remarks.get(place, ()):
            shown.append(_remark(remark.text))
            places.append(-1)
        if place < len(messages):
            rendered = _rendered(session, place)
            shown += rendered
            places += [place] * len(rendered)
    return shown, places


def messages(session: Session, request: gr.Request | None, done: bool = True) -> Prepared:
    """The conversation for gr.Chatbot; `done`: with the buttons that the last answer allows."""
    shown, places = show(session)
    last = len(session.conversation.messages) - 1
    explained = any(remark.before > last for remark in session.remarks)
    if done and session.unanswered and not (session.busy or explained):
        shown.append(_remark(translate("not_answered", request)))
        shown[-1]["options"] = [{"value": "continue", "label": translate("answer_now", request)}]
    elif done and shown and places[-1] == last and session.last_answer:
        options = []
        if session.can_continue:
            options.append({"value": "continue", "label": translate("continue", request)})
        if website(session.last_answer):
            options.append({"value": "preview", "label": translate("preview", request)})
        shown[-1] = {**shown[-1], "options": options}
    return shown


def objects(session: Session) -> list[tuple[Detection, ...]]:
    """The objects found in each picture that is shown, for assets/where.js."""
    seen = (looks.find(i.key) for m in session.conversation.messages for i in m.images)
    return [look.objects or () for look in seen if look.thumbnail]


def _rendered(session: Session, place: int) -> list[dict]:
    message = session.conversation.messages[place]
    known, rendered = session.rendered.get(place, (None, []))
    if known is not message:
        texts = [_text(message.role, p) for p in message.parts if p and isinstance(p, str)]
        rendered = [*_pictures(message, session), *texts]
        if all(looks.find(reference.key).thumbnail for reference in message.images):
            session.rendered[place] = message, rendered
    return rendered


def _text(role: str, text: str) -> dict:
    shown = literal(fenced(text)) if role == "assistant" else verbatim(text)
    return _message(role, [TextMessage(text=shown)])


def _remark(text: str) -> dict:
    line = f"<small>{literal(html.escape(text))}</small>"
    return _message("assistant", [TextMessage(text=line)])


def _message(role: str, content: list) -> dict:
    return ChatbotMessage(role=role, content=content).model_dump()


def _pictures(message: Message, session: Session) -> list[dict]:
    """A message for each picture. After the "#" in its address are the facts from which
    assets/pictures.js writes its name in the visitor's language: its number, their count, its
    file's name, its caption, the path of its upload."""
    shown = []
    for number, reference in enumerate(message.images, 1):
        seen = looks.find(reference.key)
        path = seen.thumbnail
        if not path:  # there was no room on the disk
            shown.append(_message("user", [TextMessage(text="(picture)")]))
            continue
        whole = session.files.get(reference.key, "")
        caption = seen.caption or session.captions.get(reference.key, "")
        told = [number, len(message.images), Path(whole).name, caption, encode_file_path(whole)]
        url = f"{FILE_URL}{encode_file_path(path)}#{quote(json.dumps(told), safe='')}"
        file = FileData(path=path, url=url, mime_type=get_mimetype(path))
        shown.append(_message("user", [FileMessage(file=file)]))
    return shown


# --- thumbnails -----------------------------------------------------------------------------------


thumbnail_files: set[str] = set()  # all that were written; the server deletes them at its end


def make_thumbnail(picture: Picture) -> None:
    """Write the thumbnail unless it exists (old ones are deleted). Takes tens of milliseconds."""
    path = looks.find(picture.key).thumbnail
    if path and Path(path).exists():
        return
    large = max(picture.rgb.size) > THUMBNAIL_SIDE
    small = image.fitted(picture.rgb, THUMBNAIL_SIDE) if large else picture.rgb
    try:
        path = save_bytes_to_cache(image.jpeg(small), "picture.jpg", get_upload_folder())
        thumbnail_files.add(path)
    except OSError:  # shown without its picture
        path = ""
    looks.note(picture.key, thumbnail=path)


def make_thumbnails(conversation: Conversation) -> None:
    """Write the small pictures that `show` refers to. Not for the event loop: it may take long."""
    for message in conversation.messages:
        for reference in message.images:
            make_thumbnail(conversation.pictures[reference.key])


# --- the website in an answer ---------------------------------------------------------------------

# A whole document, or the beginning of one, in an answer without a code fence.
_DOCUMENT = re.compile(
    r"<!doctype\s+html\b.*?(?:</html\s*>|\Z)|<html\b.*?(?:</html\s*>|\Z)|"
    r"<(?:head|body)\b.*?(?:</body\s*>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
# Possessive and atomic parts (*+, ?>) do not backtrack, so that the search takes linear time.
_FENCE = re.compile(r"```[ \t]*+([\w+-]*+)[^\n]*+(?:\n(.*?)(?:```|\Z)|\Z)", re.DOTALL)
_MARKUP = re.compile(
    r"\s*+(?><!--.*?-->\s*+)*+<(?:!doctype\s+html|html|head|body|div|main|section|header|h1|h2|form|p|"
    r"button|style|table|ul|nav|title|a|img|input|script)\b",
    re.IGNORECASE | re.DOTALL,
)
# The frame's own policy. It comes first in the document, before anything the model wrote, and adds
# to the page's policy, which keeps the frame from navigating elsewhere.
FRAME_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; media-src data: blob:; form-action 'none'; "
    "base-uri 'none'"
)
# Removes WebRTC, which no policy covers.
_FIRST_SCRIPT = asset("frame.js")
# The attribute that makes a shadow root from markup.
_SHADOW = re.compile("shadowrootmode", re.IGNORECASE)


def website(answer: str) -> str:
    """The HTML in an answer, "" if there is none. CSS and scripts that the model wrote in further
    code blocks are put inside."""
    document, styles, scripts = "", [], []
    for language, code in _FENCE.findall(answer):
        language = language.lower()
        if language == "css":
            styles.append(f"<style>\n{code}</style>\n")
        elif language in ("js", "javascript"):
            scripts.append(f"<script>\n{code}</script>\n")
        elif language in ("html", "htm", "xhtml", "") and _MARKUP.match(code):
            document = document or code
    if not document:
        found = _DOCUMENT.search(_FENCE.sub("", answer))
        document = found[0] if found else ""
    return document and document.strip() + "\n" + "".join(styles + scripts)


def websites(session: Session) -> list[str]:
    """The HTML of each answer that holds some, in order."""
    count = len(session.conversation.messages)
    found = (website(session.answer_at(place)) for place in range(count))
    return [site for site in found if site]


def fenced(answer: str) -> str:
    """The answer with a bare HTML document in it set as a code block."""
    if "```" in answer:
        return answer
    return _DOCUMENT.sub(lambda found: f"\n```html\n{found[0]}\n```\n", answer, count=1)


def frame(document: str, title: str) -> str:
    """The element that shows the document: sandboxed, of another origin, without any network."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{FRAME_POLICY}">'
    whole = (
        f'<!doctype html><meta charset="utf-8">{policy}'
        '<meta http-equiv="x-dns-prefetch-control" content="off">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<script>\n{_FIRST_SCRIPT}</script>\n{_SHADOW.sub('data-shadow', document)}"
    )
    return (
        # A new mark makes the page load the same website again when it is shown again.
        f'<iframe class="website" data-shown="{secrets.token_hex(4)}" '
        f'sandbox="allow-scripts" referrerpolicy="no-referrer" '
        f'title="{html.escape(title)}" srcdoc="{html.escape(whole)}"></iframe>'
    )
