"""A language model and its tokenizer, from a folder: in PyTorch, quantised or not, or as the
blocks of a GGUF file."""

import logging
from pathlib import Path

import torch

from minigpt4.config import ModelConfig, Quantize
from minigpt4.errors import UserError
from minigpt4.model.tokenizer import JsonTokenizer
from minigpt4.weights.embedding import load_embedding
from minigpt4.weights.gguf import BlockLlama
from minigpt4.weights.llm_folder import check_folder, check_is_no_delta, load_tokenizer

log = logging.getLogger(__name__)


def load_llm(
    config: ModelConfig,
    folder: Path,
    device: torch.device,
    quantize: Quantize,
    dtype: torch.dtype | None = None,
):
    """(language model, tokenizer) from a Hugging Face Llama folder, which for "int4" also holds a
    GGUF file and its index; `dtype` None: 16 bit, where the device computes in it. "remote": of the
    language model only its token embedding (other machines run it)."""
    if quantize == "int4":
        return _load_blocks(config, folder)
    if quantize == "remote":
        embedding, tokenizer = load_embedding(config, folder, device)
        _check_width(folder, embedding.hidden_size, config)
        return embedding, tokenizer
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_folder(folder, config)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else cpu_dtype()
    match quantize:
        case "int8":
            quantization = BitsAndBytesConfig(load_in_8bit=True)
        case "nf4":
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        case _:
            quantization = None
    try:
        llm, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = load_tokenizer(folder)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{config.name} does not fit the free memory of {device}: choose a smaller “--model”, "
            "or “--quantize nf4”."
        ) from error
    except Exception as error:
        log.debug("loading %s", folder, exc_info=True)
        raise UserError(
            f"The language model in {folder} could not be loaded: a file is missing, cut short or "
            "of another kind, or the device cannot hold it; fetch the folder again or try "
            "“--quantize none --device cpu”."
        ) from error
    lost = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if lost:
        raise UserError(f"{folder} is incomplete: “{lost[0]}” is missing or has another shape.")
    check_is_no_delta(llm, folder, config)
    _check_width(folder, llm.get_input_embeddings().weight.shape[1], config)
    return llm.eval(), tokenizer


def _load_blocks(config: ModelConfig, folder: Path) -> tuple[BlockLlama, JsonTokenizer]:
    try:
        llm, tokenizer = BlockLlama.open(folder), JsonTokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("loading %s", folder, exc_info=True)
        raise UserError(
            f"{folder} holds no complete 4-bit model: delete the folder, then run "
            f"“python -m minigpt4 download {config.name}”, or choose “--quantize none”."
        ) from error
    _check_width(folder, llm.hidden_size, config)
    return llm, tokenizer


def _check_width(folder: Path, width: int, config: ModelConfig) -> None:
    if width != config.llm_hidden_size:
        raise UserError(
            f"{folder} holds a language model of width {width}, but {config.name} needs "
            f"{config.llm_hidden_size}: give the right folder or another “--model”."
        )


def cpu_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (twice as fast), else float32."""
    fast = (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast or torch.cpu._is_amx_tile_supported() else torch.float32
