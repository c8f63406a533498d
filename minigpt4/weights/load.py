"""A model's weights: find the files, download what is missing, assemble the model."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt4.config import MODELS, ModelConfig, Quantize
from minigpt4.errors import Count, Report, Step, UserError, ignore, say
from minigpt4.model.bridge import build_bridge
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.parts import ClassesAndObjects, EfficientNetLite, EvaViT, QFormer
from minigpt4.model.vision import build_encoder
from minigpt4.model.words import load_words
from minigpt4.weights.adapters import adapted
from minigpt4.weights.checkpoint import (
    check_projection,
    efficientnet_tensors,
    eva_tensors,
    load_strict,
    qformer_tensors,
    read_checkpoint,
    read_projection,
)
from minigpt4.weights.convert import blocks_folder
from minigpt4.weights.encoder import INT8, load_int8_encoder
from minigpt4.weights.folder import read_config, shards_of
from minigpt4.weights.gguf import INDEX, BlockLlama, Quantizer, gguf_of, read_width
from minigpt4.weights.llm import load_llm
from minigpt4.weights.sources import (
    ROLES,
    file_name,
    local_place,
    locate,
    missing,
    sources,
    weights_folder,
)


@dataclass(frozen=True)
class WeightFiles:
    """The files that one model is assembled from.

    llm: a Hugging Face Llama's folder; projection: None only if a new one is to be trained;
    qformer: None only if the bridge is not a Q-Former.
    """

    vision: Path
    llm: Path
    projection: Path | None = None
    qformer: Path | None = None
    detector: Path | None = None
    words: Path | None = None  # None: they are to be trained, or the model has none


def owner_of(given: Mapping[str, str], report: Report = say) -> str | None:
    """The one model that the user's own weights (role -> place) fit, according to the shapes of
    those on this machine; None if none are given. UserError if no model fits, or several do."""
    if not given:
        return None
    shape = width = None
    if (place := given.get("projection")) and (path := local_place(place)) and path.is_file():
        shape = tuple(read_projection(path)["weight"].shape)
    if (place := given.get("llm")) and (path := local_place(place)):
        width = _width_of(path, report)
    fitting = [
        model.name
        for model in MODELS.values()
        if shape in (None, (model.llm_hidden_size, model.projection_in))
        and width in (None, model.llm_hidden_size)
        and given.keys() <= {*model.files, "projection"}
    ]
    if len(fitting) == 1:
        return fitting[0]
    places = " and ".join(f"“--{role} {place}”" for role, place in given.items())
    if not fitting:
        of_width = f" (a language model of width {width})" if width else ""
        raise UserError(
            f"No model has the shapes of {places}{of_width}: give others, or name the model that "
            "they are for with “--model”."
        )
    names = f"{', '.join(fitting[:-1])} or {fitting[-1]}"
    raise UserError(f"{places} may be for {names}: name the model with “--model”.")


def _width_of(llm: Path, report: Report) -> int | None:
    """The hidden size of a language model (a folder or a GGUF file); None if it cannot be read:
    loading reports why."""
    try:
        if (made := blocks_folder(llm) / INDEX).exists():
            return BlockLlama.open(made.parent).hidden_size
        if llm.is_dir():
            return int(read_config(llm)["hidden_size"])
        report(Step("reading", "Reading {name} (once) …", name=llm.name))
        return read_width(llm)
    except Exception:  # anything, for a damaged file
        return None


def download_weights(
    config: ModelConfig, report: Report = say, given: Mapping[str, str] | None = None
) -> None:
    """Download what is missing of a model's weights, and report the progress.

    given: role -> the user's own place for it, as an option names it. UserError if a part is not
    available.
    """
    if missing(config, given or {}):
        from minigpt4.weights.download import download  # its client takes a while to import

        download(config, given or {}, report)


def find_weights(
    config: ModelConfig,
    projection: str | None = None,
    new_projection: bool = False,
    given: Mapping[str, str] | None = None,
) -> WeightFiles:
    """The model's local files; UserError lists what is missing.

    projection: a file instead of the model's own; new_projection: for training, which starts
    without one, and without words; given: role -> the user's own place for it.
    """
    given = dict(given or {}) | ({"projection": str(projection)} if projection else {})
    roles = [r for r in ROLES if r in config.files or r == "projection"]
    if useless := sorted(set(given) - set(roles)):
        raise UserError(
            f"{config.name} has no such part: leave out “--{useless[0]}”, or choose another "
            "“--model”."
        )
    if new_projection:
        roles = [role for role in roles if role not in ("projection", "words")]
    located = {role: locate(config, role, given.get(role)) for role in roles}
    paths = {role: path for role, path in located.items() if path is not None}
    absent = {role: _wanted(config, role, given) for role in roles if role not in paths}
    if "projection" in absent and not sources(config, "projection", given.get("projection")):
        raise UserError(
            f"{config.name}'s trained projection ({absent['projection']}) is missing from "
            f"this installation: install minigpt4 again, put the file into {weights_folder()}, or "
            "name another with “--projection”."
        )
    if absent:
        raise UserError(
            f"Weights of {config.name} are missing ({', '.join(absent.values())}): run “python -m "
            f"minigpt4 download {config.name}”, or put the files into {weights_folder()}."
        )
    return WeightFiles(**paths)


def _wanted(config: ModelConfig, role: str, given: Mapping[str, str]) -> str:
    """The name of a missing part in messages: the user's place for it, or its file's name."""
    choices = sources(config, role)
    own = file_name(config, role, choices[0]) if choices else config.projection_file
    return given.get(role) or own


def projection_tensors(model: MiniGPT4) -> dict[str, Tensor]:
    """The content of a model's projection file: the projection, and `ln_vision` if it is not in the
    Q-Former's file."""
    tensors = dict(model.projection.state_dict())
    if _brings_norm(model.config):
        norm = model.encoder.vit.post_layernorm
        tensors |= {"ln_vision.weight": norm.weight, "ln_vision.bias": norm.bias}
    return tensors


