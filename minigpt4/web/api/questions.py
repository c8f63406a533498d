"""Questions of POST /v1/decisions: their schemas, and the prompts that ask the model."""

from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from minigpt4.web.api.body import unread
from minigpt4.web.api.errors import ApiError, json_path
from minigpt4.web.api.schemas import Object

MAX_QUESTIONS = 400
# The field with a question's answers, by its type.
ANSWERS = {"choice": "choices", "score": "levels"}
LABELS = {"choices": "value", "levels": "label"}  # the key of an answer's name in that field


def _filled(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("empty", "empty")
    return value


Filled = AfterValidator(_filled)  # a text that is not empty


class QuestionPart(Object):
    type: Annotated[
        Literal["input_text", "text"],
        Field(description="must be input_text: pictures belong into input."),
    ]
    text: str


class DecisionOption(Object):
    value: Annotated[str | bool, Filled, Field(description="must be a string, true or false.")]
    description: str | None = None

    @property
    def label(self) -> str:
        return self.value if isinstance(self.value, str) else ("yes" if self.value else "no")


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
    def options(self) -> Sequence[DecisionOption | Level]:
        """The choices or levels; none for a predicate."""
        field = ANSWERS.get(self.type)
        return (getattr(self, field) or ()) if field else ()

    @property
    def texts(self) -> Iterator[tuple[tuple[int | str, ...], str]]:
        """(place in the question, text) of each text in the prompt."""
        for number, part in enumerate(self.instructions):
            alone = len(self.instructions) == 1  # which may have been sent as a string
            yield ("instructions",) if alone else ("instructions", number, "text"), part.text
        for number, option in enumerate(self.options):
            place = (ANSWERS[self.type], number)
            yield (*place, LABELS[ANSWERS[self.type]]), option.label
            yield (*place, "description"), option.description or ""

    @property
    def text(self) -> str:
        """The prompt's question."""
        asked = _joined(self.instructions)
        if self.type == "predicate":
            return f"{asked}\nIs this true? Answer with Yes or No."
        lines = [
            f"{letter}. {option.label}" + (f": {option.description}" if option.description else "")
            for letter, option in zip(ascii_uppercase, self.options, strict=False)
        ]
        return "\n".join([asked, *lines, "Answer with the letter only."])


class DecisionRequest(Object):
    """The body, apart from `input`, which is as in the Responses API."""

    model: str | None = None
    questions: Annotated[list[Question], FailFast(), Field(min_length=1, max_length=MAX_QUESTIONS)]

    def check(self) -> None:
        """ApiError for answers that are missing, and for names or answers that are given twice."""
        names: set[str] = set()
        for place, question in enumerate(self.questions):
            path = f"questions[{place}]"
            if question.name is not None:
                _refuse_again(question.name, names, f"{path}.name", "name")
            field = ANSWERS.get(question.type)
            if field and not question.options:
                raise ApiError(f"{path}.{field} is missing: add it.", param=f"{path}.{field}")
            for field, kind in LABELS.items():
                known: set[str] = set()
                for number, option in enumerate(getattr(question, field) or ()):
                    _refuse_again(option.label, known, f"{path}.{field}[{number}].{kind}", kind)


def unread_in(questions: Sequence[Question]) -> Iterator[str]:
    """JSON paths of the ignored fields, including the answers of another type of question."""
    for place, question in enumerate(questions):
        others = {name: None for kind, name in ANSWERS.items() if kind != question.type}
        for name in others:
            if getattr(question, name) is not None:
                yield json_path(("questions", place, name))
        yield from unread(question.model_copy(update=others), ("questions", place))


def _refuse_again(text: str, known: set[str], path: str, kind: str) -> None:
    if text in known:
        raise ApiError(f"{path} is given twice: give each its own {kind}.", param=path)
    known.add(text)


def _joined(parts: Sequence[QuestionPart]) -> str:
    return "\n".join(part.text for part in parts)
