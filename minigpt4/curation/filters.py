"""Step 3, filter: named rules that drop unusable descriptions. Imports nothing heavy.

Each rule looks at one text, except for near duplicates, which are found among the texts that pass
all other rules.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minigpt4.data.files import prompt_lines
from minigpt4.evaluation.metrics import is_fragment, is_repetitive

SHINGLE = 3  # words


@dataclass(frozen=True)
class Thresholds:
    """What a description must satisfy; each is an option of `curate filter`.

    min_words: minimum length. max_repeated: maximum share of three-word runs that occurred before
    in the text. language: ISO 639-1 code, "" for no rule; a text is dropped if another language has
    at least the probability `language_confidence`, which short or unusual texts rarely reach.
    max_similarity: Jaccard similarity to an earlier text from which a text is a near duplicate.
    """

    min_words: int = 25
    max_repeated: float = 0.1
    language: str = "en"
    language_confidence: float = 0.9
    max_similarity: float = 0.7


# The rules in the order of the report, and why each drops a text.
RULES = {
    "no_text": "the picture or its description could not be read",
    "too_short": "fewer words than --min-words",
    "repetition": "a sentence, a phrase or a loop of words repeats (as in `evaluate`)",
    "repeated_ngrams": "more than --max-repeated of its three-word runs occurred before in it",
    "breaks_off": "it ends in the middle of a sentence (as in `evaluate`)",
    "language": "it is in another language than --language",
    "refusal": "it contains a phrase of prompts/refusals.txt",
    "near_duplicate": "its similarity to an earlier description reaches --max-similarity",
}


def broken_rules(record: dict, thresholds: Thresholds) -> list[str]:
    """The names of the rules that a record breaks, without near duplicates."""
    text = record.get("text")
    if not isinstance(text, str) or not words(text):
        return ["no_text"]
    found = {
        "too_short": len(words(text)) < thresholds.min_words,
        "repetition": is_repetitive(text),
        "repeated_ngrams": repeated_share(text) > thresholds.max_repeated,
        "breaks_off": is_fragment(text, bool(record.get("cut"))),
        "language": bool(thresholds.language) and other_language(text, thresholds) != "",
        "refusal": refusal(text) != "",
    }
    return [name for name, broken in found.items() if broken]


def apply(records: Iterable[dict], thresholds: Thresholds) -> list[dict]:
    """The records, with the names of the `rules` they break, and `kept` if they break none.

    A near duplicate also gets `duplicate_of`, an image_id.
    """
    done = []
    for record in records:
        record = {k: v for k, v in record.items() if k != "duplicate_of"}
        done.append(record | {"rules": broken_rules(record, thresholds)})
    passing = [r for r in done if not r["rules"]]
    twins = near_duplicates([r["text"] for r in passing], thresholds.max_similarity)
    for place, twin in twins.items():
        passing[place]["rules"] = ["near_duplicate"]
        passing[place]["duplicate_of"] = passing[twin]["image_id"]
    for record in done:
        record["kept"] = not record["rules"]
    return done


def counts(records: Iterable[dict]) -> dict[str, int]:
    """Rule -> how many records break it; a record may break several."""
    counted = Counter(name for record in records for name in record["rules"])
    return {name: counted[name] for name in RULES}


def words(text: str) -> list[str]:
    """The words of a text, case-folded, without punctuation."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.casefold())


def shingles(text: str) -> list[tuple[str, ...]]:
    """The runs of three words; of a shorter text, the whole text."""
    found = words(text)
    return [tuple(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))]


def repeated_share(text: str) -> float:
    """The share of three-word runs that occurred before in the text, 0..1."""
    found = shingles(text)
    return 1 - len(set(found)) / len(found)


def refusal(text: str) -> str:
    """The first phrase of prompts/refusals.txt that the text contains, or ""."""
    plain = " ".join(text.casefold().replace("’", "'").split())
    return next((p for p in _refusals() if re.search(rf"\b{re.escape(p)}\b", plain)), "")


@functools.cache
def _refusals() -> tuple[str, ...]:
    return tuple(line.casefold() for line in prompt_lines("refusals.txt"))


def other_language(text: str, thresholds: Thresholds) -> str:
    """The ISO 639-1 code of a text's language if it is certain and another; else ""."""
    language, probability = _identifier().classify(text)
    sure = probability >= thresholds.language_confidence
    return language if sure and language != thresholds.language else ""


@functools.cache
def languages() -> frozenset[str]:
    """The codes of the languages that can be identified."""
    return frozenset(str(label) for label in _identifier().labels)


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def near_duplicates(texts: Sequence[str], similarity: float) -> dict[int, int]:
    """The index of each near duplicate -> the index of the earlier text that it repeats.

    Two texts are near duplicates if the Jaccard similarity of their sets of three-word runs
    (shared / all) is at least `similarity`. The result is exact: if one of two such sets has n
    runs, they share at least one of any n - ceil(similarity * n) + 1 of them. So only texts that
    share one of their rarest runs are compared (prefix filtering; Chaudhuri et al., 2006).
    """
    sets = [frozenset(shingles(text)) for text in texts]
    frequency = Counter(shingle for found in sets for shingle in found)
    holders: dict[tuple[str, ...], list[int]] = defaultdict(
        list
    )  # rare run -> earlier texts with it
    twins: dict[int, int] = {}
    for place, found in enumerate(sets):
        rarest = sorted(found, key=lambda s: (frequency[s], s))
        # Rounded down despite floating-point errors: one run more costs nothing.
        prefix = rarest[: len(found) - math.ceil(similarity * len(found) - 1e-9) + 1]
        candidates = sorted({other for shingle in prefix for other in holders[shingle]})
        for other in candidates:
            shared = len(found & sets[other])
            if shared >= similarity * (len(found) + len(sets[other]) - shared):
                twins[place] = other
                break
        else:
            for shingle in prefix:
                holders[shingle].append(place)
    return twins
