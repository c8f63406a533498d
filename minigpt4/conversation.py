"""A conversation, and its answers: the prompt, trimmed to the context; streamed text. No torch."""

import asyncio
import bisect
import functools
import hashlib
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minigpt4.errors import UserError
from minigpt4.model.image import Picture
from minigpt4.model.prompt import (
    ImageRef,
    Message,
    Prompt,
    Template,
    encode_chat,
    stop_ids,
    stop_sequences,
    stop_strings,
)
from minigpt4.model.text import TextStream

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine, Sampling, Stats, Stream
    from minigpt4.engine.sampling import Constraint


MAX_CHARACTERS = 200_000  # of a question; no context has room for more


@dataclass
class Conversation:
    """Messages, and their pictures by key. Plain data: copy it, store it, change it."""

    messages: list[Message] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)
    system: str | None = None  # None: the template's own
    template: Template | None = None  # None: the model's own

    @classmethod
    def asking(cls, text: str, pictures: Sequence[Picture] = ()) -> "Conversation":
        """A conversation that begins with this question."""
        conversation = cls()
        conversation.add_question(text, pictures)
        return conversation

    def add_question(self, text: str, pictures: Sequence[Picture] = ()) -> None:
        """Append a user's message: its pictures, then its text."""
        text = text.strip()
        if not text and not pictures:
            raise UserError("The message is empty: write a question.", message_id="empty_message")
        for picture in pictures:
            self.pictures[picture.key] = picture
        parts = tuple(ImageRef(p.key) for p in pictures) + ((text,) if text else ())
        self.messages.append(Message("user", parts))

    def add_answer(self, text: str) -> None:
        """Append the assistant's message, without spaces around it, as in the published code."""
        self.messages.append(Message("assistant", (text.strip(),)))

    @property
    def session(self) -> str:
        """An id that stays the same: the first picture's key, or a hash of the first message."""
        if self.pictures:
            return next(iter(self.pictures))
        first = self.messages[0].parts if self.messages else ()
        return hashlib.sha256(repr(first).encode("utf-8", "replace")).hexdigest()


class Answer:
    """The answer to a conversation's last question: pieces of text, for `for` and `async for`.

    text: all text so far; tokens: the ids that it comes from. dropped_turns: how many old questions
    and answers are left out of the prompt because they do not fit; `notice` says so in words. stats
    and stop_reason ("stop", "length", "time" or "closed") are known at the end. A request that
    fails raises UserError.
    """

    def __init__(
        self,
        stream: "Stream",
        text_stream: TextStream,
        stop_ids: frozenset[int],
        dropped_turns: int = 0,
        keeps_spaces: bool = False,
    ) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.dropped_turns = dropped_turns
        self._stream, self._text_stream, self._stop_ids = stream, text_stream, stop_ids
        self._keeps_spaces = keeps_spaces  # at its beginning
        self._stopped = False  # at a stop string, which the engine does not know
        # An answer to which nothing refers any more must not be generated to its end.
        weakref.finalize(self, stream.close).atexit = False

    def __iter__(self) -> Iterator[str]:
        try:
            for token in self._stream:
                if piece := self._read(token):
                    yield piece
            if piece := self._rest():
                yield piece
        finally:
            self._stream.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for token in self._stream:
                if piece := self._read(token):
                    yield piece
            if piece := self._rest():
                yield piece
        finally:
            self._stream.close()

    def _read(self, token: int) -> str:
        if token in self._stop_ids:
            return ""
        self.tokens.append(token)
        piece = self._shown(self._text_stream.push(token))
        if self._text_stream.ended and not self._stopped:
            self._stopped = True
            self._stream.close()
        return piece

    def _rest(self) -> str:
        return "" if self._stopped else self._shown(self._text_stream.finish())

    def _shown(self, piece: str) -> str:
        """Add to `text`, without spaces at the beginning unless they matter. Returns the
        addition."""
        if not self.text and not self._keeps_spaces:
            piece = piece.lstrip()
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop before the next token. Thread-safe."""
        self._stream.close()

    @property
    def stop_reason(self) -> str:
        return "stop" if self._stopped else self._stream.stop_reason

    @property
    def logprobs(self) -> list[float]:
        """The log-probability of each of `tokens`, if requested."""
        return self._stream.logprobs[: len(self.tokens)]

    @property
    def top_logprobs(self) -> list[list[tuple[int, float]]]:
        """(id, log-probability) of the most likely tokens in the place of each of `tokens`, if
        requested."""
        return self._stream.top_logprobs[: len(self.tokens)]

    @property
    def watched(self) -> list[float]:
        """The log-probabilities of the `watched` token ids as the answer's first token."""
        return self._stream.watched

    @property
    def stats(self) -> "Stats":
        return self._stream.stats

    @property
    def position(self) -> int:
        """Place in the queue: 1 is next, 0 is running or ended."""
        return self._stream.position

    @property
    def notice(self) -> str:
        if not self.dropped_turns:
            return ""
        turns = "turn was" if self.dropped_turns == 1 else f"{self.dropped_turns} turns were"
        return f"The oldest {turns} left out: the conversation no longer fits the model's context."


