"""The options of `minigpt4 train`. Imports nothing heavy."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from minigpt4 import options as shared
from minigpt4.config import DEFAULT_MODEL
from minigpt4.errors import UserError
from minigpt4.options import (
    OFF,
    Option,
    Parser,
    a_name,
    add_model_options,
    integer,
    number,
    one_of,
    switch,
)

DATA = (
    Option(
        "stage",
        "Training stage: 1 learns to caption, 2 to describe in detail.",
        read=lambda text: int(one_of("1", "2")(text)),
        metavar="{1,2}",
    ),
    Option(
        "data",
        "Captioned pictures: WebDataset shards (a path, a glob, {00000..00007}), a folder with a "
        "table (CSV, JSON lines) or filter_cap.json, COCO's or LLaVA's JSON.",
        required=True,
    ),
    Option(
        "mix",
        "More data, with its weight in each batch; that of --data is 1. Repeatable.",
        metavar="DATA=WEIGHT",
        many=True,
        read=lambda text: _weighted(text),
    ),
    Option("instructions", "Stage 2: JSON lines of questions and answers.", metavar="FILE"),
    Option("replay", "Captions (data of stage 1) to mix in, mostly for stage 2.", metavar="DATA"),
    Option("replay-share", "Share of each batch that --replay fills.", 0.33, number(0, below=1)),
    Option("questions", "Add yes/no questions about N captioned pictures.", 0, integer(0), "N"),
    Option("limit", "Use only the first N pictures.", None, integer(1), "N"),
    Option("cache", "Keep the frozen encoder's features in this folder.", metavar="FOLDER"),
    Option("out", "Folder of the run; an interrupted run resumes there.", "runs/train", a_name),
    Option(
        "options",
        "TOML or YAML file of options; the command line takes precedence. A run writes its own "
        "into options.yaml.",
        metavar="FILE",
    ),
)
WATCHING = (
    Option(
        "validate",
        "Held-out captioned pictures: measure loss and CIDEr on them while training, and keep the "
        "best projection. Without a value, for models with a word head: measure what the run has "
        "learned, and end.",
        metavar="SHARD",
        bare="on",
        read=lambda text: "" if text.lower() in OFF else text,
    ),
    Option("validate-every", "Steps between these measurements.", 100, integer(1), "N"),
    Option("words", "With --validate: list words beside the embeddings.", True, switch),
)
OPTIMIZER = (
    Option("init", "Projection to start from; in stage 2 that of stage 1.", metavar="FILE"),
    Option(
        "steps", "Number of steps. By default as the model's schedule says.", None, integer(1), "N"
    ),
    Option("batch-size", "Pictures per step, over all processes.", None, integer(1), "N"),
    Option(
        "accumulate",
        "Divide a batch into N parts, one after the other, to save memory. The result is the same.",
        1,
        integer(1),
        "N",
    ),
    Option(
        "recompute",
        "Compute the language model's activations again in the backward pass (gradient "
        "checkpointing): less memory, more time.",
        False,
        switch,
    ),
    Option("peak-lr", "Highest learning rate.", None, number(0), "RATE"),
    Option("seed", "Random seed.", 42, integer(0)),
    Option(
        "blend",
        "Share of the trained projection in the result; the rest is that of --init.",
        1.0,
        number(0, most=1),
    ),
    Option(
        "crop",
        "Show a random part of each picture. Always done for models with a Q-Former or patches.",
        False,
        switch,
    ),
)
REWARD = (
    Option(
        "samples",
        "Sample N captions for each picture (of --replay, or in stage 1, or for mini, of pictures "
        "with several captions) and learn from their CIDEr.",
        0,
        integer(0),
        "N",
    ),
    Option(
        "scored",
        "Texts that --samples samples for mini: captions, descriptions or both. With only one, "
        "a step shows more pictures that have it, and few other texts.",
        "both",
        one_of("both", "captions", "descriptions"),
    ),
    Option("reward-weight", "Weight of that loss.", 2.0, number(0), "WEIGHT"),
    Option(
        "consensus",
        "Weight a picture's captions by their agreement; a lower temperature T weights more "
        "strongly. 0: all alike.",
        0.0,
        number(0),
        "T",
    ),
    Option(
        "denoise",
        "Suppress features in which pictures differ from their mirror images; 1 is a good value. "
        "0: do not. For models with pooled feature maps.",
        0.0,
        number(0),
        "C",
    ),
)


WORDS = (
    Option("threads", "Processor threads.", 2, integer(1), "N"),
    Option("adapters", "Train adapters (LoRA) of the language model as well.", False, switch),
    Option("refit", "Train the word head again, even if the run has one.", False, switch),
)
GROUPS = (DATA, WATCHING, OPTIMIZER, REWARD, WORDS)
# Options that do nothing without another one. mini's training always validates.
NEEDS_OF_WORDS = {"reward-weight": "samples", "scored": "samples", "words": "validate"}
NEEDS = {"replay-share": "replay", "reward-weight": "samples", "validate-every": "validate"}


def check_needs(options: Namespace, needs: Mapping[str, str]) -> None:
    """UserError for an option without the one that it belongs to."""
    every = [option for group in GROUPS for option in group]
    shared.check_needs(options, {o: (needs[o.name],) for o in every if o.name in needs})


def check_start(start: str | None, *written: Path) -> None:
    """UserError if a run would overwrite the file that it starts from."""
    if start and Path(start).resolve() in {path.resolve() for path in written}:
        raise UserError(
            f"{start}, from which the run starts, would be overwritten: choose another folder "
            "with “--out”."
        )


@contextmanager
def naming_init(options: Namespace) -> Iterator[None]:
    """In the block, errors of the loaders name “--init” instead of “--projection” if it is
    given."""
    try:
        yield
    except UserError as error:
        if not options.init:
            raise
        raise UserError(str(error).replace("“--projection", "“--init")) from error


def _weighted(text: str) -> tuple[str, float]:
    """Reads DATA=WEIGHT."""
    data, _, weight = text.rpartition("=")
    if not data:
        raise ArgumentTypeError(f"must be DATA=WEIGHT, such as captions.json=0.5, not “{text}”")
    value = number()(weight)
    if value <= 0:
        raise ArgumentTypeError(f"needs a weight above 0, not “{weight}”")
    return data, value


def add_options(parser: Parser) -> None:
    """All options of the command."""
    parser.add(DATA, "data", "TRAIN_")
    parser.reads_file = "--options"
    parser.add(WATCHING, "validation", "TRAIN_")
    parser.add(OPTIMIZER, "optimization", "TRAIN_")
    parser.add(REWARD, "weighting and rewards", "TRAIN_")
    parser.add(WORDS, "models with a word head", "TRAIN_")
    add_model_options(parser, DEFAULT_MODEL)
