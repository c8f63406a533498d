"""python -m research.architecture SHARD.tar --train DATA: the paper's ablations, in minutes.

Each arm is trained anew, for the same few steps on the same pictures in the same order, and scored
on pictures that no arm has seen. The arms of the first stage:

- `linear`: the model's own bridge and one linear projection, the published design;
- `deeper`: three linear layers instead of one;
- `bridge`: the other kind of bridge: none instead of a Q-Former, or a tiny Q-Former, trained from
  scratch, for a model without one.

The arms of the second stage (with `--described`) continue from `linear`, for half as many steps:

- `stage2`: on all descriptions; `stage2-quarter`: on a quarter of them, for the same steps;
- `stage2-alone`: on all of them, without a first stage.

Such a short training shows how fast the arms learn, not how far. Learning rates are those of the
model's schedule, scaled for new modules, and not tuned for any arm.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from minigpt4 import start
from minigpt4.batch import Batch, greedy
from minigpt4.config import ModelConfig, Schedule
from minigpt4.data.datasets import read_captioned
from minigpt4.data.examples import Example, read_descriptions, usable
from minigpt4.data.files import prompt_lines
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.metrics import caption_scores, failure_rates
from minigpt4.model.minigpt4 import MiniGPT4
from research import arms

FIRST, SECOND = ("linear", "deeper", "bridge"), ("stage2", "stage2-quarter", "stage2-alone")
SCORED = 50  # pictures, without --limit
CAPTION_TOKENS, DETAIL_TOKENS = 40, 120


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(
        prog="python -m research.architecture",
        description="Train and compare variants of the architecture and of the training.",
    )
    found.add_argument("shard", metavar="DATA", help="Captioned pictures to score on.")
    found.add_argument("--train", metavar="DATA", required=True, help="Captions to train on.")
    found.add_argument(
        "--described", metavar="DIR", help="Data of the second stage: filter_cap.json and image/."
    )
    found.add_argument("--arms", help="Names of arms, separated by commas; all by default.")
    found.add_argument("--steps", type=int, default=100, help="Steps of the first stage.")
    found.add_argument(
        "--train-batch", type=int, help="Pictures per step; the schedule's by default."
    )
    found.add_argument("--pictures", type=int, default=400, help="Captioned pictures to train on.")
    found.add_argument("--limit", type=int, help="Pictures to score on (50 by default).")
    found.add_argument("--batch-size", type=int, default=16, help="Answers generated together.")
    found.add_argument("--seed", type=int, default=42, help="Of data order and new weights.")
    found.add_argument("--json", metavar="FILE", help="Write the figures to this file.")
    found.add_argument(
        "--markdown",
        metavar="FILE",
        help="Write the tables to this file, or to its place for them.",
    )
    found.add_argument("--model", default="nano", help="The model to vary.")
    found.add_argument("--projection", help="Its projection; it only shows the shape.")
    found.add_argument("--device", default="auto")
    found.add_argument("--quantize", default="auto", help="Of the model that answers.")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        for name in ("steps", "train_batch", "pictures", "limit", "batch_size"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise UserError(f"“--{name.replace('_', '-')}” must be at least 1, not {value}.")
        if options.markdown:
            report.find_place(options.markdown, "architecture")
        started = time.perf_counter()
        result, text = run(options)
        seconds = time.perf_counter() - started
        program = "research.architecture"
        report.publish("architecture", result, text, seconds, options, program)
    except UserError as error:
        print(f"architecture: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(figures by arm, their table)."""
    chosen = chosen_arms(options)
    held_out = usable(read_captioned(options.shard)[: options.limit or SCORED])
    captioned = usable(read_captioned(options.train)[: options.pictures])
    described = read_descriptions(options.described) if options.described else []
    if described and len(described) < 8:
        raise UserError(f"{options.described} has too few pictures: 8 or more are needed.")
    # Training needs 16 or 32 bits; the answers come from the model as it is used.
    answering = start.open_model(options)
    model = start.open_model(argparse.Namespace(**vars(options) | {"quantize": "none"}))
    if model.device.type == "cpu":  # the backward pass of fused attention is many times slower
        model.llm.set_attn_implementation("eager")
    bench = Bench(options, model, answering, held_out, captioned, described)
    found = {}
    linear = None
    for name in chosen:
        base = linear if name in ("stage2", "stage2-quarter") else None
        made, found[name] = bench.run_arm(name, base)
        if name == "linear":
            linear = {k: v.detach().clone() for k, v in made.projection.state_dict().items()}
    result = {
        "model": model.config.name,
        "n": len(held_out),
        "trained_on": len(captioned),
        "described": len(described) - bench.described_held_out,
        "first_stage": _shown(bench.first),
        "second_stage": _shown(bench.second),
        "seed": options.seed,
        "arms": found,
        "not_run": [n for n in (*FIRST, *SECOND) if n not in found],
    }
    return result, as_text(result)


def chosen_arms(options: argparse.Namespace) -> list[str]:
    """The arms in the order in which they run; the second stage needs `linear` of the first."""
    possible = (*FIRST, *(SECOND if options.described else ()))
    wanted = options.arms.split(",") if options.arms else possible
    unknown = [name for name in wanted if name not in possible]
    if unknown:
        hint = " (those of the second stage need “--described DIR”)" if unknown[0] in SECOND else ""
        raise UserError(
            f"There is no arm “{unknown[0]}” here: choose from {', '.join(possible)}{hint}."
        )
    if {"stage2", "stage2-quarter"} & set(wanted) and "linear" not in wanted:
        raise UserError("The second stage continues from “linear”: add it to “--arms”.")
    return [name for name in possible if name in wanted]


