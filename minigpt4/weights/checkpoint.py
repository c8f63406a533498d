"""Weight files: read them safely, rename the publishers' tensors, load all or nothing.

A file that is missing, cut short or of another kind or model, or a tensor that is missing or has
another shape, gives one UserError: it names the file, what was expected and what to do.
"""

import ctypes
import mmap
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import ModelConfig, model_of_projection
from minigpt4.data.files import check_pointer, replacing
from minigpt4.errors import Count, UserError, ignore, out_of_memory
from minigpt4.model.parts import EvaViT

LARGE = 2**20  # bytes; `forget` leaves smaller tensors alone

# Keys under which training programs nest a model's tensors: the published code, Lightning, others.
_NESTS = ("model", "state_dict", "model_state_dict", "module")
_OPTIMIZER = "optim"  # the beginning of keys under which they keep an optimizer's tensors
LONGEST_NAME = 1000  # of a tensor; nested dictionaries may be endless

# --- reading ----------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Name -> tensor of a .pth or .safetensors file; nothing in the file is executed.

    A .pth file is mapped into memory, not read. The published files nest their tensors under
    "model", others under another of `_NESTS`: these are left out of the names, other keys are not.
    UserError if the file is missing, unreadable, damaged or holds anything other than tensors.
    """
    path = Path(path)
    if path.is_dir():
        found = min((p.name for p in path.glob("*.safetensors")), key=len, default="")
        raise UserError(f"{path} is a folder: name the file in it{found and f', {path / found}'}.")
    if not path.is_file():
        raise UserError(f"There is no weight file {path}: check the path, or download the file.")
    check_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if out_of_memory(error):
            raise MemoryError from error
        raise UserError(
            f"{path} is damaged or cut short ({path.stat().st_size:,} bytes): delete it, then "
            "fetch it again."
        ) from error
    except Exception as error:  # pickle.UnpicklingError, and anything that malicious files raise
        raise UserError(
            f"{path} was not loaded, because it holds something other than tensors: delete it, "
            "then fetch it again from its publisher."
        ) from error
    tensors = _flattened(state) if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no named tensors: give a weight file of this model.")
    return tensors


def _flattened(state: dict) -> dict[str, Tensor]:
    """The tensors of nested dictionaries under dotted names, without the first of `_NESTS`."""
    tensors: dict[str, Tensor] = {}
    waiting, seen = [("", state)], set()
    for before, inner in waiting:
        if id(inner) in seen or len(before) > LONGEST_NAME:
            continue
        seen.add(id(inner))
        for name, value in inner.items():
            if isinstance(value, dict) and not str(name).startswith(_OPTIMIZER):
                waiting.append((f"{before}{name}.", value))
            elif isinstance(name, str) and _is_plain(value):
                tensors[before + name] = value
    nest = ""
    while len(nest) < LONGEST_NAME and (
        found := next((n for n in _NESTS if isinstance(state.get(n), dict)), None)
    ):
        nest, state = f"{nest}{found}.", state[found]
    short = {name.removeprefix(nest): tensor for name, tensor in tensors.items()}
    return short if len(short) == len(tensors) else tensors  # short names must be unique


def _is_plain(value: object) -> bool:
    """Is it a dense tensor of real numbers?"""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_complex()


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    what: str,
    dtype: torch.dtype,
    count: Count = ignore,
) -> None:
    """Load the module's tensors from `tensors`, which may hold others, too. The module may be on
    the meta device.

    Each is converted to `dtype` once (integers stay integers). UserError if one of the module's
    is missing or has another shape.
    """
    wanted_tensors = module.state_dict()
    check_tensors(wanted_tensors, tensors, path, what)
    # Copies, since the file may be mapped, and may be replaced while the model runs.
    copies = {}
    for name in wanted_tensors:
        tensor = tensors[name]
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        copies[name] = tensor.to(kind, copy=True)
        forget(tensor)
        count(tensor.nbytes)
    module.load_state_dict(copies, strict=True, assign=True)


def check_tensors(
    wanted_tensors: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, what: str
) -> None:
    """UserError if one of `wanted_tensors` is missing in `tensors` or has another shape."""
    for name, wanted in wanted_tensors.items():
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


def forget(tensor: Tensor) -> None:
    """Release the memory of a mapped file's large tensor, which is read again when it is used."""
    if tensor.nbytes < LARGE or not _is_of_a_file(tensor.data_ptr()):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = ctypes.CDLL(None).madvise
    advise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _is_of_a_file(address: int) -> bool:
    """Is this address in a mapped file? False on systems without /proc."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        places, _, _, _, file_number, *_ = line.split()
        start, end = (int(place, 16) for place in places.split("-"))
        if start <= address < end:
            return file_number != "0"
    return False


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
    (r"^vision_model\.", "vit."),  # the hub's copy has transformers' names already
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


def efficientnet_tensors(state: Mapping[str, Tensor]) -> tuple[dict, dict]:
    """(the encoder's tensors, the classifier's) of a published EfficientNet-Lite."""
    classifier = {k.replace("_fc.", "classifier."): v for k, v in state.items() if "_fc." in k}
    return {f"net.{k}": v for k, v in state.items() if "_fc." not in k}, classifier


def eva_tensors(state: Mapping[str, Tensor], config: EvaViT) -> dict[str, Tensor]:
    """EVA ViT-g's tensors under this project's names, from `eva_vit_g.pth` or the hub's copy.

    state: including `ln_vision`, which comes from other files. q_bias, zeros and v_bias are joined
    into the qkv bias. If the image size differs from the checkpoint's, position embeddings are
    resized bicubically, except the class token's.
    """
    tensors = {_rename(k, _EVA_RENAMES): v for k, v in state.items()}
    for i in range(config.layers):
        q, v = state.get(f"blocks.{i}.attn.q_bias"), state.get(f"blocks.{i}.attn.v_bias")
        whole = (config.hidden_size,)
        if q is not None and v is not None and q.shape == v.shape == whole:
            bias = torch.cat([q, torch.zeros_like(q), v])
            tensors[f"vit.encoder.layers.{i}.self_attn.qkv.bias"] = bias
    name = "vit.embeddings.position_embedding"
    side = config.image_size // config.patch_size
    if name in tensors and tensors[name].ndim == 3:
        tensors[name] = _resize_positions(tensors[name], side)
    return tensors


def _resize_positions(embedding: Tensor, side: int) -> Tensor:
    """[1, 1 + old * old, hidden] -> [1, 1 + side * side, hidden]."""
    token, grid = embedding[:, :1].float(), embedding[:, 1:].float()
    old = round(grid.shape[1] ** 0.5)
    if old in (side, 0) or old * old != grid.shape[1] or len(grid) > 1:
        return embedding
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def qformer_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP-2's Q-Former and query tokens under this project's names."""
    return {_rename(k, _QFORMER_RENAMES): v for k, v in state.items()}


