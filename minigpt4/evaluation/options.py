"""The options of `python -m minigpt4 evaluate`. Imports nothing heavy."""

import argparse
from collections.abc import Callable

from minigpt4.errors import UserError

EXPERIMENTS = {
    "captions": "BLEU and CIDEr",
    "stages": "how often the first stage's answers fail, and how often the second's",
    "pope": "yes/no questions about objects that are there, and that are not",
    "abilities": "recipes, advertisements, poems, jokes, ..., judged by a model or by hand",
}

# Options of some experiments only; None stands for the plain scores.
_ONLY: dict[str, set[str | None]] = {
    "markdown": {*EXPERIMENTS},
    "detail": {None, "captions"},
    "answers": {None, *EXPERIMENTS},
    "stage1": {"stages"},
    "drawn": {"stages", "abilities"},
    "seed": {"stages", "abilities"},
    **dict.fromkeys(("objects", "question", "per_picture"), {"pope"}),
    **dict.fromkeys(
        ("judge", "judge_model", "judge_blind", "verdicts", "beside", "reuse", "review", "ratings"),
        {"abilities"},
    ),
}


def experiment(name: str) -> str:
    """The name of an experiment, as an option's value."""
    if name == "architecture":
        raise argparse.ArgumentTypeError(
            "the architecture experiment is now a program of its own: python -m "
            "research.architecture, in a checkout of the repository"
        )
    if name not in EXPERIMENTS:
        raise argparse.ArgumentTypeError(f"choose from {', '.join(EXPERIMENTS)}, not “{name}”")
    return name


def refuse_others(options: argparse.Namespace) -> None:
    """UserError where an option was given that this experiment would not heed."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, int)
    for name, experiments in _ONLY.items():
        given = getattr(options, name) != parser.get_default(name)
        if given and options.experiment not in experiments:
            of = " or ".join(sorted(e for e in experiments if e))
            raise UserError(
                f"“--{name.replace('_', '-')}” is for “--experiment {of}”: leave it out here."
            )


def add_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """count: reads a whole number from 1 up."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "experiments:\n" + "\n".join(f"  {n:13} {t}" for n, t in EXPERIMENTS.items())
    parser.add_argument(
        "shard",
        nargs="?",
        metavar="data",
        help="captioned pictures: shards (a path, a glob, {00000..00007}) or a folder with a table "
        "of captions (CSV or JSON lines); abilities: a suite's folder",
    )
    parser.add_argument(
        "--experiment",
        type=experiment,
        metavar=f"{{{','.join(EXPERIMENTS)}}}",
        help="one of the paper's; left out: the scores",
    )
    parser.add_argument("--limit", type=count, help="the first N pictures only")
    parser.add_argument("--json", metavar="OUT", help="write the scores here")
    parser.add_argument("--answers", metavar="OUT", help="write every answer, as JSON lines")
    parser.add_argument(
        "--markdown",
        metavar="OUT",
        help="write an experiment's tables here, or into the page that has a place for them"
        " (the lines <!-- EXPERIMENT --> and <!-- /EXPERIMENT -->)",
    )
    parser.add_argument("--detail", action="store_true", help="detailed descriptions instead")
    parser.add_argument(
        "--batch-size", type=count, default=16, help="answered together (at most 64)"
    )

    stages = parser.add_argument_group("stages (and abilities)")
    stages.add_argument(
        "--stage1", metavar="FILE", help="the first stage's projection (nano: the committed one)"
    )
    stages.add_argument(
        "--drawn",
        action="store_true",
        help="draw answers as the chat does; left out: the likeliest answer, which repeats more",
    )

    pope = parser.add_argument_group("pope")
    pope.add_argument("--objects", metavar="FILE", help="other objects than COCO's 80")
    pope.add_argument(
        "--question",
        default="Is there {} in the image?",
        help="how it is asked, {} for the object (default: %(default)s)",
    )
    pope.add_argument("--per-picture", type=count, default=3, help="objects a picture (default: 3)")

    abilities = parser.add_argument_group("abilities")
    abilities.add_argument(
        "--judge", metavar="URL", help="an OpenAI-compatible API; its key: $OPENAI_API_KEY"
    )
    abilities.add_argument("--judge-model", metavar="NAME", help="the model that judges")
    abilities.add_argument(
        "--judge-blind",
        action="store_true",
        help="tell the judge what the picture shows, do not send it: for models that read only",
    )
    abilities.add_argument(
        "--verdicts",
        metavar="FILE",
        help="keep each verdict here as it comes; what the file holds already is not asked again",
    )
    abilities.add_argument(
        "--beside",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="another model's answers to the same suite, as --answers writes them",
    )
    abilities.add_argument(
        "--reuse", action="store_true", help="take the answers in --answers, ask nothing again"
    )
    abilities.add_argument(
        "--review", metavar="PAGE.html", help="write a page on which people judge the answers"
    )
    abilities.add_argument(
        "--ratings", metavar="FILE", action="append", default=[], help="what such a page saved"
    )
    abilities.add_argument("--seed", type=int, default=42, help="of drawn answers (stages, too)")
