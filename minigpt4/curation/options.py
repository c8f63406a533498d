"""The options of `minigpt4 curate`. Imports nothing heavy."""

import argparse
from collections.abc import Callable
from dataclasses import fields, replace

from minigpt4.config import DEFAULT_MODEL
from minigpt4.curation.filters import Thresholds
from minigpt4.options import (
    Option,
    Parser,
    a_name,
    add_model_options,
    add_sampling_options,
    integer,
    number,
    switch,
)

STEPS = "Run the steps in this order: generate, refine, filter, review, merge, export."
PREFIX = "CURATE_"

GENERATE = (
    Option(
        "min-tokens",
        "Ask to continue a shorter description (80 in the paper).",
        80,
        integer(1),
        "N",
    ),
    Option("continues", "How often to ask that (1 in the paper); 0 for never.", 1, integer(0), "N"),
    Option("together", "Pictures described at once.", 16, integer(1), "N"),
    Option("limit", "Use only the first N pictures.", None, integer(1), "N"),
)
ENDPOINT = (
    Option("url", "Address: http://HOST:PORT/v1.", variable="OPENAI_BASE_URL"),
    Option(
        "api-key",
        "API key. Prefer the environment variable: other users of this machine can see command "
        "lines.",
        metavar="KEY",
        variable="OPENAI_API_KEY",
        needs=("url",),
    ),
    Option(
        "refiner", "Model to use there.", metavar="NAME", variable="OPENAI_MODEL", needs=("url",)
    ),
    Option("together", "Maximum number of requests at once.", 4, integer(1), "N"),
    Option(
        "retries",
        "How often to repeat a failed request, with increasing pauses.",
        6,
        integer(0),
        "N",
        needs=("url",),
    ),
    Option(
        "timeout", "Time for an answer, in seconds.", 120.0, number(0), "SECONDS", needs=("url",)
    ),
    Option("price-in", "Price of a million input tokens.", 0.0, number(0), "PRICE"),
    Option("price-out", "Price of a million output tokens.", 0.0, number(0), "PRICE"),
    Option(
        "max-cost",
        "Do not start if the estimate is higher.",
        None,
        number(0),
        "PRICE",
        needs=("price-in", "price-out"),
    ),
    Option("estimate", "Print the estimate and stop.", False, switch),
)
LOCAL = Option(
    "local",
    "Refine with the model below on this machine. The default if no endpoint is given.",
    False,
    switch,
)
RULES = {
    "min_words": "Minimum number of words.",
    "max_repeated": "Maximum share of three-word sequences that occur more than once.",
    "language": "ISO 639-1 code of the language; “any” for no rule.",
    "language_confidence": "Confidence from which another language counts.",
    "max_similarity": "Maximum Jaccard similarity to an earlier description, from 0 to 1.",
}
READERS: dict[type, Callable] = {int: integer(0), float: number(0), str: str}
FILTER = tuple(
    Option(
        field.name.replace("_", "-"), RULES[field.name], field.default, READERS[type(field.default)]
    )
    for field in fields(Thresholds)
)
REVIEW = (
    Option("name", "Name of the reviewer. By default the file's."),
    Option(
        "host",
        "Address to listen on; 0.0.0.0 accepts connections from other machines.",
        "127.0.0.1",
        variable="MINIGPT4_REVIEW_HOST",
    ),
    Option("port", "Port to listen on.", 7861, integer(1, 65535), variable="MINIGPT4_REVIEW_PORT"),
)
MOVED = Option(
    "pictures", "Folder of the pictures or shards, if they were moved.", metavar="FOLDER"
)


def add_commands(parser: Parser) -> None:
    """generate | refine | filter | review | merge | export"""
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP", description=STEPS)

    def add(name: str, what: str, *options: Option, reads: str = "") -> Parser:
        step = steps.add_parser(name, help=what)
        step.set_defaults(run=_run)
        if reads:
            step.add_argument("file", metavar="FILE", help=f"JSON lines written by {reads}.")
        step.add(options, prefix=PREFIX)
        return step

    out, resumed = _out(), _out("An interrupted run resumes.")
    what = "1. describe each picture with a model of stage 1"
    generate = add("generate", what, resumed, *GENERATE)
    generate.add_argument("pictures", help="A folder, or shards (a path, a glob, {00000..00007}).")
    add_model_options(generate, DEFAULT_MODEL)
    add_sampling_options(generate)
    what = "2. correct the descriptions with a language model"
    refine = add("refine", what, resumed, LOCAL, reads="`generate`")
    refine.add(ENDPOINT, "OpenAI-compatible endpoint", PREFIX)
    add_model_options(refine, DEFAULT_MODEL)
    what = "3. mark descriptions that break a rule"
    add("filter", what, _out("Overwritten."), *FILTER, reads="`generate` or `refine`")
    what = "4. keep, edit or drop each description, on a page"
    own = _out("One for each reviewer; a review can be resumed.")
    add("review", what, own, *REVIEW, MOVED, reads="`filter`")
    agreement = Option("json", "Write the agreement to this file.", metavar="FILE")
    merge = add("merge", "5. combine reviews and measure their agreement", out, agreement)
    merge.add_argument("reviews", nargs="+", metavar="FILE", help="Files written by `review`.")
    what = "6. write filter_cap.json and image/ for train --stage 2"
    folder = replace(out, help="Folder to write.", metavar="FOLDER")
    add("export", what, folder, MOVED, reads="`filter`, `review` or `merge`")


def _run(options: argparse.Namespace) -> None:
    from minigpt4.curation import run

    getattr(run, options.step)(options)


def _out(note: str = "") -> Option:
    text = f"JSON lines to write. {note}".strip()
    return Option("out", text, None, a_name, "FILE", required=True)