def load_model(
    config: ModelConfig,
    files: WeightFiles,
    device: str | torch.device = "cpu",
    quantize: Quantize = "auto",
    llm_dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    vision_dtype: torch.dtype | None = None,
    count: Count = ignore,
    adapters: bool = True,
    quantizer: Quantizer | None = None,
) -> MiniGPT4:
    """Assemble the model from its files.

    quantize: of the language model only; "auto" is w8a16 for the big models on a GPU, else none.
    llm_dtype: a type, or a name for `llm.choose_dtype`. seed: of a new, random projection, for
    training, if `files` names none. vision_dtype: of encoder, bridge and projection; None is 16 bit
    on a GPU and 32 bit on the CPU. count: is called with the bytes of the large files as they are
    read. adapters: add those in the projection's file to the language model (False while they are
    trained). quantizer: see `adapters.adapted`.

    UserError if a file is missing or does not fit, or would leave any weight unloaded.
    """
    device = torch.device(device)
    dtype = vision_dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if quantize == "auto":
        big = config.gpu_gigabytes > 0 or config.llm_hidden_size >= 4096
        quantize = "w8a16" if device.type == "cuda" and big else "none"
    projected = _read_projection(config, files, seed)
    vision = _load_vision(config, files, projected, dtype, count)
    encoder, bridge, projection = (part.to(device) for part in vision)
    llm, tokenizer = load_llm(config, files.llm, device, quantize, llm_dtype, count)
    if adapters and files.projection:
        llm = adapted(llm, files.projection, config, quantizer)
    words = load_words(files.words).to(device) if files.words else None
    return MiniGPT4(config, encoder, bridge, projection, llm, tokenizer, quantize, words)


def bytes_to_load(files: WeightFiles, quantize: Quantize) -> tuple[int, int]:
    """(bytes of the large files that `load_model` reads, bytes of 4-bit blocks, which the engine
    reads). Small encoders are not counted."""
    vision = _size(files.vision) + _size(files.qformer)
    if quantize == "int4":
        return vision, _size(gguf_of(files.llm))
    shards: list[Path] = []
    if quantize != "remote":
        with suppress(OSError, ValueError):  # loading reports it
            shards = shards_of(files.llm)
    return vision + sum(map(_size, shards)), 0


def _size(path: Path | None) -> int:
    return path.stat().st_size if path and path.exists() else 0


