"""The language model and its tokenizer, from a folder.

The folder is that of a Hugging Face Llama. It is loaded into PyTorch, quantized or not; or as the
blocks of a GGUF file in it ("int4"); or only its token embedding ("remote"), if other machines run
the model. The usual mistakes (no tokenizer, missing shards, delta weights, another Vicuna) each
give one sentence.
"""

import functools
import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minigpt4.config import ModelConfig, Quantize
from minigpt4.data.files import check_pointer, replacing
from minigpt4.errors import Count, UserError, ignore, out_of_memory, say
from minigpt4.model.text import JsonTokenizer
from minigpt4.options import DTYPE
from minigpt4.weights.folder import (
    EMBEDDING,
    check_folder,
    check_is_no_delta,
    check_shape,
    check_shards,
    check_type,
    missing_weights,
    read_tensor,
    shards_of,
)
from minigpt4.weights.gguf import BLOCKS, INDEX, BlockLlama, BlockTensor, gguf_of, write_index
from minigpt4.weights.int8 import load_int8
from minigpt4.weights.tokenizer import check_tokens, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(name: str | None = None, device: torch.device = CPU) -> torch.dtype:
    """The type that a language model computes in.

    name: "float32", "bfloat16" or "auto"; None: $MINIGPT4_DTYPE, or else "auto".
    "auto": float16 on a GPU; on a CPU, bfloat16 if the processor multiplies it natively (twice as
    fast), else float32. UserError for any other name.
    """
    name = name or DTYPE.from_environment()
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if _has_native_bfloat16() else torch.float32
    if name not in DTYPES:
        raise UserError(f"There is no computing type “{name}”: choose auto, {' or '.join(DTYPES)}.")
    return DTYPES[name]


def _has_native_bfloat16() -> bool:
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return (avx512 and torch.cpu._is_avx512_bf16_supported()) or torch.cpu._is_amx_tile_supported()


def load_llm(
    config: ModelConfig,
    folder: Path,
    device: torch.device,
    quantize: Quantize,
    dtype: torch.dtype | str | None = None,
    count: Count = ignore,
):
    """(language model, tokenizer) from a folder; UserError if it is not a complete, fitting model.

    quantize: "int4" reads the GGUF file and its index in the folder; "remote" reads only the token
    embedding. dtype: a type, or a name for `choose_dtype`. count: is called with the bytes of
    weights that are read here.
    """
    if quantize == "int4":
        return _load_blocks(config, folder)
    if quantize == "remote":
        if (folder / "config.json").is_file():
            check_type(folder, config)
        embedding, tokenizer = load_embedding(config, folder, device)
        check_shape(embedding.shape, folder, config)
        check_tokens(tokenizer, embedding.shape[0], folder)
        return embedding, tokenizer
    if folder.suffix == ".gguf" and folder.is_file():
        raise UserError(
            f"{folder} is a GGUF file, which runs on the CPU in 4 bit alone: choose “--device cpu "
            "--quantize int4”, or give a Hugging Face folder with “--llm”."
        )
    check_folder(folder, config)
    if not isinstance(dtype, torch.dtype):
        dtype = choose_dtype(dtype, device)
    try:
        if missing_weights(folder, blocks=False):
            _unpack_weights(folder)
        llm, report = _from_pretrained(folder, device, quantize, dtype, count)
        tokenizer = load_tokenizer(folder)
        embedding, norm = llm.get_input_embeddings().weight, llm.get_decoder().norm.weight
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{config.name} does not fit into the free memory of {device}: choose a smaller "
            "“--model”, or “--quantize nf4”."
        ) from error
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise MemoryError from error
        log.debug("loading %s", folder, exc_info=True)
        check_shards(folder)
        plain = quantize == "none" and device.type == "cpu"
        raise UserError(
            f"The language model in {folder} could not be loaded: a file is missing, damaged or of "
            f"another kind{'' if plain else ', or the device cannot hold it'}; move the folder "
            f"away and fetch it again{'' if plain else ' or try “--quantize none --device cpu”'}."
        ) from error
    _check_complete(report, folder)
    check_is_no_delta(embedding, norm, folder, config)
    check_shape(embedding.shape, folder, config)
    check_tokens(tokenizer, embedding.shape[0], folder)
    return llm.eval(), tokenizer


