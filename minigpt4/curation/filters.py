"""Step 3, filter: named rules that say which descriptions are of no use. No torch.

Each rule is a function of one text, but for near duplicates, which are found among those that
pass the others.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from minigpt4.curation.thresholds import Thresholds
from minigpt4.evaluation.metrics import is_fragment, is_repetitive
from minigpt4.training.data import read_lines

SHINGLE = 3  # words


# The rules in the order in which they are counted, and what each says of a text it drops.
RULES = {
    "no_text": "the picture or its description could not be read",
    "too_short": "fewer words than --min-words",
    "repetition": "a sentence, a phrase or a word loop returns (as in `evaluate`)",
    "repeated_ngrams": "more than --max-repeated of its runs of three words occurred before in it",
    "breaks_off": "it ends in mid-sentence (as in `evaluate`)",
    "language": "it is in another language than --language",
    "refusal": "it holds a phrase of prompts/refusals.txt",
    "near_duplicate": "its similarity to an earlier description reaches --max-similarity",
}


def broken_rules(record: dict, thresholds: Thresholds) -> list[str]:
    """Names of the rules that a record breaks on its own."""
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
    """The records with `rules`, the names of those they break, and `kept`, whether they break none.

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
    """Rule -> how many records break it; one may break several."""
    counted = Counter(name for record in records for name in record["rules"])
    return {name: counted[name] for name in RULES}


def words(text: str) -> list[str]:
    """The words of a text, case-folded, without punctuation."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.casefold())


def shingles(text: str) -> list[tuple[str, ...]]:
    """Runs of three words; of a shorter text, the text."""
    found = words(text)
    return [tuple(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))]


def repeated_share(text: str) -> float:
    """Share of a text's runs of three words that occurred before in it, 0..1."""
    found = shingles(text)
    return 1 - len(set(found)) / len(found)


def refusal(text: str) -> str:
    """The first phrase of prompts/refusals.txt that stands in the text, or ""."""
    plain = " ".join(text.casefold().replace("’", "'").split())
    return next((p for p in _refusals() if re.search(rf"\b{re.escape(p)}\b", plain)), "")


@functools.cache
def _refusals() -> tuple[str, ...]:
    return tuple(line.casefold() for line in read_lines("refusals.txt"))


def other_language(text: str, thresholds: Thresholds) -> str:
    """The ISO 639-1 code of the language that a text surely is in, where it is not the wanted
    one; else ""."""
    language, probability = _identifier().classify(text)
    sure = probability >= thresholds.language_confidence
    return language if sure and language != thresholds.language else ""


@functools.cache
def languages() -> frozenset[str]:
    """The codes that can be told apart."""
    return frozenset(str(label) for label in _identifier().labels)


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def near_duplicates(texts: Sequence[str], similarity: float) -> dict[int, int]:
    """Place of each near duplicate -> place of the earlier text, itself none, that it repeats.

    Two texts are near duplicates where the Jaccard similarity of their sets of three-word runs
    (shared / all) is at least `similarity`. Nothing is missed and nothing approximated: two such
    sets of which one has n runs share at least one of any n - ceil(similarity * n) + 1 runs of it,
    so only texts that share one of the rarest that many are compared (prefix filtering; Chaudhuri
    et al., 2006).
    """
    sets = [frozenset(shingles(text)) for text in texts]
    frequency = Counter(shingle for found in sets for shingle in found)
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # rare run -> originals with it
    twins: dict[int, int] = {}
    for place, found in enumerate(sets):
        rarest = sorted(found, key=lambda s: (frequency[s], s))
        # Less a hair, for floating point: one run more costs nothing.
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
