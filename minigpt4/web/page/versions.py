"""Versions of a conversation: texts that Retry, Edit and Undo replaced, beside the new ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minigpt4.model.prompt import Message

if TYPE_CHECKING:
    from minigpt4.engine import Stats


@dataclass
class Tail:
    """A conversation from one place on. forks: further versions, at later places."""

    messages: list[Message]
    forks: "Forks" = field(default_factory=dict)
    stop_reason: str = ""
    statistics: dict[int, "Stats"] = field(default_factory=dict)

    @property
    def says_something(self) -> bool:
        """Whether it begins with more than an answer that has failed."""
        return any(self.messages[0].parts) if self.messages else False


@dataclass
class Fork:
    """The versions of a conversation from one place on.

    tails: None in the place of the version that is shown; shown: its number, -1 if none is shown
    (the question was taken back).
    """

    tails: list[Tail | None]
    shown: int

    def put_away(self, tail: Tail) -> None:
        """Keep the version that was shown until now; then none is shown."""
        if self.shown >= 0 and tail.says_something:
            self.tails[self.shown] = tail
        elif self.shown >= 0:
            del self.tails[self.shown]
        elif tail.says_something:
            self.tails.append(tail)
        self.shown = -1

    def take(self, number: int) -> Tail | None:
        """Show a version and return its tail; with a number past the last, a new one (None)."""
        if number >= len(self.tails):
            self.tails.append(None)
        self.shown = number
        tail, self.tails[number] = self.tails[number], None
        return tail


Forks = dict[int, Fork]  # place of its first message -> the versions


def hidden_messages(forks: Forks) -> Iterator[Message]:
    """The messages of all versions that are not shown."""
    for fork in forks.values():
        for tail in fork.tails:
            if tail is not None:
                yield from tail.messages
                yield from hidden_messages(tail.forks)
