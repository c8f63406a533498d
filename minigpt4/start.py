"""The start: options -> a loaded model or engine, for the command line, the page and Python."""

import argparse
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from minigpt4._data import cache_folder
from minigpt4.config import DEFAULT_MODEL, MODELS, ModelConfig, Quantize, get_model
from minigpt4.errors import Report, Step, UserError, out_of_memory, say
from minigpt4.model.parts import EvaViT

T = TypeVar("T")

if TYPE_CHECKING:
    import torch

    from minigpt4.engine import AnyEngine, Sampling
    from minigpt4.engine.pictures import EmbeddingStore
    from minigpt4.model.minigpt4 import MiniGPT4
    from minigpt4.remote.engine import RemoteEngine
    from minigpt4.remote.vllm import VllmServers
    from minigpt4.weights.load import WeightFiles
    from minigpt4.weights.transfer import Progress

    Finish = Callable[[MiniGPT4, Progress], T]

# If a step takes longer, the model hangs. A large model's step may take a minute on a CPU that is
# busy and short of memory.
HANG_SECONDS, SLOW_HANG_SECONDS = 60.0, 300.0
SELECTED = "Model: {name}, because {why}."
LEAST_MEMORY = 10**9  # bytes of address space: PyTorch alone takes 700 MB
PROBE_SECONDS = 30.0  # for the first token of each server
PROBE_MARGIN = 5.0  # seconds more, for all of them to report


def given_places(options: argparse.Namespace) -> dict[str, str]:
    """Role -> the user's own place of the weights for it, as an option names it."""
    roles = ("projection", "vision", "qformer", "llm")
    return {role: place for role in roles if (place := getattr(options, role, None))}


def given_sampling(options: argparse.Namespace) -> dict[str, float]:
    """The fields of `Sampling` that the options set. UserError for an invalid value."""
    from minigpt4.engine.sampling import Sampling

    given = {f.name: getattr(options, f.name) for f in fields(Sampling)}
    given = {name: value for name, value in given.items() if value is not None}
    Sampling(**given)  # reports a mistake before minutes of loading
    return given


def default_sampling(config: ModelConfig, **given) -> "Sampling":
    """The published demo's sampling, changed by the model's own defaults, then by `given`."""
    from minigpt4.engine.sampling import Sampling

    names = [field.name for field in fields(Sampling)]
    for name in given:
        if name not in names:
            raise UserError(f"There is no sampling option “{name}”: choose {', '.join(names)}.")
    given = {name: value for name, value in given.items() if value is not None}
    return Sampling(**(config.sampling | given))


def choose(free_gpu_bytes: int | None, free_bytes: int | None = None) -> tuple[ModelConfig, Step]:
    """The model that “auto” selects, and why: the largest that fits into the free memory.

    On a GPU, missing weights are downloaded. Without a GPU, or if it is too small, only models are
    considered whose weights are here or are a small download. free_bytes: the computer's free
    memory; None: unknown, as on macOS and Windows.
    """
    from minigpt4.weights.sources import missing

    default, gpu = get_model(DEFAULT_MODEL), Step("no_gpu", "no GPU was found")
    if free_gpu_bytes is not None:
        gpu = Step("gpu", "the GPU has {size} free", size=f"{free_gpu_bytes / 1e9:.0f} GB")
        fitting = [m for m in MODELS.values() if 0 < m.gpu_gigabytes <= free_gpu_bytes / 1e9]
        if fitting:
            return max(fitting, key=lambda m: m.gpu_gigabytes), gpu
        gpu = Step("small_gpu", "{why}, too little for a larger one", why=gpu)
    if free_bytes is None:
        return _small()[0], gpu
    free = free_bytes / 1e9
    fitting = [
        model
        for model in MODELS.values()
        if 0 < model.cpu_gigabytes <= free
        if model.small or not missing(model, {})
    ]
    best = max(fitting, key=lambda m: m.cpu_gigabytes, default=default)
    text = "{why}, and {size} of memory are free"
    return best, Step("free", text, why=gpu, size=f"{free:.1f} GB")


def _small() -> list[ModelConfig]:
    """The models that any computer can run, the largest first."""
    small = [model for model in MODELS.values() if model.small]
    return sorted(small, key=lambda m: -m.cpu_gigabytes)