def _read_projection(config: ModelConfig, files: WeightFiles, seed: int | None) -> dict:
    if files.projection is not None:
        tensors = read_projection(files.projection)
        check_projection(tensors, config, files.projection)
        return tensors
    if seed is None:
        raise UserError(
            f"{config.name} has no trained projection here ({config.projection_file}), and would "
            "answer nonsense without one: name it with “--projection”, or train one first."
        )
    return _new_projection(config, seed)


def _load_vision(
    config: ModelConfig, files: WeightFiles, projected: dict, dtype: torch.dtype, count: Count
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder, bridge and projection in `dtype`, on the CPU."""
    with torch.device("meta"):
        encoder, bridge = build_encoder(config.vision), build_bridge(config)
        projection = nn.Linear(config.projection_in, config.llm_hidden_size)
    norm = {k: v for k, v in projected.items() if k.startswith("ln_vision.")}
    if isinstance(config.bridge, QFormer):
        if files.qformer is None:
            raise UserError(
                f"{config.name} needs a Q-Former's weights: run “python -m minigpt4 download "
                f"{config.name}”, or name the file with “--qformer”."
            )
        state = read_checkpoint(files.qformer)
        norm = {k: v for k, v in state.items() if k.startswith("ln_vision.")} | norm
        load_strict(bridge, qformer_tensors(state), files.qformer, "Q-Former", dtype, count)
    encoder = _load_encoder(config, files, encoder, bridge, norm, dtype, count)
    place = files.projection or Path(config.projection_file)
    load_strict(projection, projected, place, "projection", dtype)
    for part in (encoder, bridge, projection):
        refuse_unloaded(part)
    return encoder, bridge, projection


def _load_encoder(
    config: ModelConfig,
    files: WeightFiles,
    encoder: nn.Module,
    bridge: nn.Module,
    norm: dict[str, Tensor],
    dtype: torch.dtype,
    count: Count,
) -> nn.Module:
    """The encoder with its weights; the bridge's weights in the encoder's file are loaded, too.

    norm: the ViT's final norm, from another file.
    """
    eight_bit = files.vision.name.endswith(INT8)
    state = {} if eight_bit else read_checkpoint(files.vision)
    match config.vision:
        case EvaViT() if eight_bit:
            encoder = load_int8_encoder(config.vision, files.vision, norm, dtype)
            count(_size(files.vision))
        case EvaViT():
            tensors = eva_tensors(state | norm, config.vision)
            load_strict(encoder, tensors, files.vision, "EVA ViT-g", dtype, count)
        case EfficientNetLite():
            network, classifier = efficientnet_tensors(state)
            load_strict(encoder, network, files.vision, config.vision.name, dtype)
            load_strict(bridge, classifier, files.vision, "classifier", dtype)
        case ClassesAndObjects(classifier=seen):
            network, classifier = efficientnet_tensors(state)
            load_strict(encoder.classifier, network, files.vision, seen.name, dtype)
            load_strict(bridge, classifier, files.vision, "classifier", dtype)
            if files.detector is None:
                raise UserError(
                    f"{config.name} needs a detector's weights: install minigpt4 again."
                )
            objects = read_checkpoint(files.detector)
            load_strict(encoder.detector, objects, files.detector, "detector", dtype)
        case _:
            raise TypeError(f"_load_encoder has no case for a {type(config.vision).__name__}")
    return encoder


def refuse_unloaded(part: nn.Module) -> None:
    """UserError if a parameter or buffer has no values yet; `llm.py` checks the language model."""
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        if tensor.is_meta:
            raise UserError(
                f"No file holds the weight “{name}”, without which the model would answer "
                "nonsense: fetch the weights again with “python -m minigpt4 download”."
            )


def _new_projection(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """A random projection. Its weights are small, so that the image embeddings do not overwhelm
    those of words in the first steps."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(config.llm_hidden_size, config.projection_in, generator=generator)
    weight *= 0.06 / config.projection_in**0.5
    tensors = {"weight": weight, "bias": torch.zeros(config.llm_hidden_size)}
    if _brings_norm(config):
        hidden = config.features.width
        tensors |= {"ln_vision.weight": torch.ones(hidden), "ln_vision.bias": torch.zeros(hidden)}
    return tensors


def _brings_norm(config: ModelConfig) -> bool:
    """Is the ViT's final norm in the projection's file? It is if there is no Q-Former's file."""
    return isinstance(config.vision, EvaViT) and not isinstance(config.bridge, QFormer)
