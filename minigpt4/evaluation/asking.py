"""Many questions to one engine, answered together."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from minigpt4 import image
from minigpt4.chat import Answer, Conversation, ask
from minigpt4.engine import Engine, Sampling


@dataclass(frozen=True)
class Question:
    """An instruction about a picture; `read` gives what `image.load` opens (bytes or a path)."""

    key: str
    instruction: str
    read: Callable


@dataclass(frozen=True)
class Reply:
    """An answer; `truncated`: a limit, of length or time, ended it."""

    text: str
    truncated: bool


def greedy(max_new_tokens: int) -> Sampling:
    """The likeliest answer, nothing penalised: what scores are computed on."""
    return Sampling(
        temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens
    )


def answer_all(
    engine: Engine, questions: Iterable[Question], sampling: Sampling, together: int = 16
) -> Iterator[Reply]:
    """A reply to each question, in order; `together`: how many are being answered at once.

    Where `sampling` has a seed, the next question is drawn with the next one.
    """
    answers: deque[Answer] = deque()
    for number, question in enumerate(questions):
        conversation = Conversation()
        conversation.add_question(question.instruction, [image.load(question.read())])
        seed = None if sampling.seed is None else sampling.seed + number
        answers.append(ask(engine, conversation, replace(sampling, seed=seed)))
        if len(answers) == together:
            yield _finished(answers.popleft())
    while answers:
        yield _finished(answers.popleft())


def _finished(answer: Answer) -> Reply:
    text = "".join(answer).strip()
    return Reply(text, answer.stop_reason != "stop")