async def texts_of(
    answers: Sequence[Answer], seconds: float
) -> AsyncGenerator[tuple[int | None, str | None], None]:
    """(number of an answer, its next text, or None at its end) as they come.

    Yields (None, None) whenever nothing came for `seconds`.
    """
    iterators = [aiter(answer) for answer in answers]
    upcoming = {i: asyncio.ensure_future(anext(it, None)) for i, it in enumerate(iterators)}
    try:
        while upcoming:
            done, _ = await asyncio.wait(
                upcoming.values(), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield None, None
            for number in [n for n, task in upcoming.items() if task in done]:
                text = upcoming.pop(number).result()
                yield number, text
                if text is not None:
                    upcoming[number] = asyncio.ensure_future(anext(iterators[number], None))
    finally:  # also if the client has gone
        for task in upcoming.values():
            task.cancel()


def read_ahead(
    engine: "AnyEngine", conversation: Conversation, pictures: Sequence[Picture]
) -> None:
    """While the next question, with these pictures, is being typed, compute the prompt before its
    text, if that takes seconds. The question's prompt then finds that in the key-value cache.

    UserError if the engine refuses.
    """
    from minigpt4.engine import Sampling

    model = engine.model
    if model.config.small or model.quantize != "int4" or engine.running or engine.waiting:
        return
    ahead = replace(
        conversation, messages=[*conversation.messages], pictures={**conversation.pictures}
    )
    ahead.add_question("", pictures)
    for _ in ask(engine, ahead, Sampling(temperature=0, max_new_tokens=1)):
        pass


def ask(
    engine: "AnyEngine",
    conversation: Conversation,
    sampling: "Sampling",
    stop: Sequence[str] = (),
    trim: bool = True,
    logprobs: bool = False,
    top_logprobs: int = 0,
    watched: Sequence[int] = (),
    reserve: int | None = None,
    constraint: "Constraint | None" = None,
) -> Answer:
    """Answer the conversation's last question. The caller adds the answer, or the part that was
    read, to the conversation. If the last message is the assistant's, its text is continued.

    stop: strings that end the answer, besides the template's; trim: leave out old turns if the
    conversation is too long, instead of refusing it; logprobs: report each token's log-probability;
    top_logprobs: with it, those of so many of the most likely tokens; watched: token ids whose
    log-probability as the first token is reported; reserve: see `fit`; constraint: of this answer.
    """
    from minigpt4.engine import Request

    config, tokenizer = engine.model.config, engine.model.tokenizer
    template = conversation.template or config.template
    conversation, spaced = _without_last_spaces(_with_words(conversation, engine))
    try:
        prompt, dropped_turns = fit(conversation, engine, sampling.max_new_tokens, trim, reserve)
    except UserError as error:  # the engine counts only the requests that it refuses itself
        engine.totals.add_error(error.kind)
        raise
    longest = max(1, config.context - len(prompt))
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, longest))
    ends = stop_ids(template, tokenizer)
    # An answer that is continued may start in the middle of a word or with a space, and so may one
    # with a constraint. Decoding from the token before it shows this.
    continues = conversation.messages[-1].role == "assistant"
    before = prompt.ids[-1:] if continues or constraint is not None else []
    skipped = len(tokenizer.decode(before, skip_special_tokens=True)) if before else 0

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(before + ids, skip_special_tokens=True)[skipped:]

    text_stream = TextStream(decode, (*stop_strings(template), *stop))
    stream = engine.submit(
        Request(
            prompt,
            conversation.pictures,
            sampling,
            stop_ids=ends,
            stop_sequences=stop_sequences(template, tokenizer),
            penalized=penalized(prompt, template),
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            constraint=constraint,
            watched=tuple(watched),
            session=conversation.session,
        )
    )
    keeps_spaces = constraint is not None or (continues and not spaced)
    return Answer(stream, text_stream, ends, dropped_turns, keeps_spaces)