class Bench:
    """What all arms share: the data, encoded once, and both ways of scoring."""

    def __init__(
        self,
        options: argparse.Namespace,
        model: MiniGPT4,
        answering: MiniGPT4,
        held_out: Sequence[Example],
        captioned: Sequence[Example],
        described: Sequence[Example],
    ) -> None:
        self.options, self.model, self.answering = options, model, answering
        self.first = shortened(model.config.stage1, options.steps, options.train_batch)
        self.second = shortened(
            model.config.stage2, max(1, options.steps // 2), options.train_batch
        )
        asked = prompt_lines("caption.txt") if model.config.recipe == "extended" else ()
        self.captions = arms.Corpus(captioned, arms.encode(model, captioned), asked)
        self.unseen = arms.Corpus(held_out, arms.encode(model, held_out), asked)
        # The last eighth of the descriptions is not trained on.
        self.described_held_out = len(described) // 8
        self.descriptions = None
        if described:
            asked = prompt_lines("alignment.txt")
            encoded = arms.encode(model, described)
            self.descriptions = arms.Corpus(described, encoded, asked)

    def run_arm(self, name: str, base: dict | None) -> tuple[MiniGPT4, dict]:
        """(the trained model, its figures). base: the projection to continue from."""
        kind = name if name in FIRST else "linear"
        made, groups = arms.variant(self.model, kind, self.options.seed)
        if base:
            made.projection.load_state_dict(base)
        schedule, corpus = self.first, self.captions
        if name in SECOND:
            schedule = self.second
            corpus = self.descriptions.part(0, -self.described_held_out)
            if name == "stage2-quarter":
                corpus = corpus.part(0, max(1, len(corpus.examples) // 4))
        began = time.perf_counter()
        with tqdm(total=schedule.steps, desc=name) as bar:

            def note(text: str) -> None:
                bar.set_postfix_str(text)
                bar.update()

            last = arms.train(made, groups, corpus, schedule, self.options.seed, note)
        seconds = time.perf_counter() - began
        figures = {
            "what": what(name, self.model.config),
            "trained_parameters": sum(p.numel() for g in groups for p in g["params"]),
            "steps": schedule.steps,
            "pictures": len(corpus.examples),
            "training_seconds": round(seconds, 1),
            "training_loss": last,
            "caption_loss": arms.held_out_loss(made, self.unseen, self.first),
            "description_loss": None,
        }
        if self.descriptions:
            unseen = self.descriptions.part(-self.described_held_out, None)
            figures["description_loss"] = arms.held_out_loss(made, unseen, self.second)
        return made, figures | self.answer(made)

    def answer(self, made: MiniGPT4) -> dict[str, float]:
        """The scores of the trained model's captions and descriptions of unseen pictures."""
        model = self.answering
        # Trained in 32 bits, but used in the precision of the answering model.
        trained = copy.deepcopy((made.bridge, made.projection))
        bridge, projection = (part.to(model.projection.weight.dtype) for part in trained)
        engine = Engine(
            MiniGPT4(
                made.config,
                model.encoder,
                bridge,
                projection,
                model.llm,
                model.tokenizer,
                model.quantize,
            )
        )
        config, examples = made.config, self.unseen.examples
        with Batch(engine, self.options.batch_size) as batch:
            captions = batch.ask_each(examples, config.short_instruction, greedy(CAPTION_TOKENS))
            details = batch.ask_each(examples, config.detail_instruction, greedy(DETAIL_TOKENS))
        answers = {key: completion.text for key, completion in captions.items()}
        references = {e.key: list(e.captions) for e in examples if e.key in answers}
        scores = caption_scores(answers, references)
        said = details.values()
        rates = failure_rates((d.text for d in said), (d.truncated for d in said))
        words = sum(len(d.text.split()) for d in said) / len(said)
        return scores | {"words": words} | {k: v for k, v in rates.items() if k != "n"}


def shortened(schedule: Schedule, steps: int, batch_size: int | None) -> Schedule:
    """The model's schedule for fewer steps, a tenth of them to warm up."""
    size = batch_size or schedule.batch_size
    return replace(schedule, steps=steps, warmup_steps=max(1, steps // 10), batch_size=size)


def _shown(schedule: Schedule) -> dict[str, float]:
    return {k: getattr(schedule, k) for k in ("steps", "batch_size", "peak_lr", "floor_lr")}


def what(name: str, config: ModelConfig) -> str:
    """A description of the arm."""
    return {
        "linear": "one linear layer, first stage",
        "deeper": "three linear layers, first stage",
        "bridge": f"{arms.other_bridge(config)[0]}, first stage",
        "stage2": "then second stage, all descriptions",
        "stage2-quarter": "then second stage, a quarter of them",
        "stage2-alone": "second stage alone, all descriptions",
    }[name]


def as_text(result: dict) -> str:
    """The table of arms."""
    header = ["arm", "what", "trained", "steps", "pictures", "caption loss", "description loss"]
    header += ["BLEU-4", "CIDEr", "repetition", "fragments", "words"]
    rows = [
        [name, a["what"], f"{a['trained_parameters'] / 1e6:.2f} M", a["steps"], a["pictures"]]
        + [a["caption_loss"], a["description_loss"], a["bleu4"], a["cider"]]
        + [report.percent(a["repetition_rate"]), report.percent(a["fragment_rate"])]
        + [f"{a['words']:.1f}"]
        for name, a in result["arms"].items()
    ]
    text = (
        f"Each arm trained anew, seed {result['seed']}, batches of "
        f"{result['first_stage']['batch_size']}; scored on {result['n']} pictures that none has "
        "seen. Losses in nats per token; repetition, fragments and words of descriptions.\n\n"
    )
    text += report.table(header, rows)
    if result["not_run"]:
        text += f"\n\nNot run: {', '.join(result['not_run'])}."
    return text


if __name__ == "__main__":
    sys.exit(main())
