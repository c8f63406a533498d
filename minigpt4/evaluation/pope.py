"""`--experiment pope`: does the model see what is there, and only that?

Polling-based Object Probing Evaluation (Li et al., 2023), made from any captioned set. “Is there a
dog in the image?” is asked about objects that a picture's captions name, and about as many that
they do not name. The latter are chosen in three ways: at random; the most frequent objects of the
set (popular); those that most often occur together with the picture's own (adversarial).
objects.txt says which words name an object, and which leave it open: then it is not asked about.
Captions do not mention everything, so some expected “no” are wrong, fewer with five captions per
picture than with one.

Each answer is read in two ways, which are reported separately:

- *read*: the first “yes” or “no” of the greedy answer. An answer with neither is wrong, and does
  not count as “yes”.
- *likelihood*: which of “Yes” and “No” (in any spelling of one token) is the more likely first
  token, whatever the answer says. `auc` is the chance that a present object has higher log-odds
  than an absent one: 0.5 for blind guesses, however strongly the model prefers “yes”.
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minigpt4 import start
from minigpt4.batch import Batch, PictureQuestion, greedy
from minigpt4.data.datasets import read_references
from minigpt4.data.examples import Example, usable
from minigpt4.data.outputs import write_lines
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.metrics import auc
from minigpt4.evaluation.objects import NONE_NAMED, Mentions, ObjectList
from minigpt4.model.prompt import Tokenizer, encode_text

TOKENS = 24  # longest answer
WAYS = ("random", "popular", "adversarial")
SEED = 42

Scores = dict[str, float | int | list[float]]


@dataclass(frozen=True)
class PopeQuestion:
    """A question: is `object` in picture number `picture`? `there` is the truth."""

    way: str
    picture: int
    object: str
    there: bool


@dataclass(frozen=True)
class PopeAnswer:
    """The text of an answer, and the log-odds of “Yes” against “No” as its first token."""

    text: str
    log_odds: float

    @property
    def read(self) -> bool | None:
        """The first yes or no; None if there is neither."""
        found = re.search(r"\b(yes|no)\b", self.text, re.I)
        return None if found is None else found[1].lower() == "yes"


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(scores by reading and by choice of objects, their tables)."""
    if "{}" not in options.question:
        raise UserError("“--question” must contain {} for the object: “Is there {} here?”.")
    objects = ObjectList(options.objects)
    examples = read_references(options.shard)
    mentions = [objects.mentioned(e.captions) for e in examples]
    pictures = set(usable(examples[: options.limit]))
    asked = [i for i, e in enumerate(examples) if e in pictures]
    questions = make_questions(objects.names, mentions, asked, options.per_picture)
    if not questions:
        raise UserError(NONE_NAMED)
    with Batch(Engine(start.open_model(options)), options.batch_size) as batch:
        model = batch.engine.model.config.name
        pairs = sorted({(p.picture, p.object) for p in questions})  # each once, in whatever way
        said = dict(ask_all(batch, examples, pairs, options.question))
    questions = [p for p in questions if (p.picture, p.object) in said]
    by_way = {
        way: [(p.there, said[p.picture, p.object]) for p in questions if p.way == way]
        for way in WAYS
    }
    odds = {way: [(there, a.log_odds) for there, a in found] for way, found in by_way.items()}
    result = {
        "model": model,
        "n": len({p.picture for p in questions}),
        "pictures_without_objects": len(asked) - len({p.picture for p in questions}),
        "question": options.question,
        "questions_asked": len(said),
        "read": {
            way: scores([(there, answer.read) for there, answer in found])
            for way, found in by_way.items()
        },
        "likelihood": {
            way: scores([(there, value > 0) for there, value in found]) | {"auc": auc(found)}
            for way, found in odds.items()
        },
    }
    lines = [
        {"key": examples[picture].key, "object": name, "answer": answer.text}
        | {"there": name in mentions[picture].present, "log_odds": round(answer.log_odds, 4)}
        for (picture, name), answer in said.items()
    ]
    write_lines(options.answers, lines)
    return result, as_text(result)


def make_questions(
    names: Sequence[str],
    mentions: Sequence[Mentions],
    pictures: Iterable[int],
    per_picture: int = 3,
) -> list[PopeQuestion]:
    """For each picture and way, as many objects that are there as objects that are not.

    Frequencies are those of all `mentions`; objects that no picture has are not asked about. The
    random choice depends only on the number of the picture.
    """
    frequency = Counter(name for m in mentions for name in m.present)
    beside = Counter(
        (a, b) for m in mentions for a in m.present for b in m.present | m.unclear if a != b
    )
    known = [name for name in names if frequency[name]]
    questions = []
    for picture in pictures:
        draw = random.Random(f"{SEED} {picture}")
        found = mentions[picture]
        absent = [n for n in known if n not in found.present and n not in found.unclear]
        present = sorted(found.present)
        count = min(per_picture, len(present), len(absent))
        present = draw.sample(present, count)
        for way in WAYS:
            draw.shuffle(absent)  # equally frequent objects come in random order
            if way == "popular":
                absent.sort(key=lambda name: -frequency[name])
            elif way == "adversarial":
                absent.sort(key=lambda name: -sum(beside[own, name] for own in found.present))
            questions += [PopeQuestion(way, picture, name, True) for name in present]
            questions += [PopeQuestion(way, picture, name, False) for name in absent[:count]]
    return questions


def ask_all(
    batch: Batch, examples: Sequence[Example], asked: Iterable[tuple[int, str]], question: str
) -> Iterator[tuple[tuple[int, str], PopeAnswer]]:
    """(picture, object) and the answer to it, in order."""
    yes, no = beginnings(batch.engine.model.tokenizer)
    questions = {
        PictureQuestion(examples[i].key, question.replace("{}", name), examples[i].read): (i, name)
        for i, name in asked
    }
    for answered, found in batch.answer(list(questions), greedy(TOKENS), (*yes, *no), "asking"):
        first, second = found.watched[: len(yes)], found.watched[len(yes) :]
        log_odds = float(np.logaddexp.reduce(first) - np.logaddexp.reduce(second))
        yield questions[answered], PopeAnswer(found.text, log_odds)


def beginnings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The first tokens of “yes” and of “no” in all spellings, without those they share."""

    def firsts(word: str) -> set[int]:
        forms = (word, word.capitalize(), word.upper())
        return {encode_text(tokenizer, space + w)[0] for w in forms for space in ("", " ")}

    yes, no = firsts("yes"), firsts("no")
    return sorted(yes - no), sorted(no - yes)


def scores(pairs: Sequence[tuple[bool, bool | None]]) -> Scores:
    """Scores of (truth, answer) pairs, from 0 to 1; an answer of None is neither yes nor no.

    `accuracy_interval`: the ends of the 95 % confidence interval.
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


def as_text(result: dict) -> str:
    """Two tables: answers as read, and by likelihood."""
    shown = ("accuracy", "precision", "recall", "f1", "yes_rate")
    parts = [
        f"{report.pictures(result['n'])}, {result['questions_asked']} different questions, "
        f"“{result['question'].replace('{}', 'a dog')}”"
    ]
    for reading, more, title in (
        ("read", "neither", "The first “yes” or “no” of the greedy answer:"),
        ("likelihood", "auc", "Whichever of “Yes” and “No” is the more likely first token:"),
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
