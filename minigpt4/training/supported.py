"""Texts reduced to what the features show.

Small encoders see few colours of clothes, materials and small things. A model that is trained to
name them learns to invent them. So sentences of a description are left out if a word head that has
not seen the picture finds little of what they name, and colours if it does not find them.
"""

import re
from dataclasses import replace

from minigpt4.training.mixture import TrainingPicture
from minigpt4.training.vocabulary import WORD_LISTS, Vocabulary, singular

_FOUND = 0.12  # mean probability of a sentence's words, from which it is kept
_COLOUR_FOUND = 0.12  # probability of "red shirt", from which "red" is kept
_SENTENCES = 4  # of a description, at most
_TINT = "|".join(sorted(WORD_LISTS["tints"]))
_NAMES = "|".join(sorted(WORD_LISTS["colours"]))
_COLOUR = rf"(?:(?:{_TINT}|[a-z]+ish)[ -])*(?:(?:{_NAMES})(?:ish)?)"
_COLOURS = rf"{_COLOUR}(?:(?:, and | and |, |-and-|-){_COLOUR})*"
_BEFORE_NOUN = re.compile(rf"(?<![-\w])(?:(an?) )?({_COLOURS}) (?=([a-z]+))", re.IGNORECASE)
_SAID = re.compile(rf"\b(?:is|are|look|looks) (?:all |mostly )?{_COLOUR}\b", re.IGNORECASE)
_PHOTOGRAPHS = {"photo", "photograph", "picture", "image"}


class Supported:
    """Reduces pictures' texts; `probability`: of each term of the vocabulary, by the head."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, picture: TrainingPicture, probability: list[float]) -> TrainingPicture:
        """The picture with fewer sentences in its description, and fewer colours in it and in
        captions written by machine."""
        if picture.source not in ("described", "instructed"):
            return picture
        return replace(
            picture,
            description=self.description(picture.description, probability),
            captions=tuple(self.colours(c, probability) for c in picture.captions),
        )

    def description(self, text: str, probability: list[float]) -> str:
        """The first sentence, and those that are supported, two sentences at least."""
        first, *others = re.split(r"(?<=[.!?])\s+", text.strip())
        scores = [self.support(sentence, probability) for sentence in others]
        kept = sorted(range(len(others)), key=lambda i: -scores[i])
        kept = [i for n, i in enumerate(kept) if n == 0 or scores[i] >= _FOUND]
        chosen = [first, *(others[i] for i in sorted(kept[: _SENTENCES - 1]))]
        return " ".join(self.colours(sentence, probability) for sentence in chosen)

    def support(self, sentence: str, probability: list[float]) -> float:
        """The mean probability of the words that it names; 0 if it says that something has an
        unseen colour."""
        terms = self.vocabulary.occurring(sentence)
        found = [probability[t] for t in terms if " " not in self.vocabulary.terms[t]]
        if not found or _SAID.search(sentence):
            return 0.0
        return sum(found) / len(found)

    def colours(self, sentence: str, probability: list[float]) -> str:
        """The sentence without the colours that are not found."""

        def kept(match: re.Match) -> str:
            article, colours, noun = match[1] or "", match[2], match[3]
            name, numbers = singular(noun), self.vocabulary.numbers
            number = numbers.get(f"{colours.split()[-1].lower()} {name}")
            if noun in _PHOTOGRAPHS | WORD_LISTS["function"] or colours == "black and white":
                return match[0]
            # “dressed in white stands”, “An orange lies”: there may be no noun.
            if name not in numbers and (not article or colours == "orange"):
                return match[0]
            if number is not None and probability[number] >= _COLOUR_FOUND:
                return match[0]
            if not article:
                return ""
            return f"{article[0]}n " if noun[0] in "aeiou" else f"{article[0]} "

        without = _BEFORE_NOUN.sub(kept, sentence)
        return without[:1].upper() + without[1:]
