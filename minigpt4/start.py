"""Options -> a loaded model: what the command line and the page share."""

import argparse
import sys
from typing import TYPE_CHECKING

from minigpt4.config import MODELS, ModelConfig, Quantize, get_model
from minigpt4.errors import UserError

if TYPE_CHECKING:
    import torch

    from minigpt4.engine import Sampling
    from minigpt4.model import MiniGPT4


def add_model_options(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """--model, --quantize, --projection, --device."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=default,
        help=f"auto, or one of {', '.join(MODELS)} (default: {default})",
    )
    group.add_argument(
        "--quantize",
        default="auto",
        choices=["auto", "int8", "nf4", "int4", "none"],
        help="how the language model is held; auto: int8 for the big models on a GPU, int4 (the "
        "4-bit blocks of nano's file, compiled) for nano on a CPU",
    )
    group.add_argument("--projection", metavar="FILE", help="another trained projection")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--temperature, --top-p, ...; left out, each is the model's default."""
    group = parser.add_argument_group("answer (defaults: the published demo's, or the model's own)")
    for name, kind, text in (
        ("temperature", float, "0 always takes the likeliest word; higher is more varied"),
        ("top-p", float, "draw from the likeliest words that together have this probability"),
        ("top-k", int, "draw from this many likeliest words; 0: no limit"),
        ("min-p", float, "leave out words less likely than this share of the likeliest"),
        ("repetition-penalty", float, "above 1: words already used become less likely"),
        ("max-new-tokens", int, "longest answer, in tokens"),
        ("num-beams", int, "above 1: beam search, which weighs several answers, without drawing"),
        ("seed", int, "the same seed gives the same answer"),
    ):
        group.add_argument(f"--{name}", type=kind, help=text)


def given_sampling(options: argparse.Namespace) -> dict[str, float]:
    """What the options say of `Sampling`; UserError where a value makes no sense."""
    from dataclasses import fields

    from minigpt4.engine.sampling import Sampling

    given = {f.name: getattr(options, f.name) for f in fields(Sampling)}
    given = {name: value for name, value in given.items() if value is not None}
    Sampling(**given)  # said now, not after minutes of loading
    return given


def default_sampling(config: ModelConfig, **given) -> "Sampling":
    """The published demo's sampling, changed by the model's own defaults, then by `given`."""
    from minigpt4.engine.sampling import Sampling

    return Sampling(**(config.sampling | given))


def choose(free_gpu_bytes: int | None) -> tuple[ModelConfig, str]:
    """What `auto` stands for and why: the biggest model that the free GPU memory holds."""
    if free_gpu_bytes is None:
        return get_model("nano"), "no GPU was found"
    free = free_gpu_bytes / 1e9
    fitting = [m for m in MODELS.values() if 0 < m.gpu_gigabytes <= free]
    if not fitting:
        return get_model("nano"), f"the GPU has {free:.0f} GB free, too little for a bigger one"
    best = max(fitting, key=lambda m: m.gpu_gigabytes)
    return best, f"the GPU has {free:.0f} GB free"


def free_gpu_memory() -> int | None:
    """Bytes free on the first GPU; None without one."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def say(line: str) -> None:
    """A line for the person who started the program."""
    print(line, file=sys.stderr, flush=True)


def device_of(name: str) -> "torch.device":
    """The device called `name` ("auto": the first GPU, else the CPU); UserError without it."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"There is no device “{name}”: choose cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"There is no GPU “{name}” here: choose “--device cpu” or another.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"“{name}” is not supported: choose cpu, cuda or cuda:N.")
    return device


def quantize_of(name: Quantize, config: ModelConfig, device: "torch.device") -> Quantize:
    """What “auto” stands for here; UserError where int4 is asked for and cannot be had."""
    in_blocks = config.files["llm"].member.endswith(".gguf")
    if name not in ("auto", "int4") or (name == "auto" and not in_blocks):
        return name
    if not in_blocks or device.type != "cpu":
        if name == "auto":
            return "none"
        raise UserError("“--quantize int4” is for nano on the CPU: choose int8, nf4 or none.")
    from minigpt4.engine.native import library

    if library() is not None:
        return "int4"
    if name == "int4":
        raise UserError("“--quantize int4” needs a C compiler: install gcc or clang, or set $CC.")
    say("No C compiler was found, so nano runs in PyTorch, several times slower: install gcc.")
    return "none"


def open_model(options: argparse.Namespace) -> "MiniGPT4":
    """Load the model that the options name; `auto` falls back to nano where weights are missing."""
    from minigpt4 import weights

    device = device_of(options.device)

    def load(config: ModelConfig) -> "MiniGPT4":
        if config.name == "nano":
            weights.download(config)  # what is missing; it is small
        files = weights.find(config, options.projection)
        quantize = quantize_of(options.quantize, config, device)
        return weights.load_model(config, files, device, quantize)

    if options.model != "auto":
        return load(get_model(options.model))
    config, why = choose(free_gpu_memory() if device.type == "cuda" else None)
    say(f"Model: {config.name}, because {why}.")
    if config.name != "nano":
        try:
            return load(config)
        except UserError as error:
            say(f"{error} Going on with nano.")
    return load(get_model("nano"))
