"""What POST /v1/decisions takes beside its input: the questions, and how the model is asked."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import Field

from minigpt4.web.api.schemas import Object

MAX_QUESTIONS = 400


class Choice(Object):
    value: str | bool
    description: str | None = None


class Level(Object):
    label: str
    description: str | None = None


class Question(Object):
    """A predicate (true or not), a choice among `choices`, or a score by `levels`, lowest first."""

    type: Literal["predicate", "choice", "score"]
    instructions: str | list[dict[str, Any]]
    name: str | None = None
    choices: Annotated[list[Choice], Field(min_length=2, max_length=26)] | None = None
    levels: Annotated[list[Level], Field(min_length=2, max_length=26)] | None = None

    @property
    def options(self) -> list[str]:
        """The choices' or levels' texts; none for a predicate."""
        choices: Sequence[Choice | Level] = (self.choices or ()) if self.type == "choice" else ()
        levels = (self.levels or ()) if self.type == "score" else ()
        texts = [(_text(c.value), c.description) for c in choices if isinstance(c, Choice)]
        texts += [(level.label, level.description) for level in levels]
        return [f"{text}: {more}" if more else text for text, more in texts]

    @property
    def text(self) -> str:
        """The question as the model is asked."""
        asked = self.instructions
        if not isinstance(asked, str):
            asked = "\n".join(str(part.get("text", "")) for part in asked)
        if self.type == "predicate":
            return f"{asked}\nIs this true? Answer with Yes or No."
        lines = [f"{a}. {b}" for a, b in zip(ascii_uppercase, self.options, strict=False)]
        return "\n".join([asked, *lines, "Answer with the letter only."])


class DecisionRequest(Object):
    """The body, apart from `input`, which is as in the Responses API."""

    model: str | None = None
    questions: Annotated[list[Question], Field(min_length=1, max_length=MAX_QUESTIONS)]


def _text(value: str | bool) -> str:
    return value if isinstance(value, str) else ("yes" if value else "no")
