"""`--experiment stages`: does the second stage remove the failures of the first one's answers?

The paper claims that a model aligned on short captions fails in a third of its detailed
descriptions and poems, by repetition, fragments or irrelevant text, and hardly ever after the
second stage. Here the projections of both stages answer the same two requests about the same
pictures. An answer fails by rule: `metrics.is_repetitive` or `meaning.stutters`,
`metrics.is_fragment`, or `meaning.is_meaningless`. tests/labelled_texts.jsonl measures how well
these rules agree with a reader. They do not ask whether an answer is true, or whether a poem really
is one. A model that answers every request with a caption breaks none of them, so the share of
answers with a single sentence is reported, too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt4 import start
from minigpt4.batch import Batch, Completion, greedy
from minigpt4.data.datasets import read_captioned
from minigpt4.data.examples import Example, usable
from minigpt4.data.outputs import write_lines
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.meaning import failures
from minigpt4.evaluation.metrics import sentences
from minigpt4.weights.sources import WEIGHTS

POEM = "Write a short poem about this image."
TOKENS = 200  # longest answer
SHOWN = 4  # pictures whose answers are in the report


# Stage -> request -> key of the picture -> answer
Answers = dict[str, dict[str, dict[str, Completion]]]


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(rates by stage and request, their table and examples)."""
    files = {"stage 1": first_stage(options), "stage 2": options.projection}
    examples = usable(read_captioned(options.shard, options.limit))
    answers: Answers = {}
    for stage, projection in files.items():
        chosen = argparse.Namespace(**vars(options) | {"projection": projection})
        with Batch(Engine(start.open_model(chosen)), options.batch_size) as batch:
            config = batch.engine.model.config
            requests = {"description": config.detail_instruction, "poem": POEM}
            answers[stage] = answer_requests(batch, examples, requests, options)
    keys = complete_keys(examples, answers)
    result = {
        "model": config.name,
        "n": len(keys),
        "requests": requests,
        "drawn": options.drawn,
        "rates": {
            stage: {kind: rates([found[key] for key in keys]) for kind, found in kinds.items()}
            for stage, kinds in answers.items()
        },
    }
    write_lines(options.answers, records(keys, answers))
    return result, as_text(result, keys, answers)


def complete_keys(examples: Sequence[Example], answers: Answers) -> list[str]:
    """The keys of the pictures with an answer of each stage to each request."""
    found = [of.keys() for kinds in answers.values() for of in kinds.values()]
    return [e.key for e in examples if all(e.key in keys for keys in found)]


def first_stage(options: argparse.Namespace) -> str:
    """The file of the first stage's projection. UserError if there is none."""
    path = options.stage1 or WEIGHTS / f"{options.model}-stage1.safetensors"
    if not Path(path).is_file():
        named = options.stage1
        raise UserError(
            f"There is no projection file {named}: check the path."
            if named
            else f"Name the first stage's projection of {options.model} by “--stage1 FILE”."
        )
    return str(path)


def answer_requests(
    batch: Batch, examples: Sequence[Example], requests: dict[str, str], options: argparse.Namespace
) -> dict[str, dict[str, Completion]]:
    """Request -> key of the picture -> answer."""
    sampling = greedy(TOKENS)
    if options.drawn:
        drawn = {"max_new_tokens": TOKENS, "seed": options.seed}
        sampling = start.default_sampling(batch.engine.model.config, **drawn)
    return {
        kind: batch.ask_each(examples, request, sampling, kind)
        for kind, request in requests.items()
    }


def rates(answers: Sequence[Completion]) -> dict[str, float | int | list[float]]:
    """The shares of answers that fail, in all and in each way, and their mean length in words."""
    found = [failures(a.text, a.truncated) for a in answers]
    count = len(found)
    failed = sum(f.any for f in found)
    return {
        "failed": failed / count,
        "failed_interval": list(report.interval(failed, count)),
        "repetition": sum(f.repetition for f in found) / count,
        "fragment": sum(f.fragment for f in found) / count,
        "meaningless": sum(f.meaningless for f in found) / count,
        "one_sentence": sum(len(sentences(a.text)) < 2 for a in answers) / count,
        "words": sum(len(a.text.split()) for a in answers) / count,
    }


def records(keys: Sequence[str], answers: Answers) -> list[dict]:
    """Every answer, with its failures."""
    return [
        {"stage": stage, "request": kind, "key": key, "answer": of[key].text}
        | {"truncated": of[key].truncated, **vars(failures(of[key].text, of[key].truncated))}
        for stage, kinds in answers.items()
        for kind, of in kinds.items()
        for key in keys
    ]


def as_text(result: dict, keys: Sequence[str], answers: Answers) -> str:
    """The table of rates, then some answers side by side."""
    rows = []
    for kind in result["requests"]:
        for stage, found in result["rates"].items():
            rate = found[kind]
            failed = report.with_interval(report.percent(rate["failed"]), rate["failed_interval"])
            rows.append(
                [kind, stage, failed]
                + [report.percent(rate[k]) for k in ("repetition", "fragment", "meaningless")]
                + [report.percent(rate["one_sentence"]), f"{rate['words']:.1f}"]
            )
    how = "drawn as in the chat" if result["drawn"] else "greedy"
    header = ["request", "projection", "failed (95 % interval)", "repetition", "fragment"]
    header += ["without meaning", "one sentence", "words"]
    text = f"{report.pictures(result['n'])}, {how}, at most {TOKENS} tokens\n\n"
    text += report.table(header, rows)
    shown = []
    for key in keys[:SHOWN]:
        for kind in result["requests"]:
            shown.append([key, kind, *(_marked(kinds[kind][key]) for kinds in answers.values())])
    header = ["picture", "request", *answers]
    return f"{text}\n\nSide by side, the first pictures:\n\n{report.table(header, shown)}"


def _marked(answer: Completion) -> str:
    """An answer, shortened, and its failures."""
    named = [name for name, fails in vars(failures(answer.text, answer.truncated)).items() if fails]
    return report.beginning(answer.text, 300) + (f" ({', '.join(named)})" if named else "")
