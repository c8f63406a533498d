"""Many questions to one engine, answered together."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from minigpt4 import start
from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.training.data import Example


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


def usable(examples: Sequence[Example]) -> list[Example]:
    """The examples whose pictures can be decoded; the others are named to the user and left out.

    UserError where none is left.
    """
    found = []
    for example in examples:
        try:
            example.picture()
        except UserError as error:
            start.say(str(error))
        else:
            found.append(example)
    if not found:
        raise UserError("None of the pictures can be used: give a set with readable ones.")
    if lost := len(examples) - len(found):
        start.say(f"{lost} of {len(examples)} pictures cannot be used and are left out.")
    return found


def greedy(max_new_tokens: int) -> Sampling:
    """The likeliest answer, nothing penalised: what scores are computed on."""
    return Sampling(
        temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens
    )


def answer_all(
    engine: Engine, questions: Iterable[Question], sampling: Sampling, together: int = 16
) -> Iterator[Reply]:
    """A reply to each question, in order; `together`: how many are being answered at once, at most
    as many as the engine lets wait.

    Where `sampling` has a seed, the next question is drawn with the next one.
    """
    answers: deque[Answer] = deque()
    together = min(together, engine.max_waiting)
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
