"""Many questions to one engine, answered together: for evaluation, curation and folders of photos.

The questions about one item are a dialogue: a generator that yields an `Answer` as soon as it has
asked for it, and is sent the `Completion` when the answer has ended. It may then ask again, or
return a result:

    def describe(path):
        conversation = Conversation.asking("What is in this picture?", [image.load(path)])
        completion = yield ask(engine, conversation, sampling)
        return completion.text

    with Batch(engine) as batch:
        for path, text in batch.run(paths, describe):
            ...
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from tqdm import tqdm

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.data.examples import Example
from minigpt4.data.files import lock, parse_jsonl, printable, read_text, replacing
from minigpt4.engine import Sampling
from minigpt4.errors import UserError, say
from minigpt4.model import image

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

TOGETHER = 16  # dialogues at once
NAMED = 10  # items left out that are named; the others are only counted
MOST_LEFT_OUT = 0.5  # the largest share of a job's questions that may be left out
# Kinds of errors of a single request; after another kind, the engine would refuse the next as well.
ITEM_ERRORS = {"request", "too_long", "memory"}


@dataclass(frozen=True)
class PictureQuestion:
    """An instruction about a picture. `read` returns what `image.load` opens: bytes or a path."""

    key: str
    instruction: str
    read: Callable[[], Any]


@dataclass(frozen=True)
class Completion:
    """A complete answer.

    stop_reason: "stop", or the limit that ended it: "length" or "time". watched: log-probabilities
    of the token ids that `Batch.answer` was asked to watch.
    """

    text: str
    stop_reason: str = "stop"
    watched: Sequence[float] = ()

    @property
    def truncated(self) -> bool:
        """Did a limit end the answer?"""
        return self.stop_reason != "stop"


Item = TypeVar("Item")
Result = TypeVar("Result")
BatchEngine = TypeVar("BatchEngine", bound="AnyEngine")
Dialogue = Generator[Answer, Completion, Result]


def greedy(max_new_tokens: int) -> Sampling:
    """The most likely answer, without any penalty."""
    return Sampling(
        temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens
    )


def complete(answer: Answer) -> Completion:
    """Read an answer to its end."""
    for _ in answer:
        pass
    return Completion(answer.text.strip(), answer.stop_reason, answer.watched)


class Batch(Generic[BatchEngine]):
    """Asks an engine many questions, at most `together` at once. `with` closes the engine.

    left_out: how many items got no result because of an error of their own.
    """

    def __init__(self, engine: BatchEngine, together: int = TOGETHER) -> None:
        self.engine = engine
        self.left_out = 0
        self._together = min(together, engine.max_waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def run(
        self, items: Iterable[Item], dialogue: Callable[[Item], Dialogue]
    ) -> Iterator[tuple[Item, Result | UserError]]:
        """(item, result of its dialogue) as they finish.

        Dialogues that ask once finish in the order of `items`; one that asks again goes to the end
        of the queue. An error of one item is its result; an error of the engine is raised.
        """
        running: deque[tuple[Item, Dialogue, Answer | _Finished]] = deque()
        try:
            for item in items:
                begun = dialogue(item)
                running.append((item, begun, _advance(begun)))
                while len(running) >= self._together:
                    yield from self._step(running)
            while running:
                yield from self._step(running)
        finally:
            for _, begun, answer in running:
                begun.close()
                if isinstance(answer, Answer):
                    answer.close()

    def _step(self, running: deque) -> Iterator[tuple[Item, Result | UserError]]:
        """Wait for the dialogue at the front, and resume it."""
        item, dialogue, answer = running.popleft()
        if isinstance(answer, Answer):
            answer = _advance(dialogue, answer)
        if isinstance(answer, _Finished):
            yield item, answer.result
        else:
            running.append((item, dialogue, answer))

    def completions(
        self,
        questions: Iterable[PictureQuestion],
        sampling: Sampling,
        watched: Sequence[int] = (),
        next_seeds: bool = False,
    ) -> Iterator[tuple[PictureQuestion, Completion | UserError]]:
        """The answer to each question, in order, or why there is none.

        next_seeds: if `sampling` has a seed, sample each question with the next one.
        """

        def dialogue(numbered: tuple[int, PictureQuestion]) -> Dialogue:
            number, question = numbered
            conversation = Conversation.asking(question.instruction, [image.load(question.read())])
            own = sampling
            if next_seeds and sampling.seed is not None:
                own = replace(sampling, seed=sampling.seed + number)
            completion = yield ask(self.engine, conversation, own, watched=watched)
            return completion

        for (_, question), outcome in self.run(enumerate(questions), dialogue):
            yield question, outcome

    def answer(
        self,
        questions: Sequence[PictureQuestion],
        sampling: Sampling,
        watched: Sequence[int] = (),
        progress: str = "answering",
    ) -> Iterator[tuple[PictureQuestion, Completion]]:
        """As `completions` with `next_seeds`, but with a progress bar of this name, and questions
        without an answer are reported and left out.

        UserError if there was no answer at all, or if more than `MOST_LEFT_OUT` got none, which is
        also checked early, after more than `NAMED` were left out.
        """
        answered = 0
        outcomes = self.completions(questions, sampling, watched, next_seeds=True)
        bar = tqdm(outcomes, desc=progress, total=len(questions), unit="answer")
        for question, outcome in bar:
            if isinstance(outcome, UserError):
                self.leave_out(question, outcome)
                if self.left_out > NAMED and answered:
                    self._check_share(answered, "questions")
                continue
            answered += 1
            yield question, outcome
        self.check_answered(answered, "questions")

    def ask_each(
        self,
        examples: Iterable[Example],
        instruction: str,
        sampling: Sampling,
        progress: str = "answering",
    ) -> dict[str, Completion]:
        """An example's key -> the answer to one instruction about its picture, as by `answer`."""
        questions = [PictureQuestion(e.key, instruction, e.read) for e in examples]
        return {q.key: found for q, found in self.answer(questions, sampling, progress=progress)}

    def leave_out(self, question: PictureQuestion, error: UserError) -> None:
        """Count a question without an answer, and name the first `NAMED`."""
        self.left_out += 1
        if self.left_out <= NAMED:
            say(f"{printable(question.key)} is left out: {error}")

    def check_answered(self, answered: int, what: str) -> None:
        """Say how many of `what` were left out. UserError if more than `MOST_LEFT_OUT` were, or if
        none was answered."""
        if self.left_out and not answered:
            raise UserError(f"None of the {what} got an answer: see the reasons above.")
        self._check_share(answered, what)
        if self.left_out:
            say(f"{self.left_out} of {self.left_out + answered} {what} were left out.")

    def _check_share(self, answered: int, what: str) -> None:
        if self.left_out > MOST_LEFT_OUT * (self.left_out + answered):
            raise UserError(
                f"{self.left_out} of {self.left_out + answered} {what} got no answer, which is "
                f"more than {MOST_LEFT_OUT:.0%}: see the reasons above."
            )


