"""Scores of captions, compared to those of people: `evaluate` without an experiment, and
`--experiment captions`."""

import argparse
import time

from minigpt4 import start
from minigpt4.batch import Batch, greedy
from minigpt4.data.datasets import read_references
from minigpt4.data.examples import usable
from minigpt4.data.outputs import write_lines
from minigpt4.engine import Engine
from minigpt4.evaluation import report
from minigpt4.evaluation.metrics import caption_scores, failure_rates

CAPTION_TOKENS, DETAIL_TOKENS = 40, 200  # longest answers
NAMES = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "cider": "CIDEr"}


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(scores, their table); of detailed descriptions with `--detail`."""
    scores, records = answer_and_score(options)
    write_lines(options.answers, records)
    rows = [[title, scores[name]] for name, title in NAMES.items()]
    rows += [
        ["repetition", report.percent(scores["repetition_rate"])],
        ["fragments", report.percent(scores["fragment_rate"])],
        ["words", f"{scores['words']:.1f}"],
    ]
    text = f"“{scores['instruction']}”, greedy, {report.pictures(scores['n'])}\n\n"
    return scores, text + report.table(["score", "value"], rows)


def answer_and_score(options: argparse.Namespace) -> tuple[dict, list[dict]]:
    """(scores of short captions, or of descriptions with `--detail`; every answer)."""
    read = read_references(options.shard, options.limit)
    examples = usable(read)
    with Batch(Engine(start.open_model(options)), options.batch_size) as batch:
        config = batch.engine.model.config
        instruction = config.detail_instruction if options.detail else config.short_instruction
        limit = DETAIL_TOKENS if options.detail else CAPTION_TOKENS
        started = time.perf_counter()
        completions = batch.ask_each(examples, instruction, greedy(limit))
        seconds = time.perf_counter() - started
    answers = {key: completion.text for key, completion in completions.items()}
    references = {e.key: list(e.captions) for e in examples if e.key in answers}
    scores: dict = {**caption_scores(answers, references)}
    if len(answers) == 1:
        start.say("CIDEr is 0 for a single picture: it compares the words of several.")
    scores |= failure_rates(answers.values(), (c.truncated for c in completions.values()))
    scores |= {
        "model": config.name,
        "projection": options.projection,
        "left_out": len(read) - len(answers),
        "instruction": instruction,
        "words": sum(len(a.split()) for a in answers.values()) / len(answers),
        "seconds": round(seconds, 1),
    }
    records = [{"key": k, "answer": a, "captions": references[k]} for k, a in answers.items()]
    return scores, records
