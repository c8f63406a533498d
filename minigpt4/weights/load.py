"""A model's weights: find the files, assemble the model from them.

Fetching is in fetch.py, reading in checkpoint.py, and what both share about places in places.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt4.config import (
    ClassesAndObjects,
    ConcatPatches,
    EfficientNetLite,
    EvaViT,
    ModelConfig,
    QFormer,
    Quantize,
    model_of_projection,
)
from minigpt4.errors import Report, UserError, say
from minigpt4.model.minigpt4 import MiniGPT4, build_bridge
from minigpt4.model.vision import build_encoder
from minigpt4.model.words import load_words
from minigpt4.weights.checkpoint import (
    check_projection,
    efficientnet_tensors,
    eva_tensors,
    load_strict,
    qformer_tensors,
    read_checkpoint,
    read_projection,
    save_projection,
)
from minigpt4.weights.llm import load_llm
from minigpt4.weights.sources import ROLES, file_name, locate, missing, sources, weights_folder

__all__ = [
    "WeightFiles",
    "check_projection",
    "download",
    "find",
    "load_model",
    "model_of_projection",
    "owner_of",
    "projection_tensors",
    "read_projection",
    "save_projection",
    "weights_folder",
]


@dataclass(frozen=True)
class WeightFiles:
    """The files one model is assembled from."""

    vision: Path
    llm: Path  # a Hugging Face Llama folder
    projection: Path | None  # None: a new one, to be trained
    qformer: Path | None = None
    detector: Path | None = None
    words: Path | None = None  # None: they are to be trained, or the model has none


def owner_of(projection: str | None) -> str | None:
    """The model that a projection file belongs to, by its shape; None where it is not here."""
    if not projection or not Path(projection).expanduser().is_file():
        return None
    return model_of_projection(*read_projection(Path(projection).expanduser())["weight"].shape)


def download(
    config: ModelConfig, report: Report = say, given: Mapping[str, str] | None = None
) -> None:
    """Fetch what is missing of a model's weights; `report` is told of it.

    given: role -> the user's own place for it, as an option names it.
    """
    if missing(config, given or {}):
        from minigpt4.weights import (
            download as fetch,  # its client takes a while to import, and is needed once
        )

        fetch.download(config, given or {}, report)


def find(
    config: ModelConfig,
    projection: str | None = None,
    new_projection: bool = False,
    given: Mapping[str, str] | None = None,
) -> WeightFiles:
    """The model's files where they are here; UserError lists what is missing.

    projection: another file than the model's own; new_projection: none is looked for, nor words;
    given:
    role -> the user's own place for it.
    """
    given = dict(given or {}) | ({"projection": str(projection)} if projection else {})
    roles = [r for r in ROLES if r in config.files or r == "projection"]
    if new_projection:
        roles = [role for role in roles if role not in ("projection", "words")]
    paths = {role: locate(config, role, given.get(role)) for role in roles}
    absent = [
        given.get(role) or file_name(config, role, sources(config, role)[0])
        for role, path in paths.items()
        if path is None and (given.get(role) or sources(config, role))
    ]
    if absent:
        raise UserError(
            f"Weights of {config.name} are missing ({', '.join(absent)}): run “python -m minigpt4 "
            f"download {config.name}”, or put the files into {weights_folder()}."
        )
    return WeightFiles(**{"projection": None, **paths})


def projection_tensors(model: MiniGPT4) -> dict[str, Tensor]:
    """What a model's projection file holds: the projection, and `ln_vision` where no Q-Former
    file brings it."""
    tensors = dict(model.projection.state_dict())
    if isinstance(model.config.bridge, ConcatPatches):
        norm = model.encoder.vit.post_layernorm
        tensors |= {"ln_vision.weight": norm.weight, "ln_vision.bias": norm.bias}
    return tensors


def load_model(
    config: ModelConfig,
    files: WeightFiles,
    device: str | torch.device = "cpu",
    quantize: Quantize = "auto",
    llm_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> MiniGPT4:
    """Assemble the model from its files.

    Encoder, bridge and projection are 16 bit on a GPU and 32 bit on the CPU; `quantize` concerns
    the language model alone ("auto": int8 for the big models on a GPU, else none; "int4" serves
    the engine alone). Without a
    projection file the projection is new, drawn from `seed`.
    """
    device = torch.device(device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        encoder, bridge = build_encoder(config.vision), build_bridge(config)
        projection = nn.Linear(config.projection_in, config.llm_hidden_size)

    if files.projection is None:
        projected = _new_projection(config, seed)
    else:
        projected = read_projection(files.projection)
        check_projection(projected, config, files.projection)
    norm = {k: v for k, v in projected.items() if k.startswith("ln_vision.")}
    if isinstance(config.bridge, QFormer):
        state = read_checkpoint(files.qformer)
        norm = {k: v for k, v in state.items() if k.startswith("ln_vision.")} | norm
        load_strict(bridge, qformer_tensors(state), files.qformer, "Q-Former")
    match config.vision:
        case EvaViT():
            state = dict(read_checkpoint(files.vision)) | norm
            load_strict(encoder, eva_tensors(state, config.vision), files.vision, "EVA ViT-g")
        case EfficientNetLite():
            network, classifier = efficientnet_tensors(read_checkpoint(files.vision))
            load_strict(encoder, network, files.vision, config.vision.name)
            load_strict(bridge, classifier, files.vision, "classifier")
        case ClassesAndObjects(classifier=seen):
            network, classifier = efficientnet_tensors(read_checkpoint(files.vision))
            load_strict(encoder.classifier, network, files.vision, seen.name)
            load_strict(bridge, classifier, files.vision, "classifier")
            objects = read_checkpoint(files.detector)
            load_strict(encoder.detector, objects, files.detector, "detector")
    load_strict(projection, projected, files.projection, "projection")

    if quantize == "auto":
        big = config.gpu_gigabytes > 0 or config.llm_hidden_size >= 4096
        quantize = "int8" if device.type == "cuda" and big else "none"
    llm, tokenizer = load_llm(config, files.llm, device, quantize, llm_dtype)
    parts = [m.to(device, dtype) for m in (encoder, bridge, projection)]
    words = load_words(files.words).to(device) if files.words else None
    return MiniGPT4(config, *parts, llm, tokenizer, quantize, words)


def _new_projection(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Small, so that its embeddings do not shout over the words' from the first step on."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(config.llm_hidden_size, config.projection_in, generator=generator)
    weight *= 0.06 / config.projection_in**0.5
    tensors = {"weight": weight, "bias": torch.zeros(config.llm_hidden_size)}
    if isinstance(config.bridge, ConcatPatches):  # no Q-Former file brings the final norm
        hidden = config.vision.hidden_size
        tensors |= {"ln_vision.weight": torch.ones(hidden), "ln_vision.bias": torch.zeros(hidden)}
    return tensors
