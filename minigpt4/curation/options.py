"""The options of `python -m minigpt4 curate`. Imports nothing heavy."""

import argparse
from dataclasses import fields

from minigpt4 import start
from minigpt4.curation.filters import Thresholds

STEPS = "generate, refine, filter, review, merge and export, in this order; see docs/curation.md"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """generate | refine | filter | review | merge | export"""
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP", description=STEPS)
    for add in (_generate, _refine, _filter, _review, _merge, _export):
        name = add.__name__.strip("_")
        step = add(steps)
        step.set_defaults(run=_runner(name))


def _runner(name: str):
    def run(options: argparse.Namespace) -> None:
        from minigpt4.curation import run

        getattr(run, name)(options)

    return run


def _generate(steps) -> argparse.ArgumentParser:
    step = steps.add_parser("generate", help="1. describe each picture with a stage-1 model")
    step.add_argument("pictures", help="a folder, or shards (a path, a glob, {00000..00007})")
    _add_out(step, "goes on where it stopped")
    step.add_argument(
        "--min-tokens", type=_count, default=80, help="fewer: told to go on (the paper's 80)"
    )
    step.add_argument(
        "--continues", type=_whole, default=1, help="how often, at most (the paper's 1; 0: never)"
    )
    step.add_argument("--together", type=_count, default=16, help="pictures described at once")
    step.add_argument("--limit", type=_count, help="the first N pictures only")
    start.add_model_options(step, default="nano")
    start.add_sampling_options(step)
    return step


def _refine(steps) -> argparse.ArgumentParser:
    step = steps.add_parser("refine", help="2. have another language model mend the descriptions")
    _add_in(step, "what `generate` wrote")
    _add_out(step, "goes on where it stopped")
    group = step.add_argument_group("endpoint (any that is OpenAI-compatible)")
    group.add_argument("--url", help="http://HOST:PORT/v1; or in $OPENAI_BASE_URL")
    group.add_argument("--api-key", metavar="KEY", help="better in $OPENAI_API_KEY")
    group.add_argument("--refiner", metavar="NAME", help="its model; or in $OPENAI_MODEL")
    group.add_argument("--together", type=_count, default=4, help="requests at once (default: 4)")
    group.add_argument("--retries", type=_whole, default=6, help="of a request, with back-off")
    group.add_argument("--timeout", type=_amount, default=120.0, help="seconds for an answer")
    group.add_argument("--price-in", type=_amount, default=0.0, help="of a million tokens asked")
    group.add_argument(
        "--price-out", type=_amount, default=0.0, help="of a million tokens answered"
    )
    group.add_argument("--max-cost", type=_amount, help="do not start where more is estimated")
    group.add_argument("--estimate", action="store_true", help="say what it will take, and end")
    step.add_argument(
        "--local",
        action="store_true",
        help="use the model below, on this machine: what is done where no endpoint is named",
    )
    start.add_model_options(step, default="nano")
    return step


def _filter(steps) -> argparse.ArgumentParser:
    step = steps.add_parser("filter", help="3. mark descriptions that break a rule")
    _add_in(step, "what `generate` or `refine` wrote")
    _add_out(step, "written anew each time: it takes seconds")
    helps = {
        "min_words": "fewer are too short",
        "max_repeated": "share of the runs of three words that may occur again",
        "language": "ISO 639-1 code; “any” leaves the rule out",
        "language_confidence": "how sure it must be that it is another language",
        "max_similarity": "Jaccard similarity of near duplicates, 0 to 1",
    }
    for field in fields(Thresholds):
        name, kind = "--" + field.name.replace("_", "-"), type(field.default)
        text = f"{helps[field.name]} (default: {field.default})"
        step.add_argument(name, type=kind, default=field.default, help=text)
    return step


def _review(steps) -> argparse.ArgumentParser:
    step = steps.add_parser("review", help="4. keep, edit or drop each, on a page")
    _add_in(step, "what `filter` wrote")
    _add_out(step, "the reviewer's own; goes on where it stopped")
    step.add_argument("--name", default="", help="the reviewer's (default: the file's)")
    step.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    step.add_argument("--port", type=int, default=7861)
    _add_pictures(step)
    return step


def _merge(steps) -> argparse.ArgumentParser:
    step = steps.add_parser("merge", help="put reviewers' files together; their agreement")
    step.add_argument("reviews", nargs="+", metavar="FILE", help="what `review` wrote")
    _add_out(step, "")
    step.add_argument("--json", metavar="OUT", help="write the agreement here")
    return step


def _export(steps) -> argparse.ArgumentParser:
    step = steps.add_parser("export", help="write filter_cap.json and image/, for train --stage 2")
    _add_in(step, "what `filter`, `review` or `merge` wrote")
    step.add_argument("--out", required=True, metavar="FOLDER")
    _add_pictures(step)
    return step


def _count(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1)


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"“{text}” is no whole number from {least} up")
    return int(text)


def _amount(text: str) -> float:
    """A number from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"“{text}” is no number from 0 up")
    return value


def _add_in(step: argparse.ArgumentParser, what: str) -> None:
    step.add_argument("file", metavar="FILE", help=f"JSON lines: {what}")


def _add_out(step: argparse.ArgumentParser, note: str) -> None:
    note = f"JSON lines; {note}" if note else "JSON lines"
    step.add_argument("--out", required=True, metavar="FILE", help=note)


def _add_pictures(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--pictures", metavar="FOLDER", help="where the pictures or shards are now, if they moved"
    )
