"""python -m minigpt4 evaluate: score captions, or run one of the paper's experiments."""

import argparse
import time
from importlib import import_module
from pathlib import Path

from minigpt4 import start
from minigpt4.data.outputs import check_outputs, print_json, write_lines
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.captions import answer_and_score
from minigpt4.evaluation.options import refuse_others
from minigpt4.evaluation.suite import SUITE


def evaluate(options: argparse.Namespace) -> None:
    """Run the experiment that the options name; print and write the result.

    UserError if a file cannot be read or written, or if an option does not fit the experiment.
    """
    if not options.shard and options.experiment != "abilities":
        raise UserError("Name the captioned pictures: evaluate SHARD.tar, or evaluate FOLDER.")
    refuse_others(options)
    _check_files(options)
    if options.markdown:
        report.find_place(options.markdown, options.experiment)
    written = [options.json, options.markdown, options.review, options.verdicts]
    written += [] if options.reuse else [options.answers]
    for path in filter(None, written):
        Path(path).touch()  # fail now, not after the work, if a file cannot be written
    if options.experiment is None:
        scores, records = answer_and_score(options)
        scores |= report.circumstances(scores["model"], scores["seconds"])
        write_lines(options.answers, records)
        print_json(scores, options.json)
    else:
        started = time.perf_counter()
        experiment = import_module(f"minigpt4.evaluation.{options.experiment}")
        result, text = experiment.run(options)
        report.publish(options.experiment, result, text, time.perf_counter() - started, options)


def _check_files(options: argparse.Namespace) -> None:
    """UserError if a file to write is also read, or written by another option."""
    data = options.shard or SUITE
    suite = options.experiment == "abilities"  # a folder of which one file is read
    inputs = [str(Path(data, "suite.jsonl") if suite else data)]
    inputs += [options.objects, options.stage1, *start.given_places(options).values()]
    inputs += [*options.ratings, *(other.partition("=")[2] for other in options.beside)]
    inputs += [options.answers] if options.reuse else []
    names = ("json", "review", "markdown", "verdicts", *([] if options.reuse else ["answers"]))
    check_outputs({name: getattr(options, name) for name in names}, inputs)