# --- the projection ---------------------------------------------------------------------------


def read_projection(path: str | os.PathLike) -> dict[str, Tensor]:
    """A projection file's "weight" and "bias", and "ln_vision.*" if it has them.

    UserError if it holds no projection, or one that was never trained.
    """
    state = read_checkpoint(path)
    if state and all(".lora_" in name for name in state):
        raise UserError(
            f"{path} holds an adapter (LoRA) for a language model and no projection: name a file "
            "that holds the projection, too."
        )
    tensors = {n: _by_suffix(state, f"llama_proj.{n}", path) for n in ("weight", "bias")}
    if any(tensor is None for tensor in tensors.values()):
        rest = {name: tensor for name, tensor in state.items() if "ln_vision." not in name}
        wrapped = rest if len(rest) == 2 else {}  # with more, "weight" may be another layer's
        tensors = {n: rest.get(n, _by_suffix(wrapped, n, path)) for n in ("weight", "bias")}
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if {"weight", "bias"} - found.keys() or found["weight"].ndim != 2:
        raise UserError(
            f"{path} holds no projection (llama_proj.weight and llama_proj.bias): give the "
            "pretrained_minigpt4 file, or one written by “train” or “convert”."
        )
    if not (found["weight"].isfinite().all() and found["weight"].any()):
        raise UserError(
            f"{path} holds a projection that was not trained, or whose training failed (zeros or "
            "numbers that are not finite): give another file."
        )
    norms = {n: _by_suffix(state, f"ln_vision.{n}", path) for n in ("weight", "bias")}
    return found | {f"ln_vision.{n}": tensor for n, tensor in norms.items() if tensor is not None}


def _by_suffix(state: Mapping[str, Tensor], name: str, path: str | os.PathLike) -> Tensor | None:
    """The tensor of this name, with any prefix that wrappers have added; None if there is none.

    UserError if several differ, such as a model and its moving average.
    """
    found = [v for k, v in state.items() if k == name or k.endswith(f".{name}")]
    if any(not torch.equal(found[0], other) for other in found[1:]):
        names = " and ".join(k for k in state if k == name or k.endswith(f".{name}"))
        raise UserError(
            f"{path} holds several tensors for “{name}” ({names}): keep only the projection to use."
        )
    return found[0] if found else None


def check_projection(tensors: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """UserError if the projection belongs to another model."""
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
    """Write a projection as safetensors; an existing file is replaced in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)


# --- out of a larger model's shards ------------------------------------------------------------


def keep_tensors(shards: Sequence[Path], beginnings: tuple[str, ...], target: Path) -> None:
    """Write the tensors whose names begin with one of `beginnings` into one file.

    shards: of BLIP-2, as the hub has them. The last vision norm becomes `ln_vision` and is kept
    with the Q-Former, as in the publisher's own file.
    """
    kept = {}
    for shard in shards:
        for name, tensor in tensors_of(shard, beginnings):
            if "qformer." in beginnings:
                name = name.replace("vision_model.post_layernorm.", "ln_vision.")
            kept[name] = tensor.clone()
    with replacing(target) as partial:
        save_file(kept, partial)


def tensors_of(shard: Path, beginnings: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a shard's tensors whose names begin with one of `beginnings`."""
    if shard.suffix != ".safetensors":
        state = read_checkpoint(shard)
        yield from ((name, t) for name, t in state.items() if name.startswith(beginnings))
        return
    check_pointer(shard)
    try:
        with safe_open(shard, "pt") as file:
            for name in filter(lambda n: n.startswith(beginnings), file.keys()):
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{shard} is damaged or cut short: delete it, then fetch it again."
        ) from error
