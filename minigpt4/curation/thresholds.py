"""What `curate filter` measures descriptions against. Imports nothing heavy: it makes options."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """What a description must keep to; each is an option of `curate filter`.

    min_words. max_repeated: share of the runs of three words that may have occurred before.
    language: its ISO 639-1 code, "" to leave the rule out; a text is dropped where another
    language is at least `language_confidence` likely, which short or odd texts hardly reach.
    max_similarity: Jaccard similarity to an earlier text, from which one is a near duplicate.
    """

    min_words: int = 25
    max_repeated: float = 0.1
    language: str = "en"
    language_confidence: float = 0.9
    max_similarity: float = 0.7
