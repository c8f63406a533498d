"""The vocabulary of the word head: words and phrases of captions that it looks for in pictures.

A word is a thing ("truck"), a phrase a thing with an attribute ("yellow truck", "parking lot", "two
dogs"). A colour is never a term of its own: in a list, a model would apply it to any neighbouring
word. Verbs and words that fit any picture are left out (`prompts/word-lists.txt`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from minigpt4.data.word_lists import WORD_LISTS, singular, tokens

_DETERMINERS, _NUMBERS, _QUALITIES = (
    WORD_LISTS[n] for n in ("determiners", "numbers", "qualities")
)
_FUNCTION, _VAGUE, _ENDS_IN_ING = (WORD_LISTS[n] for n in ("function", "vague", "ing"))


class Vocabulary:
    """Finds the terms (words and phrases) in a text.

    terms: in the order of the head's outputs; a phrase is two words with a space between. numbers:
    term -> its place in `terms`.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.terms = tuple(terms)
        self.numbers = {term: number for number, term in enumerate(self.terms)}

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]], words: int, phrases: int, least: int):
        """The commonest terms of pictures' texts: so many, in at least `least` pictures each."""
        pictures = [[tokens(text) for text in of_one] for of_one in texts]
        nouns = _nouns(t for of_one in pictures for t in of_one)
        single: Counter[str] = Counter()
        double: Counter[tuple[str, str]] = Counter()
        pairs: Counter[tuple[str, str]] = Counter()
        firsts: Counter[str] = Counter()
        for of_one in pictures:
            found: set[str] = set()
            found_pairs: set[tuple[str, str]] = set()
            for sentence in of_one:
                found |= {singular(w) for w in sentence if singular(w) in nouns}
                found_pairs |= set(_pairs(sentence, nouns))
                pairs.update(_pairs(sentence, nouns))
                firsts.update(sentence)
            single.update(found)
            double.update(found_pairs)
        # A compound is kept only if its first word mostly occurs before its second.
        kept = {
            pair: count
            for pair, count in double.items()
            if pair[0] in _QUALITIES | _NUMBERS
            or pairs[pair] > (0.15 if pair[0] in nouns else 0.25) * firsts[pair[0]]
        }
        common = [w for w, c in single.most_common(words) if c >= least]
        joined = [p for p, c in Counter(kept).most_common(phrases) if c >= least]
        return cls([*common, *(" ".join(pair) for pair in joined)])

    def occurring(self, text: str) -> set[int]:
        """The numbers of the terms in a text."""
        words = tokens(text)
        single = [singular(w) for w in words]
        found = {self.numbers[w] for w in single if w in self.numbers}
        for first, second, whole in zip(words, single[1:], words[1:], strict=False):
            for pair in (f"{first} {second}", f"{first} {whole}"):
                if pair in self.numbers:
                    found.add(self.numbers[pair])
        return found


def _nouns(sentences: Iterable[list[str]]) -> set[str]:
    """Words that mostly follow an article or an adjective, and mostly end the noun phrase."""
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for sentence in sentences:
        for i, word in enumerate(sentence):
            total[word] += 1
            earlier = sentence[i - 1] if i else "."
            later = sentence[i + 1] if i + 1 < len(sentence) else "."
            before[word] += earlier in _DETERMINERS or earlier in _QUALITIES
            after[word] += later == "." or later in _FUNCTION or later.endswith("ing")
    found = set()
    for word, count in total.items():
        one = singular(word)
        if {word, one} & (_DETERMINERS | _QUALITIES | _FUNCTION | _VAGUE):
            continue
        if len(word) < 3 or "'" in word or (word.endswith("ing") and word not in _ENDS_IN_ING):
            continue
        if after[word] > 0.4 * count and before[word] > (0.2 if one == word else 0.12) * count:
            found.add(one)
    return found


def _pairs(sentence: list[str], nouns: set[str]) -> list[tuple[str, str]]:
    """Pairs of words that may be a phrase: an adjective, a number or a noun before a noun."""
    found = []
    for i, (first, second) in enumerate(zip(sentence, sentence[1:], strict=False)):
        later = sentence[i + 2] if i + 2 < len(sentence) else "."
        if singular(second) not in nouns:
            continue
        if first in _NUMBERS:
            found.append((first, second))
        elif first in _QUALITIES or (
            first not in _DETERMINERS | _FUNCTION | _VAGUE
            and first.isalpha()
            and (later == "." or later in _FUNCTION or later.endswith("ing"))
        ):
            found.append((first, singular(second)))
    return found
