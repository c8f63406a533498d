"""`--experiment abilities`: can the model do what the paper shows, task by task?

A suite is a folder with suite.jsonl (`id`, `task`, `image`, `instruction`, and optionally `about`)
and its pictures; the project's own is `suite/`. The model answers every request, greedily or
sampled as in the chat. Whether an answer fulfils its request, and how well, is decided by a judge
(`judge`, with the criteria of prompts/rubric.txt), by people (`rating_page`), or by both. Answers
of other models can be judged, too.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from minigpt4 import start
from minigpt4.batch import Batch, Completion, PictureQuestion, greedy
from minigpt4.config import get_model
from minigpt4.data.files import naming, read_jsonl
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.judge import Case, Judge, Verdict
from minigpt4.evaluation.metrics import is_fragment, is_repetitive
from minigpt4.evaluation.rating_page import read_ratings, write_page
from minigpt4.evaluation.suite import SUITE, Item, read_suite
from minigpt4.remote.endpoint import encodable

TOKENS = 300  # of the longest answer
SHOWN = 260  # characters of an answer in the report


Answers = Mapping[str, Completion]  # by item's id
Verdicts = Mapping[tuple[str, str], Verdict | None]  # by model and item's id


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(scores by task and model, their table and the answers)."""
    folder = Path(options.shard or SUITE)
    items = read_suite(folder)[: options.limit]
    if options.judge and not options.judge_model:
        raise UserError("Name the model that judges with “--judge-model”.")
    others = read_others(options.beside)
    model, sampling, own = own_answers(options, items, others)
    models = {model: own, **others}
    for name, answers in models.items():
        if not any(item.id in answers for item in items):
            raise UserError(f"The answers of {name} have none of the suite's ids.")
    cases = {
        (name, item.id): Case(
            item.task, item.instruction, item.about, item.picture, answers[item.id].text
        )
        for name, answers in models.items()
        for item in items
        if item.id in answers
    }
    judged = judge_all(cases, options) if options.judge else {}
    rated = read_ratings(options.ratings, {key: case.answer for key, case in cases.items()})
    if options.review:
        write_page(options.review, items, models)
    tasks = [*dict.fromkeys(item.task for item in items), "all"]
    result = {
        "model": model,
        "n": len(items),
        "suite": "the project's own" if folder == SUITE else folder.name,
        "sampling": sampling,
        "judge": options.judge_model if options.judge else None,
        "scores": {
            name: {task: task_scores(name, answers, items, task, judged, rated) for task in tasks}
            for name, answers in models.items()
        },
        "verdicts": [
            {"model": name, "id": key, **(vars(verdict) if verdict else {"fulfilled": None})}
            for (name, key), verdict in judged.items()
        ],
    }
    return result, as_text(result, items, models, judged)


def read_others(given: Sequence[str]) -> dict[str, Answers]:
    """Model -> its answers, from the values of `--beside`: NAME=FILE."""
    others: dict[str, Answers] = {}
    for value in given:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise UserError(f"“--beside {value}” must be NAME=FILE, as in minigpt-4=theirs.jsonl.")
        if name in others:
            raise UserError(f"“--beside {value}”: {name} is used already, choose another name.")
        others[name] = _by_id(read_jsonl(path, "id", "answer"))
    return others


def own_answers(
    options: argparse.Namespace, items: Sequence[Item], others: Mapping[str, Answers]
) -> tuple[str, str | None, Answers]:
    """(the model's name, how its answers were sampled, its answers), stored or new."""
    if options.reuse:
        model, sampling, own = stored_answers(options)
        _check_name(model, others)
        return model, sampling, own
    with Batch(Engine(start.open_model(options)), options.batch_size) as batch:
        model = batch.engine.model.config.name
        _check_name(model, others)
        sampling = "as in the chat" if options.drawn else "greedy"
        return model, sampling, dict(answer_items(batch, items, options, sampling))


def _check_name(model: str, others: Mapping[str, Answers]) -> None:
    if model in others:
        raise UserError(f"“--beside {model}=…” names the model itself: choose another name.")


def judge_all(cases: Mapping[tuple[str, str], Case], options: argparse.Namespace) -> Verdicts:
    """The verdict on each case, by the judge that the options name."""
    judge = Judge(options.judge, options.judge_model, options.judge_blind)
    start.say(f"{options.judge_model} judges {len(cases)} answers …")
    found = judge.judge(list(cases.values()), options.verdicts)
    if missing := found.count(None):
        start.say(f"{missing} of {len(found)} verdicts are missing or could not be read.")
    return dict(zip(cases, found, strict=True))


def _by_id(records: Iterable[dict]) -> dict[str, Completion]:
    """Item's id -> answer, from the records that `--answers` writes."""
    return {
        str(r["id"]): Completion(
            encodable(str(r["answer"])), "length" if r.get("truncated") is True else "stop"
        )
        for r in records
    }


