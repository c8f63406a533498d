"""`--experiment architecture`: the paper's ablations, at a size that takes minutes.

Each arm is trained anew, for the same few steps on the same pictures in the same order, and scored
on pictures that none has seen. The first stage's arms:

- `linear`: the model's own bridge and one linear projection, the published design;
- `deeper`: three linear layers in its place;
- `bridge`: the other kind of bridge: without the Q-Former where the model has one, with a tiny one,
  trained from nothing, where it has none.

The second stage's (with `--described`) go on from `linear`, for half as many steps:

- `stage2`: on all descriptions; `stage2-quarter`: on a quarter of them, the same steps;
- `stage2-alone`: on all of them, without a first stage.

A training this short shows how fast the arms learn, not where they end; learning rates are those of
the model's schedule, scaled for new modules, and not tuned for any arm.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from minigpt4 import start
from minigpt4.config import ModelConfig, PooledMap, Schedule
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import arms, report
from minigpt4.evaluation.asking import Question, Reply, answer_all, greedy, usable
from minigpt4.evaluation.metrics import caption_scores, failure_rates
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.training.data import Example, read_descriptions, read_lines
from minigpt4.training.run import read_captioned

FIRST, SECOND = ("linear", "deeper", "bridge"), ("stage2", "stage2-quarter", "stage2-alone")
SCORED = 50  # pictures, where --limit does not say
CAPTION_TOKENS, DETAIL_TOKENS = 40, 120


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(figures by arm, their table)."""
    chosen = chosen_arms(options)
    if not options.train:
        raise UserError("Name the captioned pictures to train on by “--train”.")
    held_out = usable(read_captioned(options.shard)[: options.limit or SCORED])
    captioned = usable(read_captioned(options.train)[: options.pictures])
    described = read_descriptions(options.described) if options.described else []
    if described and len(described) < 8:
        raise UserError(f"{options.described} has too few pictures: 8 or more are needed.")
    # Trained through in 16 or 32 bit; answers come from the model as it is used.
    answering = start.open_model(options)
    model = start.open_model(argparse.Namespace(**vars(options) | {"quantize": "none"}))
    if model.device.type == "cpu":  # fused attention's backward is many times slower there
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
    """In the order in which they are run; the second stage's need the first's `linear`."""
    possible = (*FIRST, *(SECOND if options.described else ()))
    wanted = options.arms.split(",") if options.arms else possible
    unknown = [name for name in wanted if name not in possible]
    if unknown:
        hint = " (the second stage's need “--described DIR”)" if unknown[0] in SECOND else ""
        raise UserError(
            f"There is no arm “{unknown[0]}” here: choose of {', '.join(possible)}{hint}."
        )
    if {"stage2", "stage2-quarter"} & set(wanted) and "linear" not in wanted:
        raise UserError("The second stage goes on from “linear”: name it in “--arms” too.")
    return [name for name in possible if name in wanted]


class Bench:
    """What all arms share: data, encoded once, and both ways of scoring."""

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
        asked = tuple(read_lines("caption.txt")) if _embedded(model.config) else ()
        self.captions = arms.Corpus(captioned, arms.encode(model, captioned), asked)
        self.unseen = arms.Corpus(held_out, arms.encode(model, held_out), asked)
        # The last eighth of the descriptions is not trained on.
        self.described_held_out = len(described) // 8
        self.descriptions = None
        if described:
            asked = tuple(read_lines("alignment.txt"))
            encoded = arms.encode(model, described)
            self.descriptions = arms.Corpus(described, encoded, asked)

    def run_arm(self, name: str, base: dict | None) -> tuple[MiniGPT4, dict]:
        """(the trained model, its figures); `base`: the projection to go on from."""
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
        """Scores of the trained model's captions and descriptions of the unseen pictures."""
        model = self.answering
        # Trained in 32 bit, and used in the precision of the model that answers.
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
        captions = self._ask(engine, config.short_instruction, CAPTION_TOKENS)
        details = self._ask(engine, config.detail_instruction, DETAIL_TOKENS)
        engine.close()
        answers = {e.key: r.text for e, r in zip(examples, captions, strict=True)}
        scores = caption_scores(answers, {e.key: list(e.captions) for e in examples})
        rates = failure_rates((r.text for r in details), (r.truncated for r in details))
        words = sum(len(r.text.split()) for r in details) / len(details)
        return scores | {"words": words} | {k: v for k, v in rates.items() if k != "n"}

    def _ask(self, engine: Engine, instruction: str, tokens: int) -> list[Reply]:
        questions = [Question(e.key, instruction, e.read) for e in self.unseen.examples]
        replies = answer_all(engine, questions, greedy(tokens), self.options.batch_size)
        return list(tqdm(replies, desc="answering", total=len(questions)))


def shortened(schedule: Schedule, steps: int, batch_size: int | None) -> Schedule:
    """The model's schedule, over fewer steps (a tenth of them to warm up)."""
    size = batch_size or schedule.batch_size
    return replace(schedule, steps=steps, warmup_steps=max(1, steps // 10), batch_size=size)


def _embedded(config: ModelConfig) -> bool:
    """Does this model's first stage ask for captions, rather than show bare embeddings?"""
    return isinstance(config.bridge, PooledMap)


def _shown(schedule: Schedule) -> dict[str, float]:
    return {k: getattr(schedule, k) for k in ("steps", "batch_size", "peak_lr", "floor_lr")}


def what(name: str, config: ModelConfig) -> str:
    """An arm in words."""
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
        "seen. Losses in nats a token; repetition, fragments and words of descriptions.\n\n"
    )
    text += report.table(header, rows)
    if result["not_run"]:
        text += f"\n\nNot run: {', '.join(result['not_run'])}."
    return text
