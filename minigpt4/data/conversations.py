"""Records of conversations about a picture: LLaVA's, ShareGPT's, ms-swift's, LLaMA-Factory's."""

import re
from collections.abc import Iterator, Sequence

from minigpt4.data import captions
from minigpt4.data.captions import NotUsable
from minigpt4.data.examples import Text

_TURNS = ("conversations", "messages", "conversation")
_USER = {"user", "human"}
_ASSISTANT = {"assistant", "gpt", "model"}
_SYSTEM = {"system", "developer"}
_TOOLS = {
    "tool",
    "tools",
    "tool_call",
    "tool_response",
    "function",
    "function_call",
    "function_response",
    "observation",
    "ipython",
}
_NAMED = re.compile(r"(?i)<img>[^<]+</img>")  # Qwen-VL's way to name a picture
# Marks that stand for a picture. “<img>” is also HTML: it is a mark only at the ends of lines.
_MARK = re.compile(
    r"\s*(<\|vision_start\|>\s*<\|?image(?:_pad)?\|?>\s*<\|vision_end\|>|\[IMG\]"
    r"|<\|?(?:image(?:[ _-]?\d+)?|ImageHere|image_(?:placeholder|pad|soft_token))\|?>"
    r"|<start_of_image>"
    r"|^[^\S\n]*<img>|<img>(?=\s*$))\s*",
    re.MULTILINE,
)
# Marks of other media, with the same rule; and of boxes, as ms-swift, Qwen and InternVL write them.
_MEDIA = re.compile(
    r"(?im)<\|(?:video|audio)(?:_pad|_\d+)?\|>|^\s*<(?:video|audio)>|<(?:video|audio)>\s*$"
)
_BOX = re.compile(r"<ref-object>|<bbox>|<\|(?:box|quad|object_ref)_start\|>|<box>[\s\[(]*\d")
SYSTEM = ("system", "system_prompt")  # fields of a record
_UNLEARNED = ("loss", "weight", "train", "training")  # of a message, false or 0


def turns_of(row: dict) -> list | None:
    """The turns of a record that is a conversation. row: with names in lower case."""
    return next((row[name] for name in _TURNS if isinstance(row.get(name), list)), None)


def check_record(row: dict) -> None:
    """NotUsable if a record's answer is bad or one of two, or if it is not only about pictures.

    row: with names in lower case.
    """
    if any(str(row.get(name)).strip().lower() == "false" for name in ("label", "kto_tag")):
        raise NotUsable(captions.BAD)
    if str(row.get("is_rejected")).strip().lower() in ("true", "1"):
        raise NotUsable(captions.REJECTED)
    if (row.get("chosen") and row.get("rejected")) or any(
        row.get(name) for name in ("rejected_response", "rejected_messages")
    ):
        raise NotUsable(captions.PREFERENCES)
    if row.get("videos") or row.get("audios"):
        raise NotUsable(captions.VIDEO)


def texts_of(row: dict, turns: list) -> tuple[Text, ...]:
    """Each answer of a conversation, with the turns before it. Answers that are marked as not to be
    learned, and a greeting before the first question, are only such turns. NotUsable if no answer
    is left."""
    found = [*_exchanges(turns)]
    exchanges = without_marks(with_system(row, [(q, a) for q, a, _ in found]))
    texts = tuple(
        Text(answer, (question,) if question else (), exchanges[:number])
        for number, (question, answer) in enumerate(exchanges)
        if found[number][2] and (found[number][0] or len(found) == 1)
    )
    if not texts:
        raise NotUsable(captions.NOT_LEARNED if found else captions.NO_CAPTION)
    return texts


