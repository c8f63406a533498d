"""The options of `minigpt4 evaluate`. Imports nothing heavy."""

import argparse

from minigpt4.config import DEFAULT_MODEL
from minigpt4.errors import UserError
from minigpt4.options import Option, Parser, add_model_options, integer, switch

EXPERIMENTS = {
    "captions": "BLEU and CIDEr",
    "stages": "how often answers fail after stage 1, and after stage 2",
    "pope": "yes/no questions about objects that are in the picture, and that are not",
    "chair": "how many of the objects that a description names are not in the picture",
    "abilities": "recipes, advertisements, poems, jokes, …, judged by a model or by people",
}


def experiment(name: str) -> str:
    """The name of an experiment, as an option's value."""
    if name == "architecture":
        raise argparse.ArgumentTypeError(
            "the architecture experiment is now a program of its own: python -m "
            "research.architecture, in a checkout of the repository"
        )
    if name not in EXPERIMENTS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(EXPERIMENTS)}, not “{name}”")
    return name


GENERAL = (
    Option(
        "experiment",
        "One of the paper's experiments (below). By default the scores are computed.",
        read=experiment,
        metavar="NAME",
    ),
    Option("limit", "Use only the first N pictures.", None, integer(1), "N"),
    Option("batch-size", "Pictures answered at once, at most 64.", 16, integer(1, 64), "N"),
    Option("detail", "Score detailed descriptions instead of captions.", False, switch),
    Option("json", "Write the scores to this file.", metavar="FILE"),
    Option("answers", "Write every answer to this file, as JSON lines.", metavar="FILE"),
    Option(
        "markdown",
        "Write the experiment's tables to this file, or into a page between the lines "
        "<!-- EXPERIMENT --> and <!-- /EXPERIMENT -->.",
        metavar="FILE",
    ),
)
STAGES = (
    Option(
        "stage1",
        "Projection of stage 1. By default the one that comes with the model.",
        metavar="FILE",
    ),
    Option(
        "drawn",
        "Sample answers as the chat does. By default the most likely tokens are taken.",
        False,
        switch,
    ),
    Option("seed", "Seed of sampled answers.", 42, integer(0), needs=("drawn",)),
)
POPE = (
    Option("objects", "List of objects, also of chair. By default COCO's 80.", metavar="FILE"),
    Option("question", "Question; {} stands for the object.", "Is there {} in the image?"),
    Option("per-picture", "Objects per picture.", 3, integer(1), "N"),
)
ABILITIES = (
    Option(
        "judge",
        "OpenAI-compatible API of the judge. Its key is read from $OPENAI_API_KEY.",
        metavar="URL",
    ),
    Option("judge-model", "Model that judges.", metavar="NAME", needs=("judge",)),
    Option(
        "judge-blind",
        "Describe the picture to the judge instead of sending it, for models without vision.",
        False,
        switch,
        needs=("judge",),
    ),
    Option(
        "verdicts",
        "Keep verdicts in this file and do not ask for them again.",
        metavar="FILE",
        needs=("judge",),
    ),
    Option(
        "beside",
        "Another model's answers to the same suite, as --answers writes them. Repeatable.",
        metavar="NAME=FILE",
        many=True,
    ),
    Option("reuse", "Use the answers in the file --answers instead of asking.", False, switch),
    Option("review", "Write a page on which people judge the answers.", metavar="FILE.html"),
    Option("ratings", "Ratings saved by such a page. Repeatable.", metavar="FILE", many=True),
)
GROUPS = {"": GENERAL, "stages and abilities": STAGES, "pope": POPE, "abilities": ABILITIES}

# Options that only some experiments use; None stands for the scores.
_ONLY: dict[str, set[str | None]] = {
    "markdown": {*EXPERIMENTS},
    "detail": {None, "captions"},
    "answers": {None, *EXPERIMENTS},
    "stage1": {"stages"},
    "drawn": {"stages", "abilities"},
    "seed": {"stages", "abilities"},
    **{option.attribute: {"pope"} for option in POPE},
    "objects": {"pope", "chair"},
    **{option.attribute: {"abilities"} for option in ABILITIES},
}


def refuse_others(options: argparse.Namespace) -> None:
    """UserError if an option is set that this experiment does not use."""
    for option in (option for group in GROUPS.values() for option in group):
        experiments = _ONLY.get(option.attribute)
        value = getattr(options, option.attribute)
        default = [] if option.many else option.default
        if experiments and options.experiment not in experiments and value != default:
            of = " or ".join(sorted(e for e in experiments if e))
            raise UserError(
                f"“--{option.name}” is for “--experiment {of}”: give that, too, or leave it out."
            )


def add_options(parser: Parser) -> None:
    """The data to evaluate on, and all options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "experiments:\n" + "\n".join(f"  {n:13} {t}" for n, t in EXPERIMENTS.items())
    parser.add_argument(
        "shard",
        nargs="?",
        metavar="data",
        help="Captioned pictures: shards (a path, a glob, {00000..00007}) or a folder with a table "
        "of captions (CSV or JSON lines). For abilities: the folder of a suite.",
    )
    for title, options in GROUPS.items():
        parser.add(options, title, "EVALUATE_")
    add_model_options(parser, DEFAULT_MODEL)