def free_gpu_memory(device: "torch.device") -> int | None:
    """Bytes free on a GPU; None for the CPU."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def device_of(name: str) -> "torch.device":
    """The device called `name`; "auto" is the first GPU, else the CPU.

    UserError if there is no such device.
    """
    import torch

    if name != "cpu":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        if not available and any("driver" in str(w.message) for w in caught):
            problem = "The GPU's driver does not fit this PyTorch: update it, or install a PyTorch"
            problem += " built for its CUDA version."
            if name != "auto":
                raise UserError(f"{problem} “--device cpu” runs without it.")
            say(f"{problem} Continuing without the GPU.")
        if name == "auto":
            name = "cuda" if available else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"There is no device “{name}”: choose cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"There is no GPU “{name}” here: choose “--device cpu” or another.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"“{name}” is not supported: choose cpu, cuda or cuda:N.")
    return device


def quantize_of(
    name: Quantize, config: ModelConfig, device: "torch.device", report: Report = say
) -> Quantize:
    """The precision, with “auto” resolved for this model and device. For int4, the kernels are
    compiled if they are not yet. UserError if int4 is requested but not available."""
    if name not in ("auto", "int4") or (name == "auto" and not config.has_4bit_blocks):
        return name
    if device.type != "cpu":
        if name == "auto":
            return name
        raise UserError("“--quantize int4” works on the CPU: choose int8, nf4 or none.")
    from minigpt4.engine.kernels.build import library, must_compile, why_not

    if must_compile():
        report(Step("compiling", "Compiling the CPU kernels (once) …"))
    if library() is not None:
        return "int4"
    why, advice = why_not()
    if name == "int4":
        raise UserError(f"{why}, and “--quantize int4” needs one: {advice}.")
    say(f"{why}, so {config.name} runs in PyTorch, several times slower: {advice}.")
    return "none"


def prepare(
    config: ModelConfig, files: "WeightFiles", quantize: Quantize, report: Report = say
) -> "WeightFiles":
    """The files to load: for “int4”, the language model's 4-bit blocks and the large encoder's
    8-bit weights, which are made if they are missing."""
    if quantize != "int4":
        return files
    from minigpt4.engine.decoder import threads
    from minigpt4.engine.native import quantize as quantizer
    from minigpt4.weights.convert import make_blocks
    from minigpt4.weights.encoder import make_int8

    llm = make_blocks(config, files.llm, quantizer, threads(), report)
    vision = files.vision
    if isinstance(config.vision, EvaViT):
        vision = make_int8(config.vision, files.vision, report)
    return replace(files, llm=llm, vision=vision)


def _load(
    config: ModelConfig,
    files: "WeightFiles",
    device: "torch.device",
    quantize: Quantize,
    dtype: str,
    report: Report,
    finish: "Finish[T]",
) -> "T":
    """Check the memory, convert, load, finish. UserError if the memory is too small."""
    from minigpt4.engine.native import quantize as quantizer
    from minigpt4.weights.llm import choose_dtype
    from minigpt4.weights.load import bytes_to_load, load_model
    from minigpt4.weights.memory import check_memory, too_little
    from minigpt4.weights.transfer import Progress

    on_cpu = device.type == "cpu"
    vision_dtype = None
    if on_cpu:
        computing = choose_dtype(dtype)
        vision_dtype = computing if config.vision.large else None
        check_memory(config, files.llm, quantize, computing, vision_dtype)

    def assemble(files: "WeightFiles") -> "T":  # a function, so that its frame releases the model
        report(Step("opening", "Loading {name} …", name=config.name))
        read_here, read_by_engine = bytes_to_load(files, quantize)
        total = read_here + read_by_engine
        with closing(Progress(config.name, total, report, "Loading")) as progress:
            with progress.file(read_here) as count:
                model = load_model(
                    config,
                    files,
                    device,
                    quantize,
                    dtype,
                    vision_dtype=vision_dtype,
                    count=count,
                    quantizer=quantizer,
                )
            return finish(model, progress)

    try:
        return assemble(prepare(config, files, quantize, report))
    except Exception as error:
        if not _too_large(error):
            raise
    # Here the traceback, which holds the model, is gone: the free memory is known.
    if on_cpu:
        raise too_little(config, quantize)
    raise UserError(
        f"The memory of {device} is too small for {config.name} with “--quantize {quantize}”: "
        "close what else uses the GPU, or choose a smaller --model or “--device cpu”.",
        "memory",
    )


def _too_large(error: Exception) -> bool:
    """Is there too little memory for the model, or for a conversation beside it?"""
    return out_of_memory(error) or (isinstance(error, UserError) and error.kind == "memory")


def open_model(options: argparse.Namespace, report: Report = say) -> "MiniGPT4":
    """Load the model that the options name; missing weights are downloaded.

    If “auto” selects a model whose weights are not available or do not fit, the next smaller one
    that any computer can run is loaded instead. `report` receives one line for each step.
    """
    return _open(options, report, lambda model, progress: model)


def _open(options: argparse.Namespace, report: Report, finish: "Finish[T]") -> "T":
    """The result of `finish`, which gets the model and the progress of loading, to be completed. If
    there is too little memory, “auto” continues with a smaller model."""
    _check_limit()
    from minigpt4.weights.load import download_weights, find_weights, owner_of

    if "/" in options.model:
        options = _shared(options)
    device, given = device_of(options.device), given_places(options)
    dtype, kv_bits = getattr(options, "dtype", "auto"), getattr(options, "kv_bits", "auto")

    def load(config: ModelConfig) -> "T":
        if kv_bits != "auto":
            config = replace(config, kv_bits=int(kv_bits))
        download_weights(config, report, given)
        files = find_weights(config, given=given)
        quantize = quantize_of(options.quantize, config, device, report)
        return _load(config, files, device, quantize, dtype, report, finish)

    if options.model != "auto":
        return load(get_model(options.model))
    if owner := owner_of(given, report):
        why = Step("given", "the weights that you gave fit it alone")
        report(Step("model", SELECTED, name=owner, why=why))
        return load(get_model(owner))
    from minigpt4.weights.memory import free_memory

    free_gpu = free_gpu_memory(device)
    asked_for = device.type != "cpu" and options.device != "auto"  # only this GPU is wanted
    config, why = choose(free_gpu, None if asked_for else free_memory())
    fits = free_gpu is None or 0 < config.gpu_gigabytes <= free_gpu / 1e9
    if not fits and not asked_for:
        device = device_of("cpu")
    report(Step("model", SELECTED, name=config.name, why=why))
    for smaller in _small():
        if config.small and smaller.cpu_gigabytes >= config.cpu_gigabytes:
            continue
        try:
            return load(config)
        except UserError as error:
            report(f"{error} Continuing with {smaller.name}.")
        config = smaller
    return load(config)


def _check_limit() -> None:
    """UserError if the memory limit is too low even for PyTorch, which would abort."""
    with suppress(ImportError):  # Windows has no such limits
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if 0 <= limit < LEAST_MEMORY:
            raise UserError(
                f"The limit on memory (ulimit -v) is {limit / 1e6:.0f} MB, and no model runs in "
                f"less than {LEAST_MEMORY / 1e9:.0f} GB: raise it."
            )


def _shared(options: argparse.Namespace) -> argparse.Namespace:
    """The options with the model and projection of the hub's repository that --model names."""
    from minigpt4.weights.share import resolve

    if Path(options.model).exists():
        raise UserError(
            f"“{options.model}” is a path on this machine, not the name of a model: give the file "
            "of its projection with “--projection”, which selects the model."
        )
    found = resolve(options.model)
    if found and options.projection:
        raise UserError(
            f"“{options.model}” brings a projection of its own: omit “--projection”, or name the "
            f"model itself, “--model {found[0]}”."
        )
    model, projection = found or (options.model, options.projection)
    return argparse.Namespace(**vars(options) | {"model": model, "projection": projection})


