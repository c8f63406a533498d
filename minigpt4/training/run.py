"""python -m minigpt4 train: options -> data, recipe, trainer."""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from minigpt4 import start
from minigpt4.config import ModelConfig, PooledMap, Schedule, get_model
from minigpt4.errors import UserError
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.training import data, questions
from minigpt4.training.table import is_table, read_table
from minigpt4.training.trainer import Recipe, Trainer
from minigpt4.weights import load as weights


def train(options: argparse.Namespace) -> None:
    """Run one stage and say where the projection is."""
    config = get_model("nano" if options.model == "auto" else options.model)
    if config.words:
        from minigpt4.training import small_run

        return small_run.train(options, config)
    if not options.stage:
        raise UserError(f"{config.name} is trained in two stages: give “--stage 1” or “--stage 2”.")
    schedule = schedule_of(options, config)
    embedded = isinstance(config.bridge, PooledMap)
    if options.denoise and not embedded:
        raise UserError(
            f"“--denoise” compares pictures with their mirror images, which the training of "
            f"{config.name} does not show: leave it out."
        )
    if options.crop and options.cache:
        raise UserError(
            "“--crop” shows another part of a picture each time, so nothing can be kept: leave "
            "“--cache” out."
        )
    if options.samples and options.questions and options.stage == 1 and not options.replay:
        raise UserError(
            "“--samples” takes all of the first stage's pictures, so “--questions” would never be "
            "asked: leave one of them out."
        )
    examples = read_examples(options)[: options.limit]
    if not examples:
        raise UserError(f"{options.data} holds no pictures with texts: there is nothing to learn.")
    replay = read_captioned(options.replay, captioning()) if options.replay else []
    replay_share = options.replay_share if replay else 0.0
    if options.samples and options.stage == 1 and not replay:  # all of it is scored
        examples, replay, replay_share = [], examples, 1.0
    if options.questions:
        examples += questions.ask_about(replay or examples, options.questions, options.seed)
    accelerator = Accelerator(cpu=start.device_of(options.device).type == "cpu")
    model = _open(options, config, accelerator)
    recipe = Recipe(
        schedule=schedule,
        instructions=instructions(options.stage, embedded),
        seed=options.seed,
        replay_share=replay_share,
        samples=options.samples if replay else 0,
        reward_weight=options.reward_weight,
        blend=options.blend,
        consensus=options.consensus,
        denoise=options.denoise,
        eigenbasis=embedded,
        mirror=embedded,
        crop=options.crop or not embedded,
        metadata={
            "model": config.name,
            "stage": str(options.stage),
            "command": shlex.join(["python", "-m", "minigpt4", *sys.argv[1:]]),
            "pictures": str(len(examples) + len(replay)),
        },
    )
    cache = Path(options.cache) if options.cache else None
    trainer = Trainer(model, examples, recipe, options.out, accelerator, cache, replay)
    if trainer.resume() and trainer.main:
        start.say(f"Resuming at step {trainer.step} of {schedule.steps}.")
    path = trainer.run()
    if trainer.main:
        start.say(f"The projection is in {path}; the loss curve beside it in loss.png, loss.csv.")


def schedule_of(options: argparse.Namespace, config: ModelConfig) -> Schedule:
    """The stage's schedule with what the options change; fewer steps warm up as much shorter."""
    schedule = config.stage1 if options.stage == 1 else config.stage2
    overrides = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "peak_lr": options.peak_lr,
    }
    if options.steps is not None and options.steps < schedule.steps:
        overrides["warmup_steps"] = schedule.warmup_steps * options.steps // schedule.steps
    return replace(schedule, **{k: v for k, v in overrides.items() if v is not None})


def read_examples(options: argparse.Namespace) -> list[data.Example]:
    """The data that the options name, pictures in a fixed order."""
    if options.stage == 1:
        return read_captioned(options.data)
    if is_table(options.data) and not Path(options.data, "filter_cap.json").exists():
        if options.instructions:
            raise UserError("With a table, instructions go into its “instruction” column.")
        return read_table(options.data)
    described = data.read_descriptions(options.data)
    if options.instructions:
        asked = data.read_instructions(options.instructions, options.data)
        described = data.merge([described, asked])
    return described


def read_captioned(where: str, instructions: tuple[str, ...] = ()) -> list[data.Example]:
    """Captioned pictures out of shards, or out of a folder with a table."""
    if is_table(where):
        return read_table(where, instructions)
    if Path(where).expanduser().is_dir():
        raise UserError(
            f"{where} holds no table of captions: put a CSV or JSON-lines file beside the "
            "pictures, or name shards (DIR/*.tar)."
        )
    return data.read_shards(where, instructions)


def instructions(stage: int, embedded: bool) -> tuple[str, ...]:
    """What is asked for texts without an instruction of their own.

    The published first stage asks nothing; nano's asks for a short caption.
    """
    if stage == 2:
        return _prompts("alignment.txt")
    return captioning() if embedded else ()


def captioning() -> tuple[str, ...]:
    """Ways to ask for a short caption."""
    return _prompts("caption.txt")


def _prompts(name: str) -> tuple[str, ...]:
    lines = tuple(data.read_lines(name))
    if not lines:
        raise UserError(f"prompts/{name} is empty: write one instruction a line.")
    return lines


def _open(options: argparse.Namespace, config: ModelConfig, accelerator: Accelerator):
    """The model on this process's device, its projection new (stage 1) or read from --init."""
    if config.name == "nano":
        with accelerator.main_process_first():
            weights.download(config)
    if options.stage == 2 and not options.init:
        raise UserError("The second stage starts from the first's projection: give it by “--init”.")
    projection = options.init or options.projection
    files = weights.find(config, projection, new_projection=projection is None)
    # Gradients pass through the language model: 16-bit floats of full range, not int8, carry them.
    quantize = "none" if options.quantize == "auto" else options.quantize
    if quantize == "int4":
        raise UserError("int4 cannot be trained through: choose “--quantize none”, int8 or nf4.")
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else None
    model = weights.load_model(
        config, files, accelerator.device, quantize, dtype, seed=options.seed
    )
    if projection is None and isinstance(config.bridge, PooledMap):
        name_classes(model)
    return model


def name_classes(model: MiniGPT4) -> None:
    """Start a new projection with each class of nano's encoder at the mean of its name's words."""
    names = data.read_lines("imagenet-classes.txt")
    first = model.config.projection_in - len(names)
    for place, name in enumerate(names):
        ids = torch.tensor(model.tokenizer.encode(f" {name}", add_special_tokens=False))
        vector = model.embed_tokens(ids.to(model.device)).float().mean(0)
        model.projection.weight.data[:, first + place] = vector
