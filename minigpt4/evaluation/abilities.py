"""`--experiment abilities`: does the model do what the paper shows, task by task?

A suite is a folder with suite.jsonl (`id`, `task`, `image`, `instruction`, and perhaps `about`) and
its pictures; the project's own lies in `suite/`. The model answers every request, greedily or as
the chat draws. Whether an answer fulfils its request, and how well, is said by a judge (`judge`,
with the criteria of prompts/rubric.txt), by people (`review`: a page to judge on), or by both.
Another model's answers can be judged beside.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minigpt4 import start
from minigpt4.config import get_model
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.asking import Question, answer_all, greedy
from minigpt4.evaluation.judge import Case, Judge, Verdict
from minigpt4.evaluation.metrics import is_fragment, is_repetitive
from minigpt4.evaluation.review import read_ratings, write_page
from minigpt4.evaluation.suite import SUITE, Item, read_suite

TOKENS = 300  # longest answer
SHOWN = 260  # characters of an answer in the report


@dataclass(frozen=True)
class Answered:
    """A model's answer to an item; `truncated`: the length limit ended it."""

    text: str
    truncated: bool = False


# (model, item's id) -> what is found
Verdicts = Mapping[tuple[str, str], Verdict | None]


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(scores by task and model, their table and the answers)."""
    folder = Path(options.shard or SUITE)
    items = read_suite(folder)[: options.limit]
    if options.judge and not options.judge_model:
        raise UserError("Name the model that judges by “--judge-model”.")
    others = {}
    for given in options.beside:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise UserError(f"“--beside {given}” must be NAME=FILE, as in minigpt-4=theirs.jsonl.")
        if name in others:
            raise UserError(f"“--beside {given}”: {name} is named already, give another name.")
        others[name] = read_answers(path)
    own: Mapping[str, Answered] | Iterator[tuple[str, Answered]]
    if options.reuse:
        model, sampling, own = stored_answers(options)
    else:
        engine = Engine(start.open_model(options))
        model, sampling = engine.model.config.name, "as in the chat" if options.drawn else "greedy"
        own = answer_items(engine, items, options, sampling)
    if model in others:
        raise UserError(f"“--beside {model}=…” names the model itself: give another name.")
    models = {model: dict(own), **others}
    for name, answers in models.items():
        if not any(item.id in answers for item in items):
            raise UserError(f"The answers of {name} are to other requests: none has an id of ours.")
    cases = [
        ((name, item.id), Case(item.task, item.instruction, item.about, item.picture, answer.text))
        for name, answers in models.items()
        for item in items
        if (answer := answers.get(item.id)) is not None
    ]
    judged: Verdicts = {}
    if options.judge:
        judge = Judge(options.judge, options.judge_model, options.judge_blind)
        start.say(f"{len(cases)} answers are judged by {options.judge_model} …")
        found = judge.judge([case for _, case in cases], options.verdicts)
        judged = {key: verdict for (key, _), verdict in zip(cases, found, strict=True)}
        if lost := found.count(None):
            start.say(f"{lost} of {len(found)} verdicts never came, or were none.")
    rated = read_ratings(options.ratings, {key: case.answer for key, case in cases})
    if options.review:
        write_page(options.review, items, {n: {i: a.text for i, a in f.items()} for n, f in
                                           models.items()})  # fmt: skip
    tasks = list(dict.fromkeys(item.task for item in items))
    result = {
        "model": model,
        "n": len(items),
        "suite": "the project's own" if folder == SUITE else folder.name,
        "sampling": sampling,
        "judge": options.judge_model if options.judge else None,
        "scores": {
            name: {
                task: task_scores(name, answers, items, task, judged, rated)
                for task in [*tasks, "all"]
            }
            for name, answers in models.items()
        },
        "verdicts": [
            {"model": name, "id": key, **(vars(verdict) if verdict else {"fulfilled": None})}
            for (name, key), verdict in judged.items()
        ],
    }
    return result, as_text(result, items, models, judged)


def read_answers(path: str) -> dict[str, Answered]:
    """Item's id -> answer, from a file as `--answers` writes it."""
    return _by_id(report.read_lines(path, "id", "answer"))


def _by_id(records: Iterable[dict]) -> dict[str, Answered]:
    return {str(r["id"]): Answered(str(r["answer"]), r.get("truncated") is True) for r in records}


def stored_answers(options: argparse.Namespace) -> tuple[str, str | None, dict[str, Answered]]:
    """(the model's name, how its answers were sampled, they by item's id), as `--answers` says.

    A file that does not say the one is taken to be of `--model`; the other is then None.
    """
    if not options.answers:
        raise UserError("“--reuse” takes the answers of a file: name it by “--answers”.")
    records = report.read_lines(options.answers, "id", "answer")
    said = {}
    for field in ("model", "sampling"):
        values = sorted({str(r[field]) for r in records if field in r})
        if len(values) > 1:
            raise UserError(
                f"{options.answers} has more than one “{field}” ({', '.join(values)}): keep the "
                "lines of one."
            )
        said[field] = values[0] if values else None
    return said["model"] or get_model(options.model).name, said["sampling"], _by_id(records)