def with_system(row: dict, exchanges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The exchanges, with the record's system text in the first question, as for messages."""
    said, _ = captions.choose_captions((row.get(name) for name in SYSTEM), cells=False)
    return [(_joined([*said * (not n), q]), a) for n, (q, a) in enumerate(exchanges)]


def history_of(row: dict) -> tuple[tuple[str, str], ...]:
    """The earlier turns in a record's "history" (pairs of question and answer, or messages), still
    with the marks of pictures.

    NotUsable if it has anything else.
    """
    found = row.get("history")
    if not found or found != found:
        return ()
    if not isinstance(found, list | tuple):
        raise NotUsable(captions.NO_HISTORY)
    if all(isinstance(message, dict) for message in found):
        return tuple((question, answer) for question, answer, _ in _exchanges(found))
    pairs = [pair for pair in found if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(pairs) < len(found) or not all(isinstance(text, str) for p in pairs for text in p):
        raise NotUsable(captions.NO_HISTORY)
    return tuple((_checked(q), a.strip()) for q, a in pairs)


def pictures_in(row: dict) -> list[object]:
    """The pictures that the parts of a conversation's messages name."""
    contents = [t.get("content") for t in turns_of(row) or () if isinstance(t, dict)]
    parts = [p for content in contents if isinstance(content, list) for p in content]
    named = [p.get("image") or p.get("image_url") for p in parts if isinstance(p, dict)]
    urls = [p.get("url") if isinstance(p, dict) else p for p in named if p]
    return [url for url in urls if url]


def without_marks(exchanges: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs; the questions without the mark of the picture, which always comes
    first here. NotUsable if they have marks of several pictures, of other media or of boxes.
    """
    marks = [[mark.strip() for mark in _MARK.findall(question)] for question, _ in exchanges]
    numbered = {mark for found in marks for mark in found if re.search(r"\d", mark)}
    # A numbered mark may be repeated, one without a number may occur once in each question.
    others = max((sum(m not in numbered for m in found) for found in marks), default=0)
    if len(numbered) + others > 1:
        raise NotUsable(captions.MARKS)
    found = tuple((_MARK.sub("\n", question).strip(), answer) for question, answer in exchanges)
    if any(_MEDIA.search(question) for question, _ in found):
        raise NotUsable(captions.VIDEO)
    if any(_BOX.search(text) for exchange in found for text in exchange):
        raise NotUsable(captions.BOXES)
    return found


def _checked(question: str) -> str:
    """A question. NotUsable if it names the picture itself."""
    if _NAMED.search(question):
        raise NotUsable(captions.IN_TEXT)
    return question


def _exchanges(turns: Sequence) -> Iterator[tuple[str, str, bool]]:
    """(question, answer, whether to learn it) of a conversation. Messages in a row by the same
    person are joined; a system message is part of the first question. A question without an
    answer has no pair."""
    question: list[str] = []
    answer: list[str] = []
    learned = True
    for turn in turns:
        role, text = _message(turn)
        if role in _ASSISTANT:
            answer.append(text)
            learned &= not any(turn.get(name) == 0 for name in _UNLEARNED)
            continue
        if any(answer):
            yield _joined(question), _joined(answer), learned
        if answer:
            question, answer, learned = [], [], True
        question.append(text)
    if any(answer):
        yield _joined(question), _joined(answer), learned


def _joined(texts: list[str]) -> str:
    return "\n".join(filter(None, texts))


def _message(turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise NotUsable(captions.NOT_TEXT)
    role = str(turn.get("role", turn.get("from"))).lower()
    if role not in _USER | _ASSISTANT | _SYSTEM:
        raise NotUsable(captions.TOOLS if role in _TOOLS else captions.UNKNOWN_ROLE)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        kinds = [str(part.get("type")) for part in content if isinstance(part, dict)]
        if any(re.search("video|audio", kind) for kind in kinds):
            raise NotUsable(captions.VIDEO)
        content = [part.get("text") if isinstance(part, dict) else part for part in content]
    try:
        found = captions.captions_in(content, cells=False)  # "None" is an answer
    except ValueError:
        raise NotUsable(captions.NOT_TEXT) from None
    text = "\n".join(found)
    return role, text if role in _ASSISTANT else _checked(text)
