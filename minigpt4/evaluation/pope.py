"""`--experiment pope`: does the model see what is there, and not what is not?

Polling-based Object Probing Evaluation (Li et al., 2023), made from any captioned set: “Is there a
dog in the image?” of objects that a picture's captions name, and of as many that none of them
names. These are drawn in three ways: at random, the set's most frequent objects, and those that
most often stand beside the picture's own (adversarial). Every way asks half its questions of
objects that are there. What counts as named, and which words leave an object open so that it is not
asked about, stands in objects.txt; captions do not mention everything, so some “no” is a
mistake of the key, fewer with five captions a picture than with one.

Two readings of the same answers, reported apart:

- *read*: the first “yes” or “no” in the greedy answer. An answer without either is wrong, and is no
  “yes”.
- *likelihood*: whether “Yes” or “No” (in any spelling of one token) is the likelier beginning of
  the answer, however it went on. `auc` is the chance that an object that is there has the higher
  log-odds than one that is not: 0.5 is blind, whatever the leaning to “yes”.
"""

import argparse
import math
import random
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from minigpt4 import start
from minigpt4.conversation import Conversation, fit, penalized
from minigpt4.engine import Engine, Request
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.asking import greedy, usable
from minigpt4.evaluation.objects import Mentions, Objects
from minigpt4.model import image
from minigpt4.model.prompt import Tokenizer, encode_text, stop_ids
from minigpt4.training.data import Example
from minigpt4.training.run import read_captioned

TOKENS = 24  # longest answer
WAYS = ("random", "popular", "adversarial")
SEED = 42

Scores = dict[str, float | int | list[float]]


@dataclass(frozen=True)
class Probe:
    """A question of one way: is `object` in picture number `picture`, and the truth."""

    way: str
    picture: int
    object: str
    there: bool


