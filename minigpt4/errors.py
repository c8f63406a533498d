"""The one kind of error a user may see."""

from typing import Literal

Kind = Literal[
    "request", "too_long", "queue_full", "loading", "memory", "broken", "hanging", "ending"
]


class UserError(Exception):
    """A mistake a user can mend: one sentence that says what is wrong and what to do.

    `kind` says the same to programs: "request" (it must change), "too_long" (for the model's
    context), and those of the engine, after which the same request may do later. "loading": there
    is none yet.
    """

    def __init__(self, sentence: str, kind: Kind = "request") -> None:
        super().__init__(sentence)
        self.kind: Kind = kind
