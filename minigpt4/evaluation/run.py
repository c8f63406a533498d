"""python -m minigpt4 evaluate: answer captioned pictures greedily, score the answers; or run one of
the paper's experiments."""

import argparse
import json
import time
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from minigpt4 import start
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.asking import Question, answer_all, greedy, usable
from minigpt4.evaluation.metrics import caption_scores, failure_rates
from minigpt4.evaluation.options import refuse_others
from minigpt4.training.run import read_captioned

CAPTION_TOKENS, DETAIL_TOKENS = 40, 200  # longest answers, in tokens


def evaluate(options: argparse.Namespace) -> None:
    """Run what the options name, print and write what comes out."""
    if not options.shard and options.experiment != "abilities":
        raise UserError("Name the captioned pictures to score on: evaluate SHARD.tar, or a folder.")
    refuse_others(options)
    if options.markdown:
        report.find_place(options.markdown, options.experiment)
    written = [options.json, options.markdown, options.review, options.verdicts]
    written += [] if options.reuse else [options.answers]
    for path in filter(None, written):
        Path(path).touch()  # a path that cannot be written shows now, not after the work
    if options.experiment is None:
        scores, records = answer_and_score(options)
        print(json.dumps(scores, indent=1, ensure_ascii=False))
        report.write_json(options.json, scores)
        report.write_lines(options.answers, records)
        return
    started = time.perf_counter()
    experiment = import_module(f"minigpt4.evaluation.{options.experiment}")
    result, text = experiment.run(options)
    result |= report.circumstances(result["model"], time.perf_counter() - started)
    result = {"experiment": options.experiment} | result
    print(text)
    report.write_json(options.json, result)
    page = f"{text}\n\n{report.caption(result)}"
    report.write_markdown(options.markdown, options.experiment, page)


def answer_and_score(options: argparse.Namespace) -> tuple[dict, list[dict]]:
    """The scores of short captions (or, with `detail`, descriptions), and every answer."""
    examples = usable(read_captioned(options.shard)[: options.limit])
    engine = Engine(start.open_model(options))
    config = engine.model.config
    instruction = config.detail_instruction if options.detail else config.short_instruction
    limit = DETAIL_TOKENS if options.detail else CAPTION_TOKENS
    started = time.perf_counter()
    questions = [Question(e.key, instruction, e.read) for e in examples]
    found = answer_all(engine, questions, greedy(limit), options.batch_size)
    replies = list(tqdm(found, desc="answering", total=len(examples), unit="picture"))
    seconds = time.perf_counter() - started
    engine.close()

    answers = {e.key: r.text for e, r in zip(examples, replies, strict=True)}
    references = {e.key: list(e.captions) for e in examples}
    scores = caption_scores(answers, references)
    scores |= failure_rates(answers.values(), (r.truncated for r in replies))
    scores |= {
        "model": config.name,
        "instruction": instruction,
        "words": sum(len(a.split()) for a in answers.values()) / len(answers),
        "seconds": round(seconds, 1),
    }
    records = [{"key": k, "answer": a, "captions": references[k]} for k, a in answers.items()]
    return scores, records
