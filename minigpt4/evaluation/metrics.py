"""Scores of captions (BLEU, CIDEr); rules for repetitive and for unfinished answers. No torch.

BLEU and CIDEr are those of the reference implementation, coco-caption (PyPI `pycocoevalcap`). Only
its tokenizer, a Java program, is replaced, by `ptb_tokens`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

# The characters that the Java tokenizer rewrites and that occur in captions or answers.
_PLAIN = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "«": '"', "»": '"'})
_PLAIN |= str.maketrans({"…": " ... ", "–": " -- ", "—": " -- ", "€": "$", "£": "#"})

# Split before the scan for tokens, which then sees two words.
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", re.I)
_JOINED = re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))", re.I)
_TOKEN = re.compile(
    r"""
    https?://\S+ | [\w.]+@\w[\w.]*\w | </?[a-z]+>
    | (?:[a-z]\.){2,} | ph\.d\. | no\.(?=\ ?\d)
    | (?:mrs?|ms|dr|prof|st|ave|blvd|rd|mt|jr|sr|gen|sgt|capt|vs|etc|ft|inc|co|ltd)\.
    | [a-z]\.(?=\ (?!(?:the|an?|it|he|she|they|this|there|in|on)\b)\w)  # "J. K. Rowling"
    | '(?:n'|t(?=is\b|was\b)|\d\ds?\b(?!")|(?:em|s|m|d|re|ve|ll)\b) | n't\b | y'(?=all\b)
    | \d+:\d\d | [+-]?[.,:]?\d++(?:[.,:/]\d++)*+(?![\w-])  # 1,000  10:30  3.5  1/2  -5
    | (?-i:[A-Z]+&[A-Z]+)
    | (?:[odl]'|ma'(?=am))?\w+(?:[-/.](?=\w)\w+)*
    | [@\#][a-z]\w* | [!?]{2,} | \*+ | [^\s\u200d\ufe0f\U00010000-\U0010ffff]  # no emoji
    """,
    re.VERBOSE | re.I,
)
# coco-caption drops these. Its list also has brackets, but as "-LRB-", which never matches the
# lower-case "-lrb-": published scores count them as words, and so do these.
_DROPPED = {"'", '"', ".", "?", "!", ",", ":", "-", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def ptb_tokens(text: str) -> str:
    """The words of a caption as coco-caption counts them: in lower case, separated by spaces.

    Follows Stanford CoreNLP 3.4.1's PTBTokenizer and coco-caption's list of dropped punctuation,
    for English: contractions are split ("man 's", "do n't", "can not"); hyphens inside words and
    signs such as "&" are kept. Rare abbreviations and symbols may differ.
    """
    text = _JOINED.sub(r"\1 ", _CONTRACTION.sub(r" \1", " ".join(text.translate(_PLAIN).split())))
    tokens = (_BRACKETS.get(token, token.lower()) for token in _TOKEN.findall(text))
    return " ".join(token for token in tokens if token not in _DROPPED)


def caption_scores(
    answers: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Corpus BLEU-1, BLEU-4 and CIDEr of one answer per picture, as coco-caption computes them.

    BLEU is from 0 to 1. A CIDEr of 1.0 is 100 in papers (the maximum is 10). CIDEr weights words by
    the number of pictures whose references contain them, so it depends on the whole set, and is 0
    for a single picture. ValueError if the keys differ, if there are none, or if a picture has no
    reference.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if not answers or answers.keys() != references.keys():
        raise ValueError("answers and references need the same keys, at least one")
    if missing := [key for key, refs in references.items() if not refs]:
        raise ValueError(f"no reference caption for {missing[0]!r}")
    gts = {key: [ptb_tokens(ref) for ref in references[key]] for key in answers}
    res = {key: [ptb_tokens(answer)] for key, answer in answers.items()}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)  # verbose=0: it would print its counts
    cider, _ = Cider().compute_score(gts, res)
    return {"bleu1": float(bleu[0]), "bleu4": float(bleu[3]), "cider": float(cider)}


def sentences(text: str) -> list[str]:
    """The sentences or lines of verse in a text, without their ends; parts without a word do not
    count."""
    parts = re.split(r"[.!?]+(?=\W|$)|\n", text)
    return [part for part in parts if re.search(r"\w", part)]


def is_repetitive(text: str) -> bool:
    """Does the text repeat itself? Words are compared without case and punctuation.

    True if a sentence of three or more words occurs twice, if four consecutive words occur three
    times, or if one to three words occur three times in a row ("a dog, a dog, a dog"). For
    languages with spaces between words.
    """
    parts = [tuple(_words(part)) for part in sentences(text)]
    long = [part for part in parts if len(part) >= 3]
    words = _words(text)
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return (
        len(set(long)) < len(long)
        or max(fours.values(), default=0) >= 3
        or any(
            words[i : i + n] == words[i + n : i + 2 * n] == words[i + 2 * n : i + 3 * n]
            for n in (1, 2, 3)
            for i in range(len(words) - 3 * n + 1)
        )
    )


def _words(text: str) -> list[str]:
    """The words of a text, case-folded. A number such as 1,000,000 is one word."""
    return re.findall(r"\d+(?:[.,:]\d+)+|\w+(?:['’-]\w+)*", text.casefold())


# What may follow the end of a sentence: closing quotes and brackets, emphasis, emoticons, emoji,
# and an ellipsis, which does not say whether the sentence is complete. It matches a reversed text.
_TAIL = re.compile(r"(?:[)(DP]-?[:;]|\.{2,}|_|[^\w.!?。！？।؟,:–—(\[{/&“‘-])*")
_END = re.compile(r"[.!?。！？।؟]$")
_LIST_MARK = re.compile(r"\n\s*(?:\d+[.)]|[-*•#]+)\s*$")
# Marks and words at which hardly any English sentence ends. Not "on", "up", "by" or "her": one
# human caption in fifty ends with such a word ("with his coat on").
_OPEN = re.compile(
    r"[,:–—(\[{/&“‘-]$|(?<![\w'’-])(?:a|(?<![^.!?]\s)A|"  # "A", but not "plan A"
    r"(?i:an|the|and|or|but|nor|because|if|than|as|that|which|whose|of|with|in|at|to|from|for|into|"
    r"onto|between|without|its|their|my|your))$"
)


def is_fragment(text: str, truncated: bool) -> bool:
    """Does an answer end in the middle of a sentence? truncated: a limit ended it.

    True if it has no word, or if its last line is only a list mark ("2."). Otherwise what may
    follow a sentence (closing quotes and brackets, emoji, "...") is ignored: an answer that then
    ends in . ! or ? is complete. Any other truncated answer is a fragment. One that ended by itself
    is a fragment only after a mark or an English word that must be continued (a comma, colon, dash,
    opening bracket; "and", "the", "with"): "A dog runs on the grass" is complete.
    """
    body = _TAIL.sub("", text[::-1], count=1)[::-1]
    if not _words(body) or _LIST_MARK.search(text):
        return True
    return not _END.search(body) and (truncated or bool(_OPEN.search(body)))


def failure_rates(answers: Iterable[str], truncated: Iterable[bool]) -> dict[str, float | int]:
    """The shares (0..1) of answers that are repetitive and that are fragments, and their number.

    truncated: whether a limit ended each answer. ValueError if there are no answers, or if the
    numbers of answers and flags differ.
    """
    pairs = list(zip(answers, truncated, strict=True))
    if not pairs:
        raise ValueError("no answers to rate")
    return {
        "repetition_rate": sum(is_repetitive(answer) for answer, _ in pairs) / len(pairs),
        "fragment_rate": sum(is_fragment(answer, cut) for answer, cut in pairs) / len(pairs),
        "n": len(pairs),
    }


def auc(odds: Sequence[tuple[bool, float]]) -> float:
    """The share of (present, absent) pairs that the log-odds order correctly; ties count half."""
    there = [value for truth, value in odds if truth]
    absent = [value for truth, value in odds if not truth]
    if not there or not absent:
        return 0.5
    won = sum((a > b) + 0.5 * (a == b) for a in there for b in absent)
    return won / (len(there) * len(absent))
