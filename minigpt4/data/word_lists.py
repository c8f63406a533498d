"""English words for the word head: lists of kinds of words, and the singular of a word.

The lists are in `prompts/word-lists.txt`, where people edit them, as are irregular plurals
("men=man").
"""

import re
from collections import defaultdict

from minigpt4.data.files import prompt_lines


def _word_lists() -> dict[str, set[str]]:
    """Name -> words; a name may have several lines."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in prompt_lines("word-lists.txt"):
        name, _, words = line.partition(":")
        found[name] |= set(words.split())
    return found


WORD_LISTS = _word_lists()
_SINGULAR = dict(word.split("=") for word in WORD_LISTS["singular"])


def tokens(text: str) -> list[str]:
    """A caption's words in lower case, with "." between sentences."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|\.", text.lower().replace("-", " "))


def singular(word: str) -> str:
    """ "dogs" -> "dog", "buses" -> "bus", "babies" -> "baby"; people keep their odd forms."""
    if word in _SINGULAR:
        return _SINGULAR[word]
    if len(word) < 4 or word.endswith(("ss", "us", "is")) or not word.endswith("s"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(ch|sh|x|ss|zz|us)es$", word):
        return word[:-2]
    return word[:-1]