@dataclass(frozen=True)
class Said:
    """The answer's text, and the log-odds of “Yes” against “No” as its beginning."""

    text: str
    log_odds: float

    @property
    def read(self) -> bool | None:
        """The first yes or no; None without either."""
        found = re.search(r"\b(yes|no)\b", self.text, re.I)
        return None if found is None else found[1].lower() == "yes"


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(scores by way of choosing and by reading, their tables)."""
    examples = read_captioned(options.shard)
    objects = Objects(options.objects)
    mentions = [objects.mentioned(e.captions) for e in examples]
    if "{}" not in options.question:
        raise UserError("“--question” must hold {} where the object goes: “Is there {} here?”.")
    pictures = set(usable(examples[: options.limit]))
    asked = [i for i, e in enumerate(examples) if e in pictures]
    probes = make_probes(objects.names, mentions, asked, options.per_picture)
    if not probes:
        raise UserError("The captions name no object of the list: give another by “--objects”.")
    engine = Engine(start.open_model(options))
    said = answer_probes(engine, examples, probes, options)
    engine.close()
    by_way = {way: [p for p in probes if p.way == way] for way in WAYS}
    result = {
        "model": engine.model.config.name,
        "n": len({p.picture for p in probes}),
        "pictures_without_objects": len(asked) - len({p.picture for p in probes}),
        "question": options.question,
        "questions_asked": len(said),
        "read": {way: read_scores(of, said) for way, of in by_way.items()},
        "likelihood": {way: likelihood_scores(of, said) for way, of in by_way.items()},
    }
    lines = [
        {"key": examples[picture].key, "object": name, "answer": answer.text}
        | {"there": name in mentions[picture].present, "log_odds": round(answer.log_odds, 4)}
        for (picture, name), answer in said.items()
    ]
    report.write_lines(options.answers, lines)
    return result, as_text(result)


def make_probes(
    names: Sequence[str],
    mentions: Sequence[Mentions],
    pictures: Iterable[int],
    per_picture: int = 3,
) -> list[Probe]:
    """For each picture and way, as many objects that are there as that are not.

    Frequencies are those of all `mentions`; objects that no picture has are not asked about. What
    is drawn depends on the picture's number alone.
    """
    frequency = Counter(name for m in mentions for name in m.present)
    beside = Counter(
        (a, b) for m in mentions for a in m.present for b in m.present | m.unclear if a != b
    )
    known = [name for name in names if frequency[name]]
    probes = []
    for picture in pictures:
        draw = random.Random(f"{SEED} {picture}")
        found = mentions[picture]
        absent = [n for n in known if n not in found.present and n not in found.unclear]
        present = sorted(found.present)
        count = min(per_picture, len(present), len(absent))
        present = draw.sample(present, count)
        for way in WAYS:
            draw.shuffle(absent)  # what is equally frequent is drawn
            if way == "popular":
                absent.sort(key=lambda name: -frequency[name])
            elif way == "adversarial":
                absent.sort(key=lambda name: -sum(beside[own, name] for own in found.present))
            probes += [Probe(way, picture, name, True) for name in present]
            probes += [Probe(way, picture, name, False) for name in absent[:count]]
    return probes


def answer_probes(
    engine: Engine,
    examples: Sequence[Example],
    probes: Sequence[Probe],
    options: argparse.Namespace,
) -> dict[tuple[int, str], Said]:
    """(picture, object) -> what was said; a question of several ways is asked once."""
    asked = sorted({(p.picture, p.object) for p in probes})
    said = ask_all(engine, examples, asked, options.question, options.batch_size)
    return dict(zip(asked, tqdm(said, total=len(asked), desc="asking"), strict=True))


def ask_all(
    engine: Engine,
    examples: Sequence[Example],
    asked: Iterable[tuple[int, str]],
    question: str,
    together: int,
) -> Iterator[Said]:
    """What is said to each (picture, object), in order."""
    template, tokenizer = engine.model.config.template, engine.model.tokenizer
    yes, no = beginnings(tokenizer)
    sampling = greedy(TOKENS)

    def finished(stream) -> Said:
        ids = [token for token in stream if token not in stops]
        first, second = stream.watched[: len(yes)], stream.watched[len(yes) :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for end in template.stop:
            text = text.split(end)[0]
        return Said(text.strip(), _log_sum(first) - _log_sum(second))

    stops, streams = stop_ids(template, tokenizer), deque()
    together = min(together, engine.max_waiting)
    for picture, name in asked:
        conversation = Conversation()
        loaded = image.load(examples[picture].read())
        conversation.add_question(question.replace("{}", name), [loaded])
        prompt, _ = fit(conversation, engine, TOKENS)
        request = Request(
            prompt,
            conversation.pictures,
            sampling,
            stops,
            penalized=penalized(prompt, template),
            watched=(*yes, *no),
        )
        streams.append(engine.submit(request))
        if len(streams) == together:
            yield finished(streams.popleft())
    while streams:
        yield finished(streams.popleft())


def beginnings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """First tokens of “yes” and of “no”, in all spellings; those of both are left out."""

    def firsts(word: str) -> set[int]:
        forms = (word, word.capitalize(), word.upper())
        return {encode_text(tokenizer, space + w)[0] for w in forms for space in ("", " ")}

    yes, no = firsts("yes"), firsts("no")
    return sorted(yes - no), sorted(no - yes)


def _log_sum(logprobs: Sequence[float]) -> float:
    """The log-probability of any of these."""
    highest = max(logprobs)
    return highest + math.log(sum(math.exp(x - highest) for x in logprobs))


def read_scores(probes: Sequence[Probe], said: dict[tuple[int, str], Said]) -> Scores:
    """Scores of the answers as they are read."""
    return scores([(p.there, said[p.picture, p.object].read) for p in probes])


def likelihood_scores(probes: Sequence[Probe], said: dict[tuple[int, str], Said]) -> Scores:
    """Scores of the likelier of “Yes” and “No”, and the area under the ROC curve."""
    odds = [(p.there, said[p.picture, p.object].log_odds) for p in probes]
    return scores([(there, value > 0) for there, value in odds]) | {"auc": auc(odds)}


def scores(pairs: Sequence[tuple[bool, bool | None]]) -> Scores:
    """Of (truth, what was said; None: neither): all are fractions of 1, "yes" is the positive.

    `accuracy_interval`: the two ends of the 95 % confidence interval.
    """
    right = sum(there == answer for there, answer in pairs)
    hits = sum(there and answer is True for there, answer in pairs)
    positives, yes = sum(there for there, _ in pairs), sum(a is True for _, a in pairs)
    precision = hits / yes if yes else 0.0
    recall = hits / positives if positives else 0.0
    return {
        "accuracy": right / len(pairs),
        "accuracy_interval": list(report.interval(right, len(pairs))),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_rate": yes / len(pairs),
        "neither": sum(a is None for _, a in pairs) / len(pairs),
        "questions": len(pairs),
    }


def auc(odds: Sequence[tuple[bool, float]]) -> float:
    """The share of (there, not there) pairs that the log-odds put in order; ties count half."""
    there = [value for truth, value in odds if truth]
    absent = [value for truth, value in odds if not truth]
    if not there or not absent:
        return 0.5
    won = sum((a > b) + 0.5 * (a == b) for a in there for b in absent)
    return won / (len(there) * len(absent))


def as_text(result: dict) -> str:
    """Two tables: the answers as read, and by likelihood."""
    shown = ("accuracy", "precision", "recall", "f1", "yes_rate")
    parts = [
        f"{result['n']} pictures, {result['questions_asked']} different questions, "
        f"“{result['question'].replace('{}', 'a dog')}”"
    ]
    for reading, more, title in (
        ("read", "neither", "The first “yes” or “no” of the greedy answer:"),
        ("likelihood", "auc", "Whichever of “Yes” and “No” is the likelier beginning:"),
    ):
        rows = []
        for way, found in result[reading].items():
            accuracy, *others = (f"{100 * found[k]:.1f}" for k in (*shown, more))
            accuracy = report.with_interval(accuracy, found["accuracy_interval"])
            rows.append([way, accuracy, *others, found["questions"]])
        means = [
            sum(found[k] for found in result[reading].values()) / len(WAYS) for k in (*shown, more)
        ]
        rows.append(["mean", *(f"{100 * m:.1f}" for m in means), ""])
        header = ["objects that are not there", "accuracy (95 % interval)"]
        header += ["precision", "recall", "F1", "“yes”"]
        parts.append(title)
        parts.append(report.table([*header, "AUC" if more == "auc" else more, "questions"], rows))
    return "\n\n".join(parts) + "\n\nAll but the number of questions in percent."
