"""`--experiment chair`: how many of the objects that a description names are not in the picture?

Caption Hallucination Assessment with Image Relevance (Rohrbach et al., 2018), from any captioned
set: an object is in a picture if one of its captions names it. objects.txt says which words name an
object. If the captions leave it open, as “animal” does for a dog, the object does not count.

- CHAIR_i: the share of named objects that are not there, each once per description;
- CHAIR_s: the share of descriptions that name at least one such object;
- recall: the share of the pictures' objects that the descriptions name.

The paper also takes COCO's object labels for what is there. Captions do not mention everything, so
without these labels the rates are too high; compare models on the same data only.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minigpt4 import start
from minigpt4.batch import Batch, greedy
from minigpt4.data.datasets import read_references
from minigpt4.data.examples import Example, usable
from minigpt4.data.outputs import write_lines
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.objects import NONE_NAMED, Mentions, ObjectList

TOKENS = 200  # longest description
SHOWN = 10  # objects in the table


@dataclass(frozen=True)
class Judged:
    """A description's objects: named and in the picture (right), named but not in it (wrong), and
    in it but not named (missed)."""

    right: frozenset[str]
    wrong: frozenset[str]
    missed: frozenset[str]


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(rates, their table)."""
    objects = ObjectList(options.objects)
    examples = usable(read_references(options.shard, options.limit))
    if not any(objects.mentioned(e.captions).present for e in examples):  # all would be wrong
        raise UserError(NONE_NAMED)
    with Batch(Engine(start.open_model(options)), options.batch_size) as batch:
        config = batch.engine.model.config
        sampling = greedy(TOKENS)
        found = batch.ask_each(examples, config.detail_instruction, sampling, "describing")
    answers = {key: completion.text for key, completion in found.items()}
    answered = [e for e in examples if e.key in answers]
    judged = [judge(objects, e, answers[e.key]) for e in answered]
    result = {"model": config.name, "instruction": config.detail_instruction} | rates(judged)
    lines = [
        {"key": e.key, "answer": answers[e.key]}
        | {name: sorted(names) for name, names in vars(one).items()}
        for e, one in zip(answered, judged, strict=True)
    ]
    write_lines(options.answers, lines)
    return result, as_text(result)


def judge(objects: ObjectList, example: Example, answer: str) -> Judged:
    """Compare what a description and the captions of a picture name."""
    there: Mentions = objects.mentioned(example.captions)
    named = objects.mentioned([answer]).present
    return Judged(
        named & there.present, named - there.present - there.unclear, there.present - named
    )


def rates(judged: Sequence[Judged]) -> dict:
    """CHAIR_i, CHAIR_s and recall, with 95 % intervals, and the objects most often wrong.

    UserError if the descriptions name no object of the list.
    """
    right, wrong, missed = (
        sum(len(names) for names in column)
        for column in zip(*((j.right, j.wrong, j.missed) for j in judged), strict=True)
    )
    if not right + wrong:
        raise UserError("The answers name no object of the list: use another with “--objects”.")
    hallucinating = sum(bool(j.wrong) for j in judged)
    return {
        "n": len(judged),
        "objects_named": right + wrong,
        "chair_i": wrong / (right + wrong),
        "chair_i_interval": list(report.interval(wrong, right + wrong)),
        "chair_s": hallucinating / len(judged),
        "chair_s_interval": list(report.interval(hallucinating, len(judged))),
        "recall": right / max(1, right + missed),
        "recall_interval": list(report.interval(right, max(1, right + missed))),
        "most_often_wrong": dict(Counter(n for j in judged for n in j.wrong).most_common(SHOWN)),
    }


def as_text(result: dict) -> str:
    """The tables of a result."""
    rows = [
        [title, report.with_interval(report.percent(result[n]), result[f"{n}_interval"])]
        for n, title in (("chair_i", "CHAIR_i"), ("chair_s", "CHAIR_s"), ("recall", "recall"))
    ]
    text = f"“{result['instruction']}”, greedy, {report.pictures(result['n'])}, "
    text += f"{result['objects_named']} objects named\n\n"
    text += report.table(["rate", "value (95 % interval)"], rows)
    often = [[name, str(count)] for name, count in result["most_often_wrong"].items()]
    return text + ("\n\n" + report.table(["not there", "pictures"], often) if often else "")
