"""Titles of conversations: their subject in a few words."""

import re
from collections.abc import Mapping

from minigpt4.conversation import Conversation
from minigpt4.web.page import looks
from minigpt4.web.page.looks import first_sentence

TITLE_LENGTH = 60
# A question of these words alone fits any picture: a caption makes a better title.
_WORDS = """a about ad advert advertisement an and ask asks briefly can caption could describe
    detail detailed do explain explains for four funny give happening happens here i image in is it
    joke line lines me of one photo photograph picture please poem product recipe see sentence
    sentences short shown shows something story suggest tell that the there these this three title
    to two what what's write you
    aufnahme auf ausführlich beschreibe beschreiben bild bitte das dem dieses diesem ein eine einen
    foto gedicht geschichte ist kurz mir schreib schreibe sie sieht was werbetext zeigt zu
    cuento corta corto describe describir detalle esta este foto hay historia imagen la para poema
    por favor qué se un una ve
    描述这张图片 描述这幅图片 描述一下这张图片 请描述这张图片 详细描述这张图片 这是什么
    图里有什么 写一首诗 讲个故事"""
_ANY_PICTURE = set(_WORDS.split())


def title(conversation: Conversation, captions: Mapping[str, str] | None = None) -> str:
    """The beginning of the conversation's subject; "" if there are only pictures. captions:
    picture's key -> a caption to use if `looks` has none."""
    line = " ".join(_subject(conversation, captions or {}).split())
    return line[:TITLE_LENGTH].rstrip(" ,") + ("…" if len(line) > TITLE_LENGTH else "")


def _subject(conversation: Conversation, captions: Mapping[str, str]) -> str:
    """The first question. If it fits any picture: the first picture's caption, or else the first
    answer. "" if there are only pictures."""
    question = _text(conversation, "user")
    if conversation.pictures and not _words(question) - _ANY_PICTURE:
        key = next(iter(conversation.pictures))
        caption = looks.find(key).caption or captions.get(key, "")
        question = caption or first_sentence(_text(conversation, "assistant")) or question
    return question


def _text(conversation: Conversation, role: str) -> str:
    """The first text by `role`."""
    texts = (p for m in conversation.messages if m.role == role for p in m.parts)
    return next((p for p in texts if isinstance(p, str) and p.strip()), "")


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower()))
