"""POST /v1/decisions: questions about one input, answered with probabilities.

Each question ends a conversation that begins with the input, so that the engine computes the input
once and then takes it from its cache. The answer is the distribution of the next token over the
labels that the question allows: yes and no, or a letter for each choice or level. Nothing is
sampled.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from string import ascii_uppercase
from typing import Any

from starlette.concurrency import run_in_threadpool

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.engine import AnyEngine, Sampling
from minigpt4.errors import UserError
from minigpt4.model.prompt import Tokenizer, encode_text
from minigpt4.web.api.body import NAMED, unread
from minigpt4.web.api.errors import ApiError, json_path
from minigpt4.web.api.questions import DecisionRequest, Question, unread_in
from minigpt4.web.api.reply import used
from minigpt4.web.api.responses import KEPT_STATE, read_response, usage
from minigpt4.web.api.schemas import ChatRequest
from minigpt4.web.api.validation_errors import validated

TOGETHER = 4  # questions at once, so that other requests get their turn
FIRST_TOKEN = Sampling(temperature=0.0, max_new_tokens=1, repetition_penalty=1.0)
NOT_WATCHED = "Decisions are not available if the language model runs in another process."


@dataclass(frozen=True)
class Decisions:
    """A request for decisions: the conversation of the input, and the questions about it.

    ignored: JSON paths of the first fields that are ignored.
    """

    about: ChatRequest
    questions: list[Question]
    ignored: list[str]


def read_decisions(body: dict) -> Decisions:
    """The request in a body. ApiError for the first mistake."""
    request = validated(DecisionRequest, body)
    request.check()
    kept = {name: body.get(name) for name in KEPT_STATE}
    about, ignored = read_response({"input": body.get("input"), "model": request.model, **kept})
    rest = request.model_copy(update={"questions": []})
    unread_here = (path for path in unread(rest) if path != "input")
    others = islice(chain(unread_here, unread_in(request.questions)), NAMED)
    return Decisions(about, request.questions, [*ignored, *others][:NAMED])


async def decide(engine: AnyEngine, conversation: Conversation, asked: Decisions) -> dict:
    """OpenAI's decision object. UserError if a question cannot be asked."""
    room = asyncio.Semaphore(TOGETHER)

    async def answer(place: int) -> tuple[Answer, dict]:
        async with room:
            try:
                return await _answer(engine, conversation, asked.questions[place])
            except UserError as error:
                raise _too_long(asked, place) if error.kind == "too_long" else error from None

    found = [await answer(0)]  # then the input is in the cache
    tasks = [asyncio.ensure_future(answer(place)) for place in range(1, len(asked.questions))]
    try:
        found += await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    numbers = [used([answer]) for answer, _ in found]
    return {
        "model": engine.model.config.name,
        "answers": [decision for _, decision in found],
        "usage": usage(*(sum(column) for column in zip(*numbers, strict=True))),
    }


def _too_long(asked: Decisions, place: int) -> ApiError:
    """The error that names what to shorten: the longest of the question's texts, or the input."""
    lengths = {"input": sum(len(message.text) for message in asked.about.messages)}
    for location, text in asked.questions[place].texts:
        lengths[json_path(("questions", place, *location))] = len(text)
    path = max(lengths, key=lambda path: lengths[path])
    sentence = f"{path} is too long for the model's context: shorten it."
    return ApiError(sentence, 400, "context_length_exceeded", path)


async def _answer(
    engine: AnyEngine, conversation: Conversation, question: Question
) -> tuple[Answer, dict]:
    asked = replace(conversation, messages=[*conversation.messages])
    asked.add_question(question.text)
    count = len(question.options)
    labels = [*ascii_uppercase[:count]] if count else ["Yes", "No"]
    firsts = first_tokens(engine.model.tokenizer, labels)
    watched = [token for tokens in firsts for token in tokens]
    answer = await run_in_threadpool(ask, engine, asked, FIRST_TOKEN, trim=False, watched=watched)
    try:
        async for _ in answer:
            pass
    finally:
        answer.close()
    if len(answer.watched) != len(watched):
        raise UserError(NOT_WATCHED)
    return answer, _decision(question, _shares(firsts, answer.watched))


def first_tokens(tokenizer: Tokenizer, labels: Sequence[str]) -> list[list[int]]:
    """The first tokens of each label in all spellings, without those that labels share."""

    def firsts(label: str) -> set[int]:
        forms = [space + word for word in (label, label.lower()) for space in ("", " ")]
        return {encode_text(tokenizer, form)[0] for form in forms}

    found = [firsts(label) for label in labels]
    own = [
        sorted(tokens - set().union(*(other for other in found if other is not tokens)))
        for tokens in found
    ]
    if not all(own):
        raise UserError("This model's tokenizer cannot tell the answers apart.")
    return own


def _shares(firsts: Sequence[Sequence[int]], logprobs: Sequence[float]) -> list[float]:
    """The probability of each label, among all labels."""
    rest = iter(logprobs)
    weights = [[next(rest) for _ in tokens] for tokens in firsts]
    highest = max(max(group) for group in weights)
    sums = [sum(math.exp(w - highest) for w in group) for group in weights]
    return [s / sum(sums) for s in sums]


def _decision(question: Question, shares: list[float]) -> dict:
    """OpenAI's object for an answer. A score is the mean of the levels' numbers, from 1."""
    head: dict[str, Any] = {"type": question.type, "name": question.name}
    if question.type == "predicate":
        return head | {"probability": shares[0]}
    head["confidence"] = max(shares)
    if question.type == "choice":
        values = [choice.value for choice in question.choices or ()]
        pairs = zip(values, shares, strict=True)
        probabilities = [{"value": value, "probability": share} for value, share in pairs]
        best = values[shares.index(max(shares))]
        return head | {"choice": best, "probabilities": probabilities}
    levels = enumerate(zip(question.levels or (), shares, strict=True), 1)
    scores = [
        {"value": number, "label": level.label, "probability": share}
        for number, (level, share) in levels
    ]
    mean = sum(number * share for number, share in enumerate(shares, 1))
    return head | {"score": mean, "probabilities": scores}
