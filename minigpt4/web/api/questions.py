"""Questions of POST /v1/decisions: their schemas, and the prompts that ask the model."""

from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from minigpt4.web.api.body import unread
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.schemas import Object

MAX_QUESTIONS = 400
# The field with a question's answers, by its type.
ANSWERS = {"choice": "choices", "score": "levels"}


def _filled(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("empty", "empty")
    return value


Filled = AfterValidator(_filled)  # a text that says something


class QuestionPart(Object):
    type: Annotated[
        Literal["input_text", "text"],
        Field(description="must be input_text: pictures belong into input."),
    ]
    text: str


class DecisionOption(Object):
    value: Annotated[str | bool, Filled, Field(description="must be a string, true or false.")]
    description: str | None = None


class Level(Object):
    label: Annotated[str, Filled]
    description: str | None = None


class Question(Object):
    """A predicate (true or not), a choice among `choices`, or a score by `levels`, lowest first."""

    type: Annotated[
        Literal["predicate", "choice", "score"],
        Field(description="must be predicate, choice or score."),
    ]
    instructions: Annotated[
        list[QuestionPart],
        FailFast(),
        AfterValidator(lambda parts: parts if _filled(_joined(parts)) else parts),
        BeforeValidator(
            lambda asked: (
                [{"type": "input_text", "text": asked}] if isinstance(asked, str) else asked
            ),
            json_schema_input_type=str | list[QuestionPart],
        ),
    ]
    name: str | None = None
    choices: Annotated[list[DecisionOption], Field(min_length=2, max_length=26)] | None = None
    levels: Annotated[list[Level], Field(min_length=2, max_length=26)] | None = None

    @property
    def options(self) -> list[str]:
        """The choices' or levels' texts; none for a predicate."""
        texts: list[tuple[str, str | None]] = []
        if self.type == "choice":
            texts = [(_text(choice.value), choice.description) for choice in self.choices or ()]
        elif self.type == "score":
            texts = [(level.label, level.description) for level in self.levels or ()]
        return [f"{text}: {more}" if more else text for text, more in texts]

    @property
    def texts(self) -> Iterator[tuple[tuple[int | str, ...], str]]:
        """(place in the question, text) of each that the model is asked with."""
        for number, part in enumerate(self.instructions):
            alone = len(self.instructions) == 1  # which may have been sent as a string
            yield ("instructions",) if alone else ("instructions", number, "text"), part.text
        for number, choice in enumerate(self.choices or ()):
            yield ("choices", number, "value"), _text(choice.value)
            yield ("choices", number, "description"), choice.description or ""
        for number, level in enumerate(self.levels or ()):
            yield ("levels", number, "label"), level.label
            yield ("levels", number, "description"), level.description or ""

    @property
    def text(self) -> str:
        """The question as the model is asked."""
        asked = _joined(self.instructions)
        if self.type == "predicate":
            return f"{asked}\nIs this true? Answer with Yes or No."
        lines = [f"{a}. {b}" for a, b in zip(ascii_uppercase, self.options, strict=False)]
        return "\n".join([asked, *lines, "Answer with the letter only."])


class DecisionRequest(Object):
    """The body, apart from `input`, which is as in the Responses API."""

    model: str | None = None
    questions: Annotated[list[Question], FailFast(), Field(min_length=1, max_length=MAX_QUESTIONS)]

    def check(self) -> None:
        """ApiError about answers that are missing, or names and answers that are there twice."""
        names: set[str] = set()
        for place, question in enumerate(self.questions):
            path = f"questions[{place}]"
            if question.name is not None:
                _refuse_again(question.name, names, f"{path}.name", "name")
            field = ANSWERS.get(question.type, "")
            if field and not question.options:
                raise ApiError(f"{path}.{field} is missing: add it.", param=f"{path}.{field}")
            values: set[str] = set()
            for number, choice in enumerate(question.choices or ()):
                where = f"{path}.choices[{number}].value"
                _refuse_again(_text(choice.value), values, where, "value")
            labels: set[str] = set()
            for number, level in enumerate(question.levels or ()):
                _refuse_again(level.label, labels, f"{path}.levels[{number}].label", "label")


def unread_in(questions: Sequence[dict[str, Any]]) -> Iterator[str]:
    """JSON paths of what is not read of questions that have been checked."""
    for place, question in enumerate(questions):
        path = ("questions", place)
        yield from unread(question, Question, path)
        read = ANSWERS.get(question["type"])
        others = [field for field in ANSWERS.values() if field != read]
        yield from unread({name: question.get(name) for name in others}, Object, path)
        inner: dict[str, type[Object]] = {
            "instructions": QuestionPart,
            "choices": DecisionOption,
            "levels": Level,
        }
        for name, model in inner.items():
            items = question.get(name) if name not in others else None
            for number, item in enumerate(items if isinstance(items, list) else ()):
                yield from unread(item, model, (*path, name, number))


def _refuse_again(text: str, known: set[str], path: str, kind: str) -> None:
    if text in known:
        raise ApiError(f"{path} is there twice: give each its own {kind}.", param=path)
    known.add(text)


def _joined(parts: Sequence[QuestionPart]) -> str:
    return "\n".join(part.text for part in parts)


def _text(value: str | bool) -> str:
    return value if isinstance(value, str) else ("yes" if value else "no")