@contextmanager
def not_asked_yet(paths: Sequence[Path], question: str, out: str) -> Iterator[list[Path]]:
    """The photos without an answer in the file `out`, so that an interrupted run is resumed.

    The file is created, and locked in the block. Lines of photos that got no answer are removed,
    since these are asked about again. OSError if it cannot be written, UserError if it has other
    content, or another run writes it.
    """
    file = _target(out)
    if file.is_fifo() or file.is_char_device():
        yield [*paths]
        return
    busy = f"{printable(out)} is being written by another run: name another file with --out."
    with file.open("a") as before:
        lock(before, busy)
        left, kept = _left_of(paths, question, out, file)
        if kept == file.read_bytes():
            yield left
            return
        with replacing(file) as partial:
            after = partial.open("wb")
            lock(after, busy)  # this file replaces the locked one
            after.write(kept)
            after.flush()
        with after:
            yield left


def _target(out: str) -> Path:
    """The file that a link (such as /dev/stdout) leads to; a pipe or a device itself."""
    file = Path(out)
    return file if file.is_fifo() or file.is_char_device() else Path(os.path.realpath(file))


def _left_of(
    paths: Sequence[Path], question: str, out: str, file: Path
) -> tuple[list[Path], bytes]:
    """The photos without an answer in `file`, which the user calls `out`, and the lines about
    the others."""
    records = _answers_in(file)
    if records is None or any(record["question"] != question for record in records):
        raise UserError(
            f"{printable(out)} has something other than answers to this question: name another "
            "file with --out."
        )
    done = {record["photo"] for record in records if "error" not in record}
    kept = [r for r in records if r["photo"] in done]
    left = [path for path in paths if _encodable(path) not in done]
    if done:
        say(
            f"{printable(out)} has answers about {len(paths) - len(left)} of {len(paths)} photos, "
            "which are kept: delete it to ask again."
        )
    return left, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept).encode()


def _answers_in(file: Path) -> list[dict] | None:
    """The lines of a file that `ask_photos` wrote (the last may be cut); None for another file."""
    text, start = read_text(file), '{"photo"'
    if text and not text.startswith(start) and not start.startswith(text):
        return None
    try:
        return [one for _, one in parse_jsonl(file, text, "photo", "question", cut_end=True)]
    except UserError:
        return None


def ask_photos(
    engine: "AnyEngine",
    paths: Sequence[Path],
    question: str,
    sampling: Sampling,
    out: str | None,
    kept: int = 0,
) -> None:
    """Ask one question about many photos. Appends JSON lines to the file `out`, or prints text to
    standard output; photos without an answer are named on standard error.

    kept: how many answers about other photos the file has. UserError as by `check_answered`.
    """
    answered = kept

    def about(path: Path) -> PictureQuestion:
        return PictureQuestion(_encodable(path), question, lambda: path)

    with (
        Batch(engine) as batch,
        _target(out).open("a", encoding="utf-8") if out else nullcontext(sys.stdout) as file,
        tqdm(total=len(paths), unit="photo", disable=None if out else True) as bar,
    ):
        for asked, outcome in batch.completions(map(about, paths), sampling):
            record = {"photo": asked.key, "question": question}
            if isinstance(outcome, UserError):
                batch.leave_out(asked, outcome)
                record["error"] = str(outcome)
            else:
                answered += 1
                record |= {"answer": outcome.text, "stop_reason": outcome.stop_reason}
            if out:
                print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            elif "answer" in record:
                print(f"{printable(asked.key)}: {record['answer']}", flush=True)
            bar.update()
    batch.check_answered(answered, "photos")


def _encodable(path: Path) -> str:
    """A path as text for a file; bytes that are not UTF-8 become escapes, as in \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Finished:
    """A dialogue's result, or the error that ended it."""

    result: Any


def _advance(dialogue: Dialogue, answer: Answer | None = None) -> Answer | _Finished:
    """Resume a dialogue when its answer is complete. Returns its next answer, or its result."""
    try:
        return next(dialogue) if answer is None else dialogue.send(complete(answer))
    except StopIteration as end:
        return _Finished(end.value)
    except UserError as error:
        if error.kind not in ITEM_ERRORS:
            raise
        return _Finished(error)
