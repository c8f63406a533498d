"""python -m minigpt4 train: options -> data, recipe, trainer."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from minigpt4 import start
from minigpt4.config import DEFAULT_MODEL, ModelConfig, Quantize, Schedule, get_model
from minigpt4.data.datasets import read_captioned
from minigpt4.data.examples import Example, merge, read_instructions, with_instructions
from minigpt4.data.files import prompt_lines, write_settings
from minigpt4.data.table import is_table, read_table
from minigpt4.errors import UserError
from minigpt4.model.parts import PooledMap
from minigpt4.options import ON
from minigpt4.training import questions
from minigpt4.training.extended import ExtendedRecipe, ExtendedTrainer, name_classes
from minigpt4.training.options import GROUPS, NEEDS, WORDS, check_needs, check_start, naming_init
from minigpt4.training.saving import locked
from minigpt4.training.trainer import Recipe, Trainer, recompute_activations
from minigpt4.training.validation import watch
from minigpt4.weights.load import download_weights, find_weights, load_model


def train(options: argparse.Namespace) -> None:
    """Run one stage and report the projection's path."""
    config = get_model(DEFAULT_MODEL if options.model == "auto" else options.model)
    if config.recipe == "small":
        from minigpt4.training import small_run

        return small_run.train(options, config)
    if not options.stage:
        raise UserError(f"{config.name} is trained in two stages: give --stage 1 or --stage 2.")
    schedule = schedule_of(options, config)
    _check(options, config)
    examples = read_examples(options)[: options.limit]
    mixed = [(read_captioned(data, options.limit), weight) for data, weight in options.mix]
    mixture = [(len(examples), 1.0), *((len(more), weight) for more, weight in mixed)]
    examples += [example for more, _ in mixed for example in more]
    held_out = read_captioned(options.validate) if options.validate else []
    replay = read_captioned(options.replay) if options.replay else []
    replay = with_instructions(replay, prompt_lines("caption.txt"))
    replay_share = options.replay_share if replay else 0.0
    if options.samples and options.stage == 1 and not replay:  # sample answers to all of them
        examples, replay, replay_share = [], examples, 1.0
    if options.questions:
        examples += questions.ask_about(replay or examples, options.questions, options.seed)
    accelerator = Accelerator(cpu=start.device_of(options.device).type == "cpu")
    with naming_init(options):
        model = _open(options, config, accelerator)
    metadata = {
        "model": config.name,
        "stage": str(options.stage),
        "command": shlex.join(["python", "-m", "minigpt4", *sys.argv[1:]]),
        "pictures": str(len(examples) + len(replay)),
    }
    recipe = recipe_of(options, config, schedule, replay_share, metadata)
    if options.mix:
        recipe = replace(recipe, mixture=tuple(mixture))
    cache = Path(options.cache) if options.cache else None
    others = (options.out, accelerator, cache, replay)
    if isinstance(recipe, ExtendedRecipe):
        trainer: Trainer = ExtendedTrainer(model, examples, recipe, *others)
    else:
        trainer = Trainer(model, examples, recipe, *others)
    if trainer.resume() and trainer.main:
        start.say(f"Resuming at step {trainer.step} of {schedule.steps}.")
    with prepared(trainer, held_out, options):
        path = trainer.run()
    if trainer.main:
        start.say(f"The projection is in {path}, the loss curve beside it: loss.png, loss.csv.")


@contextmanager
def prepared(
    trainer: Trainer, held_out: Sequence[Example], options: argparse.Namespace
) -> Iterator[None]:
    """The main process's preparations before the first step; in the block, it keeps other runs out
    of the folder. A UserError in it is raised in all processes, which would otherwise wait."""
    failed: list[UserError | None] = [None]
    with ExitStack() as held:
        if trainer.main:
            try:
                held.enter_context(locked(trainer.out))
                watch(trainer, held_out, options.validate_every)
                write_settings(trainer.out / "options.yaml", given_options(options))
            except UserError as error:
                failed = [error]
        if error_of_main := broadcast_object_list(failed)[0]:
            raise error_of_main
        yield


def given_options(options: argparse.Namespace) -> dict[str, object]:
    """The options of a run that have a value, as `--options` reads them."""
    names = [o.name for group in GROUPS for o in group if o.name != "options"]
    names += ["model", "quantize", "dtype", "device", "projection", "vision", "qformer", "llm"]
    found = {name: getattr(options, name.replace("-", "_"), None) for name in names}
    found["mix"] = [f"{data}={weight:g}" for data, weight in options.mix]
    return {name: value for name, value in found.items() if value not in (None, "", [])}