def stored_answers(options: argparse.Namespace) -> tuple[str, str | None, dict[str, Completion]]:
    """(the model's name, how its answers were sampled, its answers), from the file of `--answers`.

    If the file does not name a model, it is `--model`. How they were sampled is None if the file
    does not say.
    """
    if not options.answers:
        raise UserError("“--reuse” reads answers from a file: name it with “--answers”.")
    records = read_jsonl(options.answers, "id", "answer")
    recorded = {}
    for field in ("model", "sampling"):
        values = sorted({str(r[field]) for r in records if field in r})
        if len(values) > 1:
            raise UserError(
                f"{options.answers} has more than one “{field}” ({', '.join(values)}): keep the "
                "lines of one."
            )
        recorded[field] = values[0] if values else None
    model = recorded["model"] or get_model(options.model).name
    return model, recorded["sampling"], _by_id(records)


def answer_items(
    batch: Batch, items: Sequence[Item], options: argparse.Namespace, sampled: str
) -> Iterator[tuple[str, Completion]]:
    """(item's id, answer) of each; every answer is written to a file as soon as it is complete.

    sampled: how the answers are sampled, in words.
    """
    config = batch.engine.model.config
    sampling: Sampling = greedy(TOKENS)
    if options.drawn:
        sampling = start.default_sampling(config, max_new_tokens=TOKENS, seed=options.seed)
    by_id = {item.id: item for item in items}
    with (
        naming(options.answers),
        open(options.answers or os.devnull, "w", encoding="utf-8") as file,
    ):
        for question, answer in batch.answer(list(map(_question, items)), sampling):
            item = by_id[question.key]
            record: dict[str, object] = {"id": item.id, "task": item.task}
            record |= {"instruction": item.instruction}
            record |= {"model": config.name, "sampling": sampled}
            record |= {"answer": answer.text, "truncated": answer.truncated}
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            yield item.id, answer


def _question(item: Item) -> PictureQuestion:
    return PictureQuestion(item.id, item.instruction, lambda: item.picture)


def task_scores(
    model: str,
    answers: Answers,
    items: Sequence[Item],
    task: str,
    judged: Verdicts,
    rated: Mapping[tuple[str, str], Sequence[Verdict]],
) -> dict[str, float | int | None]:
    """One model's scores in one task, or in "all". A score is None if nothing was judged.

    rated: the verdicts of people; there may be several on one answer.
    """
    ids = [i.id for i in items if task in (i.task, "all") and i.id in answers]
    found = [answers[i] for i in ids]
    verdicts = [v for i in ids if (v := judged.get((model, i)))]
    people = [v for i in ids for v in rated.get((model, i), ())]
    both = [
        v.fulfilled == verdict.fulfilled
        for i in ids
        if (verdict := judged.get((model, i)))
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
    result: dict, items: Sequence[Item], models: Mapping[str, Answers], judged: Verdicts
) -> str:
    """The table of scores, and the first answer to each task."""
    judge = f"judged by {result['judge']}" if result["judge"] else "not judged by a model"
    sampling = result["sampling"] or "sampling not recorded"
    text = f"{result['n']} requests of {result['suite']} suite, {sampling}, {judge}\n\n"
    text += _score_table(result)
    return f"{text}\n\nThe first answer to each task:\n\n{_first_answers(items, models, judged)}"


def _score_table(result: dict) -> str:
    overall = [tasks["all"] for tasks in result["scores"].values()]
    any_judged = any(s["judged"] for s in overall)
    any_rated = any(s["rated"] for s in overall)
    header = ["task", "model", "answers"]
    header += ["fulfilled (judge)", "score, 1–5", "judged"] if any_judged else []
    header += ["fulfilled (people)", "ratings"] if any_rated else []
    header += ["repetition", "fragment", "words"]
    rows = []
    for task in result["scores"][result["model"]]:
        for model, tasks in result["scores"].items():
            s = tasks[task]
            row = [task, model, s["answers"]]
            if any_judged:
                score = None if s["score"] is None else f"{s['score']:.1f}"
                row += [report.percent(s["fulfilled"]), score, s["judged"]]
            if any_rated:
                row += [report.percent(s["fulfilled_people"]), s["rated"]]
            words = None if s["words"] is None else f"{s['words']:.0f}"
            rows.append([*row, *map(report.percent, (s["repetition"], s["fragment"])), words])
    return report.table(header, rows)


def _first_answers(items: Sequence[Item], models: Mapping[str, Answers], judged: Verdicts) -> str:
    any_judged = any(judged.values())
    first = {item.task: item for item in reversed(items)}
    rows = []
    for item in sorted(first.values(), key=items.index):
        for model, answers in models.items():
            if item.id in answers:
                verdict = judged.get((model, item.id))
                fulfilled = None if verdict is None else "yes" if verdict.fulfilled else "no"
                answer = report.beginning(answers[item.id].text, SHOWN)
                row = [item.about or item.id, item.instruction, model, answer]
                rows.append([*row, fulfilled] if any_judged else row)
    header = ["picture", "request", "model", "answer"]
    header += ["fulfilled (judge)"] if any_judged else []
    return report.table(header, rows)
