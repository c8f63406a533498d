"""Options -> a loaded model: what the command line and the page share."""

import argparse
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.config import MODELS, ModelConfig, Quantize, get_model
from minigpt4.errors import Report, UserError, say

if TYPE_CHECKING:
    import torch

    from minigpt4.engine import Engine, Sampling
    from minigpt4.model.minigpt4 import MiniGPT4
    from minigpt4.remote.engine import RemoteEngine


PROBE_SECONDS = 30.0  # for a first token of each server


def add_model_options(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """--model, --quantize, --device, and where the weights are."""
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
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_places(parser)


def add_places(parser: argparse.ArgumentParser) -> None:
    """--projection, --vision, --qformer, --llm: the user's own, for a model's weights."""
    group = parser.add_argument_group(
        "weights (a path, a URL, or a Hugging Face repository as OWNER/NAME or OWNER/NAME:FILE; "
        "also from the environment: MINIGPT4_LLM for example)"
    )
    for role, text in (
        ("projection", "another trained projection; its shape tells “auto” the model"),
        ("vision", "EVA ViT-g, or nano's encoder"),
        ("qformer", "BLIP-2's Q-Former"),
        ("llm", "the language model's folder"),
    ):
        default = os.environ.get(f"MINIGPT4_{role.upper()}") or None
        group.add_argument(f"--{role}", metavar="PLACE", default=default, help=text)


def given_places(options: argparse.Namespace) -> dict[str, str]:
    """Role -> the user's own place for it."""
    roles = ("projection", "vision", "qformer", "llm")
    return {role: place for role in roles if (place := getattr(options, role, None))}


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """--llm-url, --llm-key: the language model on other machines."""
    group = parser.add_argument_group("language model on other machines (docs/scaling.md)")
    group.add_argument(
        "--llm-url",
        metavar="URLS",
        default=os.environ.get("MINIGPT4_LLM_URL"),
        help="vLLM servers started with --enable-prompt-embeds, with commas between: "
        "http://HOST:8000/v1,… (also $MINIGPT4_LLM_URL)",
    )
    group.add_argument(
        "--llm-key",
        metavar="KEY",
        default=os.environ.get("MINIGPT4_LLM_KEY", ""),
        help="what they were started with as --api-key (better: $MINIGPT4_LLM_KEY)",
    )


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


def upload_folder() -> str:
    """Where the page keeps uploads for its time: this user's alone, so that nobody else reads them
    and nobody else's files are there when old ones are deleted.

    It is made here. Where something else has its name, as another user could have arranged, it is
    a new folder of another name.
    """
    if not hasattr(os, "getuid"):  # Windows, where each user has temporary files of their own
        return str(Path(tempfile.gettempdir(), "minigpt4"))
    folder = Path(tempfile.gettempdir(), f"minigpt4-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not where a link leads to
    others = found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others:
        return str(folder)
    return tempfile.mkdtemp(prefix="minigpt4-")


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


def open_model(options: argparse.Namespace, report: Report = say) -> "MiniGPT4":
    """Load the model that the options name, fetching what is missing of it; `auto` falls back to
    nano where the weights of a bigger one cannot be had.

    `report` is told in one line what is being done.
    """
    from minigpt4.weights.load import download_weights, find_weights, load_model, owner_of

    device, given = device_of(options.device), given_places(options)

    def load(config: ModelConfig, given: dict[str, str]) -> "MiniGPT4":
        download_weights(config, report, given)
        report(f"Loading {config.name} …")
        files = find_weights(config, given=given)
        quantize = quantize_of(options.quantize, config, device)
        return load_model(config, files, device, quantize)

    if options.model != "auto":
        return load(get_model(options.model), given)
    if owner := owner_of(given.get("projection")):
        report(f"Model: {owner}, because the projection is made for it.")
        return load(get_model(owner), given)
    config, why = choose(free_gpu_memory() if device.type == "cuda" else None)
    report(f"Model: {config.name}, because {why}.")
    if config.name == "nano":
        return load(config, given)
    try:
        return load(config, given)
    except UserError as error:
        report(f"{error} Going on with nano.")
    return load(get_model("nano"), {})  # what was given is for the bigger one


def open_engine(
    options: argparse.Namespace,
    report: Report = say,
    kv_megabytes: int | None = None,
    **limits: int,
) -> "Engine | RemoteEngine":
    """The engine that the options name: of the language model here, or at --llm-url.

    limits: max_running, max_waiting; kv_megabytes: the memory for a language model here.
    """
    if options.llm_url:
        return _open_remote(options, report, limits)
    model = open_model(options, report)
    from minigpt4.engine import Engine  # takes seconds: what is wrong is said first

    return Engine(model, kv_megabytes=kv_megabytes, **limits)


def _open_remote(
    options: argparse.Namespace, report: Report, limits: dict[str, int]
) -> "RemoteEngine":
    if options.model == "auto":
        raise UserError("With --llm-url, say which model its servers run: --model vicuna-7b.")
    if options.quantize != "auto":
        raise UserError(
            "--quantize is for a language model on this machine: with --llm-url, choose the "
            "precision where its servers are started."
        )
    options.quantize = "remote"
    model = open_model(options, report)
    from minigpt4.remote.engine import RemoteEngine
    from minigpt4.remote.vllm import VllmServers

    urls = options.llm_url.split(",")
    servers = VllmServers(model, urls, options.llm_key)
    if "max_running" in limits:
        limits["max_running"] *= len(urls)
    engine = RemoteEngine(model, servers, **limits)
    outcomes = engine.call(servers.probe_all(PROBE_SECONDS), PROBE_SECONDS + 5)
    for url, error in outcomes.items():
        report(f"{url}: {error or 'ready'}")
    if all(outcomes.values()):
        engine.close()
        raise next(iter(outcomes.values()))
    report(
        "The language model runs there: without beam search, and the repetition penalty covers "
        "what is answered without a break."
    )
    return engine
