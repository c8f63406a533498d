"""Texts reduced to what the features show.

Small encoders hardly see colours of clothes, materials and small things. A model that is trained to
name them learns to invent them. So a sentence of a description is left out if a word head that was
not trained on the picture finds little of what the sentence names, and a colour if it does not find
that.
"""

import re
from dataclasses import replace

from minigpt4.training.mixture import TrainingPicture
from minigpt4.training.vocabulary import WORD_LISTS, Vocabulary, singular

_FOUND = 0.12  # a sentence whose words have this mean probability or more is kept
_COLOUR_FOUND = 0.12  # "red" is kept if "red shirt" has this probability or more
_SENTENCES = 4  # the most sentences of a description
_TINT = "|".join(sorted(WORD_LISTS["tints"]))
_NAMES = "|".join(sorted(WORD_LISTS["colours"]))
_COLOUR = rf"(?:(?:{_TINT}|[a-z]+ish)[ -])*(?:(?:{_NAMES})(?:ish)?)"
_COLOURS = rf"{_COLOUR}(?:(?:, and | and |, |-and-|-){_COLOUR})*"
_BEFORE_NOUN = re.compile(rf"(?<![-\w])(?:(an?) )?({_COLOURS}) (?=([a-z]+))", re.IGNORECASE)
_SAID = re.compile(rf"\b(?:is|are|look|looks) (?:all |mostly )?{_COLOUR}\b", re.IGNORECASE)
_PHOTOGRAPHS = {"photo", "photograph", "picture", "image"}


class Supported:
    """Reduces pictures' texts; `probability`: the head's, of each term of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, picture: TrainingPicture, probability: list[float]) -> TrainingPicture:
        """The picture with fewer sentences in its description, and fewer colours in this and in
        machine-written captions."""
        if picture.source not in ("described", "instructed"):
            return picture
        return replace(
            picture,
            description=self.description(picture.description, probability),
            captions=tuple(self.colours(c, probability) for c in picture.captions),
        )

    def description(self, text: str, probability: list[float]) -> str:
        """The first sentence and the supported ones; at least two sentences."""
        first, *others = re.split(r"(?<=[.!?])\s+", text.strip())
        scores = [self.support(sentence, probability) for sentence in others]
        kept = sorted(range(len(others)), key=lambda i: -scores[i])
        kept = [i for n, i in enumerate(kept) if n == 0 or scores[i] >= _FOUND]
        chosen = [first, *(others[i] for i in sorted(kept[: _SENTENCES - 1]))]
        return " ".join(self.colours(sentence, probability) for sentence in chosen)

    def support(self, sentence: str, probability: list[float]) -> float:
        """The mean probability of the words in a sentence; 0 if it says that something has a colour
        that is not found."""
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