def answer_items(
    engine: Engine, items: Sequence[Item], options: argparse.Namespace, sampled: str
) -> Iterator[tuple[str, Answered]]:
    """(item's id, answer) of each; it is stored as soon as it is there.

    sampled: how, in words, to be stored with it. The engine is closed after the last.
    """
    config = engine.model.config
    sampling = greedy(TOKENS)
    if options.drawn:
        drawn = {"max_new_tokens": TOKENS, "seed": options.seed}
        sampling = start.default_sampling(config, **drawn)
    questions = [Question(i.id, i.instruction, lambda p=i.picture: p) for i in items]
    found = answer_all(engine, questions, sampling, options.batch_size)
    with open(options.answers or os.devnull, "w", encoding="utf-8") as file:
        for item, reply in zip(
            items, tqdm(found, desc="answering", total=len(items), unit="answer"), strict=True
        ):
            record = {"id": item.id, "task": item.task, "instruction": item.instruction}
            record |= {"model": config.name, "sampling": sampled}
            record |= {"answer": reply.text, "truncated": reply.truncated}
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            yield item.id, Answered(reply.text, reply.truncated)
    engine.close()


def task_scores(
    model: str,
    answers: Mapping[str, Answered],
    items: Sequence[Item],
    task: str,
    judged: Verdicts,
    rated: Mapping[tuple[str, str], Sequence[Verdict]],
) -> dict[str, float | int | None]:
    """One model's scores at one task ("all": at every one); None where there is nothing to go by.

    `rated`: what people said, perhaps several of one answer.
    """
    ids = [i.id for i in items if task in (i.task, "all") and i.id in answers]
    found = [answers[i] for i in ids]
    verdicts = [v for i in ids if (v := judged.get((model, i)))]
    people = [v for i in ids for v in rated.get((model, i), ())]
    both = [
        v.fulfilled == judged[model, i].fulfilled
        for i in ids
        if judged.get((model, i))
        for v in rated.get((model, i), ())
    ]
    return {
        "answers": len(ids),
        "fulfilled": _mean([v.fulfilled for v in verdicts]),
        "score": _mean([v.score for v in verdicts if v.score is not None]),
        "judged": len(verdicts),
        "fulfilled_people": _mean([v.fulfilled for v in people]),
        "rated": len(people),
        "judge_agrees_with_people": _mean(both),
        "repetition": _mean([is_repetitive(a.text) for a in found]),
        "fragment": _mean([is_fragment(a.text, a.truncated) for a in found]),
        "words": _mean([len(a.text.split()) for a in found]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def as_text(
    result: dict,
    items: Sequence[Item],
    models: Mapping[str, Mapping[str, Answered]],
    judged: Verdicts,
) -> str:
    """The table of scores, and each task's first answer."""
    overall = [tasks["all"] for tasks in result["scores"].values()]
    judged_at_all = any(s["judged"] for s in overall)
    rated_at_all = any(s["rated"] for s in overall)
    header = ["task", "model", "answers"]
    header += ["fulfilled (judge)", "score, 1–5", "judged"] if judged_at_all else []
    header += ["fulfilled (people)", "ratings"] if rated_at_all else []
    header += ["repetition", "fragment", "words"]
    rows = []
    for task in result["scores"][result["model"]]:
        for model, tasks in result["scores"].items():
            s = tasks[task]
            row = [task, model, s["answers"]]
            if judged_at_all:
                score = None if s["score"] is None else f"{s['score']:.1f}"
                row += [report.percent(s["fulfilled"]), score, s["judged"]]
            if rated_at_all:
                row += [report.percent(s["fulfilled_people"]), s["rated"]]
            words = None if s["words"] is None else f"{s['words']:.0f}"
            rows.append([*row, *map(report.percent, (s["repetition"], s["fragment"])), words])
    judge = f"judged by {result['judge']}" if result["judge"] else "not judged by a model"
    sampling = result["sampling"] or "sampling not recorded"
    text = f"{result['n']} requests of {result['suite']} suite, {sampling}, {judge}\n\n"
    text += report.table(header, rows)
    first = {item.task: item for item in reversed(items)}
    shown = []
    for item in sorted(first.values(), key=items.index):
        for model, answers in models.items():
            if item.id in answers:
                verdict = judged.get((model, item.id))
                said = None if verdict is None else "yes" if verdict.fulfilled else "no"
                answer = report.shortened(answers[item.id].text, SHOWN)
                row = [item.about or item.id, item.instruction, model, answer]
                shown.append([*row, said] if judged_at_all else row)
    header = ["picture", "request", "model", "answer"]
    header += ["fulfilled (judge)"] if judged_at_all else []
    return f"{text}\n\nThe first answer to each task:\n\n{report.table(header, shown)}"
