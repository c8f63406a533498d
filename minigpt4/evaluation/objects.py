"""Objects that captions name, of those in objects.txt. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minigpt4.data.files import read_text
from minigpt4.errors import UserError

LIST = Path(__file__).parent / "objects.txt"
NONE_NAMED = "The captions name no object of the list: use another with “--objects”."
NEGATIONS = {"no", "without"}


@dataclass(frozen=True)
class Mentions:
    """present: objects that the captions name; unclear: objects that may be there or not."""

    present: frozenset[str]
    unclear: frozenset[str]


class ObjectList:
    """The objects of a list file, one per line: `a dog: dog, puppy | animal, pet`."""

    def __init__(self, path: str | Path | None = None) -> None:
        path = Path(path) if path else LIST
        self.names: list[str] = []
        # phrase -> (object, is it certain)
        self._phrases: dict[tuple[str, ...], list[tuple[str, bool]]] = {}
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, words = line.partition(":")
            certain, _, unclear = words.partition("|")
            if not (colon and name.strip() and certain.strip()):
                raise UserError(
                    f"Line {number} of {path} must look like “a dog: dog, puppy | animal, pet”."
                )
            self.names.append(name.strip())
            for part, sure in ((certain, True), (unclear, False)):
                for phrase in filter(None, map(_words, part.split(","))):
                    for form in _forms(phrase):
                        self._phrases.setdefault(form, []).append((name.strip(), sure))
        self._longest = max(map(len, self._phrases), default=0)
        if not self.names:
            raise UserError(f"{path} names no objects: a line is “a dog: dog, puppy | animal”.")

    def mentioned(self, captions: Iterable[str]) -> Mentions:
        """The objects that all captions of one picture name together."""
        present: set[str] = set()
        unclear: set[str] = set()
        sentences = (s for caption in captions for s in re.split(r"[.!?;]\s", caption))
        for sentence in sentences:
            for name, sure in self._found(_words(sentence)):
                (present if sure else unclear).add(name)
        return Mentions(frozenset(present), frozenset(unclear - present))

    def _found(self, words: tuple[str, ...]) -> Iterable[tuple[str, bool]]:
        """(object, is it certain?) for the longest phrase of the list at each place of a sentence.

        A word belongs to one phrase only. Nothing is certain after “no” or “without”: the words
        alone do not tell what these refer to.
        """
        start, denied = 0, False
        while start < len(words):
            for length in range(min(self._longest, len(words) - start), 0, -1):
                if found := self._phrases.get(words[start : start + length]):
                    yield from ((name, sure and not denied) for name, sure in found)
                    break
            else:
                length = 1
                denied = denied or words[start] in NEGATIONS
            start += length


def _words(text: str) -> tuple[str, ...]:
    """Lower-case words; hyphens separate words, and a possessive "'s" is dropped."""
    text = text.casefold().replace("’", "'").replace("-", " ")
    return tuple(re.sub(r"'s?$", "", w) for w in re.findall(r"[a-z]+(?:'[a-z]*)?", text))


def _forms(phrase: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The phrase itself, and its regular plural."""
    *first, last = phrase
    if re.search(r"[^aeiou]y$", last):
        plural = last[:-1] + "ies"
    elif re.search(r"(?:s|x|z|ch|sh)$", last):
        plural = last + "es"
    else:
        plural = last + "s"
    return {phrase, (*first, plural)}