def _without_last_spaces(conversation: Conversation) -> tuple[Conversation, bool]:
    """(the conversation without spaces at the end of its unfinished answer, were there any?).

    Tokens of words begin with the space: after a token of spaces, none would fit.
    """
    *before, last = conversation.messages
    text = last.parts[-1] if last.parts else ""
    if last.role != "assistant" or not isinstance(text, str) or text == text.rstrip():
        return conversation, False
    shortened = replace(last, parts=(*last.parts[:-1], text.rstrip()))
    return replace(conversation, messages=[*before, shortened]), True


def _with_words(conversation: Conversation, engine: "AnyEngine") -> Conversation:
    """The conversation with the words that a word head lists for each picture, which is encoded if
    it is not yet."""
    if engine.model.config.words is None:
        return conversation
    words = {}
    for key, picture in conversation.pictures.items():
        encoded = engine.encode(picture)
        words[key] = encoded.words if encoded else ""

    def listed(part: str | ImageRef) -> str | ImageRef:
        return ImageRef(part.key, words[part.key]) if isinstance(part, ImageRef) else part

    messages = [replace(m, parts=tuple(map(listed, m.parts))) for m in conversation.messages]
    return replace(conversation, messages=messages)


def penalized(prompt: Prompt, template: Template) -> tuple[int, ...]:
    """The tokens that the repetition penalty covers from the start: the published `generate` put a
    beginning-of-sequence token before the answer, so that token was penalised, too."""
    return tuple(prompt.ids[:1]) if template.bos else ()


def fit(
    conversation: Conversation,
    engine: "AnyEngine",
    max_new_tokens: int,
    trim: bool = True,
    reserve: int | None = None,
) -> tuple[Prompt, int]:
    """(the prompt that leaves room for the answer, the number of old turns it leaves out).

    The oldest question and its answer are left out first. The system text and every picture stay:
    pictures of a dropped turn move to the next question. reserve: the number of tokens for which
    turns are left out, at most max_new_tokens; a long last question may leave fewer. None: turns
    are left out, or the question refused, to keep all of max_new_tokens. UserError if the last
    question alone is too long.
    """
    config = engine.model.config
    needed = max_new_tokens if reserve is None else 1
    kept = max_new_tokens if reserve is None else min(reserve, max_new_tokens)
    room = config.context - kept
    asked = [i for i, m in enumerate(conversation.messages) if m.role == "user"]
    most = len(asked) - 1 if trim else 0
    what = "question" if trim else "conversation"
    system = len(conversation.system or "")

    def characters(turns: int) -> int:
        """The characters of the messages without the `turns` oldest questions and their answers."""
        left = conversation.messages[asked[turns] if trim else 0 :]
        return sum(len(part) for m in left for part in m.parts if isinstance(part, str))

    # Tokens are counted only for texts that may fit: counting a megabyte takes a second.
    least = bisect.bisect_left(range(most), system - MAX_CHARACTERS, key=lambda n: -characters(n))
    if system + characters(least) > MAX_CHARACTERS:
        have = f"{what} and the system prompt have" if system else f"{what} has"
        raise UserError(f"The {have} more than {MAX_CHARACTERS} characters.", "too_long")

    @functools.cache
    def without(turns: int) -> Prompt:
        return encode_chat(
            _without_oldest(conversation.messages, turns),
            conversation.template or config.template,
            engine.model.tokenizer,
            config.image_tokens,
            conversation.system,
        )

    # Bisection, since each dropped turn shortens the prompt: ten lengths for a thousand turns.
    dropped = bisect.bisect_left(range(most), -room, least, key=lambda n: -len(without(n)))
    prompt = without(dropped)
    if len(prompt) <= config.context - needed:
        return prompt, dropped
    beside = "with its pictures " if prompt.images else ""
    if system > characters(dropped):
        what, beside = "system prompt", f"with the {what} "
    fitting = max(0, config.context - needed)
    allowed = f"at most {fitting} fit; shorten it."
    if needed > 1:
        allowed = f"{fitting} fit beside an answer of {needed}; shorten it or the answer."
    sentence = f"The {what} is too long: {beside}it takes {len(prompt)} tokens, and {allowed}"
    raise UserError(sentence, "too_long")


def _without_oldest(messages: list[Message], turns: int) -> list[Message]:
    """`messages` without the first `turns` questions and their answers."""
    if not turns:
        return messages
    next_place = [i for i, m in enumerate(messages) if m.role == "user"][turns]
    images = tuple(image for m in messages[:next_place] for image in m.images)
    next_question = messages[next_place]
    return [replace(next_question, parts=images + next_question.parts), *messages[next_place + 1 :]]