def open_engine(
    options: argparse.Namespace,
    report: Report = say,
    kv_megabytes: int | None = None,
    **limits: Any,
) -> "AnyEngine":
    """The engine that the options name; its language model runs here or at --llm-url.

    limits: max_running and max_waiting, in requests.
    kv_megabytes: memory for the key-value cache of a language model that runs here.
    """
    if options.llm_url:
        return _open_remote(options, report, limits)

    def build(model: "MiniGPT4", progress: "Progress") -> "AnyEngine":
        from minigpt4.engine import Engine  # takes seconds: mistakes are reported first

        store = _embedding_store(model, options.embeddings_mb)
        slow = model.device.type == "cpu" and not model.config.small
        with progress.file(progress.total - progress.done) as count:
            return Engine(
                model,
                kv_megabytes=kv_megabytes,
                store=store,
                count=count,
                hang_seconds=SLOW_HANG_SECONDS if slow else HANG_SECONDS,
                **limits,
            )

    return _open(options, report, build)


def _embedding_store(model: "MiniGPT4", megabytes: int) -> "EmbeddingStore | None":
    """The store, of up to `megabytes`, for embeddings that take seconds to compute."""
    if model.device.type != "cpu" or not model.config.vision.large:
        return None
    from minigpt4.engine.pictures import EmbeddingStore

    return EmbeddingStore(cache_folder() / "embeddings", model, megabytes)


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
    model = open_model(argparse.Namespace(**vars(options) | {"quantize": "remote"}), report)
    from minigpt4.remote.engine import RemoteEngine
    from minigpt4.remote.vllm import VllmServers

    urls = options.llm_url.split(",")
    store = _embedding_store(model, options.embeddings_mb)
    servers = VllmServers(model, urls, options.llm_key, store)
    if "max_running" in limits:
        limits["max_running"] *= len(urls)
    engine = RemoteEngine(model, servers, **limits)
    try:
        _probe(engine, servers, report)
    except BaseException:
        engine.close()
        raise
    report(
        "The language model runs there. Beam search is not available, and the repetition penalty "
        "covers only what is answered without an interruption."
    )
    return engine


def _probe(engine: "RemoteEngine", servers: "VllmServers", report: Report) -> None:
    """Report which servers answer. UserError if none does."""
    try:
        outcomes = engine.call(servers.probe_all(PROBE_SECONDS), PROBE_SECONDS + PROBE_MARGIN)
    except TimeoutError:
        raise UserError(
            "The language model's servers do not answer: check --llm-url and the servers' logs."
        ) from None
    for url, error in outcomes.items():
        report(f"{url}: {error or 'ready'}")
    if all(outcomes.values()):
        raise next(iter(outcomes.values()))
