"""What a conversation is about, in a few words: for its title, and a picture's alternative text."""

import re

from minigpt4.conversation import Conversation
from minigpt4.web.page import looks

LONG = 60  # characters
# A question of these words alone fits any picture: what is in the picture says more.
_WORDS = """a an and about briefly can could describe detail detailed do explain for here i image in
    is it me of photo photograph picture please see shown shows tell that the there these this to
    what what's write you"""
_ANY_PICTURE = set(_WORDS.split())
_OPENING = re.compile(
    r"(?:(?:the|this) (?:image|picture|photo|photograph) "
    r"(?:shows|depicts|features|displays|captures|is (?:of|about))|(?:in (?:the|this) "
    r"(?:image|picture|photo|photograph),? )?(?:there (?:is|are)|(?:i|we|you) (?:can )?see))\s+",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]|\n")


def subject(conversation: Conversation) -> str:
    """The first question; where it fits any picture, the first picture's caption, or the beginning
    of the answer. "" where there are only pictures."""
    question = _text(conversation, "user")
    if conversation.pictures and not _words(question) - _ANY_PICTURE:
        caption = looks.find(next(iter(conversation.pictures))).caption
        question = caption or first_sentence(_text(conversation, "assistant")) or question
    return question


def first_sentence(text: str) -> str:
    """Without “This image shows”; "…" at the end where it is cut off."""
    text = text.strip()
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    if not end and len(text) > LONG:
        sentence = text.rpartition(" ")[0] + "…"
    sentence = _OPENING.sub("", sentence, count=1).strip(' *#-"“')
    return sentence[:1].upper() + sentence[1:]


def _text(conversation: Conversation, role: str) -> str:
    """The first text by `role`."""
    texts = (p for m in conversation.messages if m.role == role for p in m.parts)
    return next((p for p in texts if isinstance(p, str) and p.strip()), "")


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower()))
