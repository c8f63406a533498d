"""Rules for meaningless answers, the third kind of failure besides those in `metrics`. No torch.

The paper adds a second stage because the answers of the first one are repetitive, fragmentary or
irrelevant. `metrics.is_repetitive` and `metrics.is_fragment` find the first two;
`stutters` finds a milder repetition.
"""

import itertools
import re
from dataclasses import dataclass

from minigpt4.evaluation.metrics import is_fragment, is_repetitive, sentences

# Function words: in English text every second to fourth word.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\S+",
        """a about above across after against all along also am among an and another any are
        around as at away back be because been before behind being below beside between both
        but by can could did do does down each every few for from had has have he her here him
        his how i if in inside into is it its it's like many may me more most much my near no
        nor not of off on one only onto or other our out over own she so some such than that
        the their them then there these they this those through to together too toward towards
        two under until up upon us very was we were what when where which while who whose why
        will with within without would you your there's he's she's they're you're can't don't""",
    )
)
_LIVING = frozenset(("man", "woman", "boy", "girl", "child", "kid", "baby", "person", "dog", "cat"))
# Parts of a prompt that do not belong in an answer.
_DEBRIS = re.compile(r"</?(?:img|s)>|###|<\|\w*\|>|\[/?INST\]|ImageHere|ImageContent", re.I)
_BLIND = re.compile(
    r"\bas an? (?:ai\b|artificial|(?:large )?language model|text-based)|"
    r"\bi(?:['’]m| am) (?:just )?an? (?:ai\b|(?:large )?language model|text-based)|"
    r"\bi (?:can(?:no|['’])t|am (?:not able|unable) to|do(?: not|n['’]t) have the ability to) "
    r"(?:\w+ )?(?:see|view|access|look at|display|open|analy[sz]e|process)\w* "
    r"(?:\w+ ){0,2}(?:image|picture|photo)|"
    r"\b(?:please|could you) (?:upload|attach|share|provide|send)[^.]{0,30}(?:image|picture|photo)|"
    r"\b(?:no|any) (?:image|picture|photo) (?:was |is |has been )?(?:attached|provided|shared)",
    re.I,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_TOKEN = re.compile(r"\S+")
_VOWELS = re.compile(r"[aeiouy]", re.I)


def is_meaningless(text: str) -> bool:
    """Is this English description or poem certainly not about a picture?

    True if one of these holds:

    - it has fewer than three words;
    - it contains parts of the prompt (`<Img>`, `###`, `[INST]`, a control token);
    - it says that it cannot see (“As an AI language model”, “please upload the image”);
    - more than one character in seven is neither a letter, a digit nor common punctuation, or more
      than one word in ten is misshapen (see `misshapen`), or one mixes two alphabets;
    - it has too few function words (“the”, “of”, “is”), as in a list of names: less than a tenth
      of 8 to 19 words, or less than a quarter of 20 or more; or too many, over four in five.

    Markup (a website) counts as one phrase. The rule does not ask whether a well-formed sentence is
    true: see `abilities` and `pope` for that.
    """
    if _DEBRIS.search(text) or _BLIND.search(text):
        return True
    text = re.sub(r"```.*?(?:```|\Z)|<!doctype.*|<html.*", " markup stands here ", text, flags=re.S)
    words = _WORD.findall(text)
    if len(words) < 3 or any(map(_two_alphabets, words)):
        return True
    characters = re.sub(r"\s", "", text)
    odd = re.sub(r"[\w.,;:!?'’‘“”\"()\[\]–—…*#/&%$+-]", "", characters)
    if len(odd) > len(characters) / 7 or _misshapen_share(text) > 1 / 10:
        return True
    if len(words) < 8:
        return False
    binding = sum(w.casefold().replace("’", "'") in _FUNCTION_WORDS for w in words) / len(words)
    return binding < (1 / 10 if len(words) < 20 else 1 / 4) or binding > 4 / 5


def misshapen(token: str) -> bool:
    """Does a token look unlike an English word?

    It has letters next to digits, a capital after a small letter, signs between letters, four or
    more letters without a vowel (unless all are capitals), or more than eighteen letters.
    """
    token = token.strip(".,;:!?'’‘“”\"()[]*_–—…-")
    if not token or not re.search(r"[^\W\d_]", token):
        return False
    if re.fullmatch(
        r"\d+(?:st|nd|rd|th|s|am|pm|px|cm|mm|km|kg|g|ml|m)|[A-Z]+-?\d+|\d+[A-Z]", token
    ):
        return False
    if re.search(r"[^\W\d_]\d|\d[^\W\d_]", token):
        return True
    parts = re.split(r"['’/-]|--|…|\.\.+", token)
    return any(_misshapen_part(part) for part in parts)


def _misshapen_part(part: str) -> bool:
    letters = re.sub(r"[\W\d_]", "", part)
    if not letters or re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", part):  # a number; "p.m", "U.S.A"
        return False
    if len(letters) > 18 or (letters != part and re.search(r"\w[^\w\s]\w", part)):
        return True
    if re.search(r"[a-z][A-Z]", part) and not re.match(r"(?:Mc|Mac|i|e)[A-Z]", part):
        return True
    plain = len(letters) >= 4 and letters.isascii() and not letters.isupper()
    return plain and not _VOWELS.search(letters)


def _two_alphabets(word: str) -> bool:
    """Does a word contain both Latin and other letters?"""
    latin = [ord(c) < 0x250 for c in word if c.isalpha()]
    return any(latin) and not all(latin)


def _misshapen_share(text: str) -> float:
    tokens = [t for t in _TOKEN.findall(text) if re.search(r"\w", t)]
    return sum(map(misshapen, tokens)) / len(tokens) if tokens else 1.0


def stutters(text: str) -> bool:
    """Does a sentence introduce the same thing twice: “a man with a hat is wearing a hat”?

    That is, “a” or “an” occurs twice before the same words, up to the next function word. People
    and animals do not count: there may well be “a man and a man”. Milder than
    `metrics.is_repetitive`, which counts in the plain scores.
    """
    for sentence in sentences(text.casefold()):
        words, seen = re.findall(r"[\w'-]+", sentence), set()
        for place in (i for i, word in enumerate(words) if word in ("a", "an")):
            rest = words[place + 1 : place + 4]
            thing = tuple(itertools.takewhile(lambda w: w not in _FUNCTION_WORDS, rest))
            if thing and thing in seen:
                return True
            if thing and thing[-1] not in _LIVING:
                seen.add(thing)
    return False


@dataclass(frozen=True)
class Failures:
    """The ways in which an answer fails."""

    repetition: bool
    fragment: bool
    meaningless: bool

    @property
    def any(self) -> bool:
        return self.repetition or self.fragment or self.meaningless


def failures(text: str, truncated: bool) -> Failures:
    """How an answer to “describe” or “write a poem” fails. truncated: a limit ended it."""
    repetition = is_repetitive(text) or stutters(text)
    return Failures(repetition, is_fragment(text, truncated), is_meaningless(text))