def _check(options: argparse.Namespace, config: ModelConfig) -> None:
    """UserError for options that exclude each other, or that the model's recipe does not have."""
    if options.denoise and config.recipe != "extended":
        raise UserError(
            "“--denoise” compares pictures with their mirror images, which the training of "
            f"{config.name} does not use: omit it."
        )
    if options.mix and (options.questions or options.samples and not options.replay):
        raise UserError("“--mix” cannot be combined with “--questions”, or “--samples” alone.")
    for option in (option for group in GROUPS for option in group):
        of_words = option in WORDS or option.name in ("words", "scored")
        value = getattr(options, option.attribute)
        if of_words and value != option.default:
            raise UserError(
                f"“{option.flag(value)}” is for models with a word head, such as mini: omit it."
            )
    if options.validate in ON:
        raise UserError("Name the held-out pictures: “--validate SHARD”.")
    if options.crop and options.cache:
        raise UserError(
            "“--crop” shows another part of a picture in each step, so features cannot be cached: "
            "omit “--cache”."
        )
    if options.samples and options.questions and options.stage == 1 and not options.replay:
        raise UserError(
            "“--samples” uses all pictures of the first stage, which leaves none for "
            "“--questions”: omit one of them."
        )
    check_needs(options, NEEDS)
    if options.samples and options.stage == 2 and not options.replay:
        raise UserError(
            "“--samples” samples captions, which the second stage reads from “--replay”: give it, "
            "too."
        )
    _check_start(options, config)


def _check_start(options: argparse.Namespace, config: ModelConfig) -> None:
    """UserError if the projection to start from is not clear, or would be overwritten."""
    if options.init and options.projection:
        raise UserError(
            "“--init” and “--projection” (or MINIGPT4_PROJECTION) both name the projection to "
            "start from: omit one."
        )
    if options.stage == 2 and not options.init:
        raise UserError(
            "The second stage starts from the projection of the first: name it with “--init”."
        )
    written = (Path(options.out, f"{config.name}{end}.safetensors") for end in ("", "-best"))
    check_start(options.init or options.projection, *written)


def recipe_of(
    options: argparse.Namespace,
    config: ModelConfig,
    schedule: Schedule,
    replay_share: float,
    metadata: dict[str, str],
) -> Recipe:
    """The model's recipe with the options. Sampling and consensus can be added to the published
    recipe, too."""
    extended = config.recipe == "extended"
    common = {
        "schedule": schedule,
        "instructions": instructions(options.stage, config),
        "seed": options.seed,
        "blend": options.blend,
        "replay_share": replay_share,
        "crop": options.crop or not extended,
        "accumulate": options.accumulate,
        "metadata": metadata,
    }
    samples = options.samples if replay_share else 0
    if not extended and not samples and not options.consensus:
        return Recipe(**common)
    return ExtendedRecipe(
        **common,
        mirror=extended,
        eigenbasis=extended,
        denoise=options.denoise,
        consensus=options.consensus,
        samples=samples,
        reward_weight=options.reward_weight,
    )


def schedule_of(options: argparse.Namespace, config: ModelConfig) -> Schedule:
    """The schedule of the stage, changed by the options. With fewer steps, the warm-up is shorter;
    no rate exceeds the peak."""
    schedule = config.stage1 if options.stage == 1 else config.stage2
    if schedule is None:
        raise UserError(f"{config.name} is not trained in stages: omit “--stage”.")
    overrides = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "peak_lr": options.peak_lr,
    }
    if options.steps is not None and options.steps < schedule.steps:
        overrides["warmup_steps"] = schedule.warmup_steps * options.steps // schedule.steps
    schedule = replace(schedule, **{k: v for k, v in overrides.items() if v is not None})
    highest = schedule.peak_lr
    floor, warmup = min(schedule.floor_lr, highest), min(schedule.warmup_lr, highest)
    return replace(schedule, floor_lr=floor, warmup_lr=warmup)


def read_examples(options: argparse.Namespace) -> list[Example]:
    """The data that the options name, in a fixed order."""
    captions = options.stage == 1 and is_table(options.data)  # may be beside filter_cap.json
    described = not captions and Path(options.data, "filter_cap.json").exists()
    if options.instructions and not described:
        raise UserError(
            "“--instructions” needs the layout of the second stage (filter_cap.json): write those "
            "for other data into the data itself, such as a table's “instruction” column."
        )
    if captions:
        return read_table(options.data)
    found = read_captioned(options.data, options.limit)
    if options.instructions:
        found = merge([*found, *read_instructions(options.instructions, options.data)])
    return found


def instructions(stage: int, config: ModelConfig) -> tuple[str, ...]:
    """The instructions for texts without one of their own.

    The published first stage has none; the extended one asks for a short caption.
    """
    if stage == 2:
        return prompt_lines("alignment.txt")
    return prompt_lines("caption.txt") if config.recipe == "extended" else ()


def _open(options: argparse.Namespace, config: ModelConfig, accelerator: Accelerator):
    """The model on this process's device; its projection is new (stage 1) or read from --init."""
    given = start.given_places(options)
    given.pop("projection", None)
    if config.small:
        with accelerator.main_process_first():
            download_weights(config, given=given)
    projection = options.init or options.projection
    files = find_weights(config, projection, new_projection=projection is None, given=given)
    # Gradients pass through the language model, which needs the range of bfloat16.
    quantize: Quantize = "none" if options.quantize == "auto" else options.quantize
    if quantize == "int4":
        raise UserError("Training needs more than int4: choose “--quantize none”, int8 or nf4.")
    dtype = options.dtype
    if dtype == "auto" and accelerator.device.type == "cuda":
        dtype = torch.bfloat16
    model = load_model(config, files, accelerator.device, quantize, dtype, seed=options.seed)
    if options.recompute:
        recompute_activations(model.torch_llm)
    if projection is None and isinstance(config.bridge, PooledMap):
        name_classes(model)
    return model