def _from_pretrained(
    folder: Path,
    device: torch.device,
    quantize: Quantize,
    dtype: torch.dtype,
    count: Count = ignore,
) -> tuple["PreTrainedModel", dict]:
    """(model, transformers' report of missing tensors)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else hundreds of lines a token
    warnings.filterwarnings("ignore", module="bitsandbytes")
    match quantize:
        case "w8a16":
            return load_int8(folder, device, dtype, count)
        case "int8":
            quantization = BitsAndBytesConfig(load_in_8bit=True)
        case "nf4":
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        case _:
            quantization = None
    with _reporting(sum(file.stat().st_size for file in shards_of(folder)), count):
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, and is checked
            local_files_only=True,
            trust_remote_code=False,
        )


@contextmanager
def _reporting(size: int, count: Count) -> Iterator[None]:
    """Inside this context, transformers' loops over parameters (of `size` bytes in all) report
    their progress to `count`, instead of drawing bars."""
    from transformers.utils import logging as transformers_logging

    def counted(items: Collection) -> Iterator:
        for item in items:
            yield item
            count(size // len(items))

    def hook(factory: Callable, arguments: tuple, options: dict) -> Any:
        if options.get("desc") == "Loading weights":
            return counted(*arguments)
        return factory(*arguments, **options | {"disable": True})

    before = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def _check_complete(report: dict, folder: Path) -> None:
    """UserError if transformers left parameters at random values, which it only logs."""
    lost = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    lost += map(str, report["error_msgs"])
    if lost:
        raise UserError(
            f"{folder} is incomplete: “{min(lost)}” is missing or has another shape: move it "
            "away and fetch it again."
        )


# --- GGUF ---------------------------------------------------------------------------------------


def _load_blocks(config: ModelConfig, folder: Path) -> tuple[BlockLlama, JsonTokenizer]:
    try:
        llm, tokenizer = BlockLlama.open(folder), JsonTokenizer(folder)
    except Exception as error:  # anything, for a damaged index
        if out_of_memory(error):
            raise MemoryError from error
        log.debug("loading %s", folder, exc_info=True)
        for file in filter(Path.is_file, folder.glob("*")):
            check_pointer(file)
        raise UserError(
            f"{folder} holds no complete 4-bit model: delete the folder, then run "
            f"“python -m minigpt4 download {config.name}”, or choose “--quantize none”."
        ) from error
    check_shape(llm.embedding.shape, folder, config)
    check_tokens(tokenizer, llm.vocabulary, folder)
    return llm, tokenizer


def describe_gguf(path: Path, shown: str) -> None:
    """Write a GGUF file's index, tokenizer and configuration beside it.

    Then the folder loads in a tenth of a second instead of 14 seconds. UserError if the file, which
    the sentence calls `shown`, is damaged or of a kind that cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder, options = path.parent, {"gguf_file": path.name}
    try:
        with _cached("GGUFReader", "get_tensor_name_map"):
            write_index(path)
            AutoTokenizer.from_pretrained(folder, **options).save_pretrained(folder)
            AutoConfig.from_pretrained(folder, **options).save_pretrained(folder)
    except Exception as error:  # anything, for a damaged file
        if out_of_memory(error) or (isinstance(error, OSError) and error.errno):  # the disk
            raise
        if not isinstance(error, ValueError):
            raise UserError(
                f"{shown} is cut short or damaged ({path.stat().st_size:,} bytes): delete it, "
                "then fetch it again."
            ) from error
        raise UserError(
            f"{shown} is not a GGUF file of a kind that can be read ({error}): give one of a Llama "
            f"model in {', '.join(BLOCKS)} blocks, as llama.cpp quantizes it, or a Hugging Face "
            "model's folder."
        ) from error


def _unpack_weights(folder: Path) -> None:
    """Write the weights of a folder's GGUF file in 16 bit beside it, once, for PyTorch.

    Q4_1 holds 4-bit steps with 16-bit scales: 16 bits are enough for its values. UserError if the
    folder cannot be written to.
    """
    from transformers import AutoModelForCausalLM, GgufConfig, modeling_gguf_pytorch_utils

    say("Unpacking the language model for PyTorch (once) …")
    with (
        _cached("GGUFReader", "get_tensor_name_map"),
        _replaced(modeling_gguf_pytorch_utils, tqdm=lambda items, **_: items),  # no bar
        _reporting(0, ignore),
    ):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf_of(folder).name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    _check_complete(report, folder)
    try:
        with (
            replacing(folder / "model.safetensors") as partial,
            tempfile.TemporaryDirectory(dir=folder) as scratch,
            _reporting(0, ignore),
        ):
            model.save_pretrained(scratch, max_shard_size="100GB")
            Path(scratch, "model.safetensors").replace(partial)
    except OSError as error:
        raise UserError(
            f"The language model could not be unpacked in {folder} ({error.strerror}): make room "
            "and the folder writable, or choose “--quantize int4” on the CPU."
        ) from error


def _cached(*names: str) -> AbstractContextManager:
    """Cache these functions of the gguf library: transformers reads the file's header three times,
    a few seconds each, and maps the tensors' names 400 times.
    """
    import gguf

    return _replaced(gguf, **{name: functools.cache(getattr(gguf, name)) for name in names})


@contextmanager
def _replaced(module: ModuleType, **functions: Callable) -> Iterator[None]:
    """Inside this context, the module has these functions under these names."""
    originals = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(originals)


# --- the token embedding alone -------------------------------------------------------------------


class TokenEmbedding(nn.Module):
    """Token ids [...] -> token embeddings [..., hidden_size].

    weight: [vocabulary, hidden_size], in the file's own precision; or a GGUF file's blocks, of
    which only the requested rows are dequantized, to the same float32 numbers as in the engine's
    decoder.
    """

    def __init__(self, weight: Tensor | BlockTensor) -> None:
        super().__init__()
        self._blocks = weight if isinstance(weight, BlockTensor) else None
        if isinstance(weight, Tensor):
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.shape = tuple(weight.shape)

    def get_input_embeddings(self) -> nn.Module:
        """Itself: a complete language model has this method, too."""
        return self

    def forward(self, ids: Tensor) -> Tensor:
        if self._blocks is None:
            return self.weight[ids]
        rows = self._blocks.data[ids.flatten().cpu().numpy()]
        shape = (len(rows), self.shape[1])
        numbers = torch.from_numpy(BlockTensor(self._blocks.kind, shape, rows).numbers())
        return numbers.view(*ids.shape, self.shape[1]).to(ids.device)


def load_embedding(config: ModelConfig, folder: Path, device: torch.device):
    """(token embedding, tokenizer) from a language model's folder; no other weight is read.

    UserError if the folder does not hold them.
    """
    try:
        if (folder / INDEX).exists():
            embedding = TokenEmbedding(BlockLlama.open(folder).embedding)
        else:
            embedding = TokenEmbedding(read_tensor(folder, EMBEDDING).to(device))
        return embedding, load_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserError) as error:
        log.debug("loading the embedding of %s", folder, exc_info=True)
        raise UserError(
            f"{folder} does not hold the language model's token embedding ({EMBEDDING}) and "
            f"tokenizer: run “python -m minigpt4 download {config.name}”."
        ) from error
