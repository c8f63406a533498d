"""The choice of a GPU's decoder: the one with CUDA graphs, if it is available and passes a test.

At the start, both decoders continue the same made-up conversations with the same weights. If the
one with CUDA graphs raises, or its logits differ by more than rounding explains, one line says so,
and the eager decoder is used.
"""

import importlib.util
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.sampling import Sampler, Sampling
from minigpt4.engine.scheduler import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from minigpt4.engine.gpu.decoder import GpuDecoder
    from minigpt4.engine.torch_decoder import TorchDecoder

BOUND = 0.03  # root mean square of the difference, in standard deviations of the logits
STEPS = 4  # by which each made-up conversation continues, into another block
SEQUENCE_BLOCKS = 3  # blocks of a made-up conversation
ROWS = (1, 3, 32)  # rows of the tested steps

log = logging.getLogger(__name__)


def faster(
    eager: "TorchDecoder", llm: "PreTrainedModel", context: int
) -> "GpuDecoder | TorchDecoder":
    """The decoder with CUDA graphs, or `eager` if that one does not run here."""
    try:
        reason = _why_not(eager.device)
        if not reason:
            with torch.cuda.device(eager.device):
                decoder = build(eager, llm, context)
                reason = difference(decoder, eager)
                if not reason:
                    return decoder
    except Exception as error:
        log.debug("building the decoder with CUDA graphs", exc_info=True)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    log.warning("CUDA graphs are not used, so answers are slower (%s)", reason)
    return eager


def _why_not(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than Triton supports"
    return ""


def build(eager: "TorchDecoder", llm: "PreTrainedModel", context: int) -> "GpuDecoder":
    """Build the decoder. Without tensor cores that Triton uses (before Ampere), a row costs as much
    as reading all weights: from 5 rows on, the eager decoder is faster and is used."""
    from minigpt4.engine.gpu.decoder import BUCKETS, GpuDecoder, capture_graph

    dot = torch.cuda.get_device_capability(eager.device) >= (8, 0)
    return GpuDecoder(eager, llm, context, capture_graph, dot, BUCKETS if dot else BUCKETS[:3])


def difference(decoder: "GpuDecoder | TorchDecoder", eager: "TorchDecoder") -> str:
    """How the decoder's logits differ from the eager one's, "" if they do not.

    Both share one cache, which is zeroed before and after.
    """
    blocks = eager.keys_values.shape[2] // BLOCK_SIZE
    for count in ROWS:
        count = min(count, blocks // SEQUENCE_BLOCKS - 1)
        expected, found = (_logits_of(one, eager, count) for one in (eager, decoder))
        if not np.isfinite(found).all():
            return f"its logits for {count} rows are not finite"
        error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
        if not error <= BOUND:
            return f"its logits for {count} rows differ by {error:.2g} standard deviations"
    return "" if _chooses_as_the_host(decoder) else "it chooses other tokens"


def _chooses_as_the_host(decoder: "GpuDecoder | TorchDecoder") -> bool:
    """Do the tokens of a greedy and a drawn row follow from the decoder's own logits?"""
    rows = _rows([(0, 1)] * 2, np.random.default_rng(1))
    samplers = [Sampler(Sampling(temperature=0.0)), Sampler(Sampling(seed=1))]
    draws = tuple(sampler.draw() for sampler in samplers)
    expected = [one(logits) for one, logits in zip(samplers, decoder.forward(rows), strict=True)]
    return [*decoder.forward(replace(rows, draws=draws))] == expected


def _logits_of(
    decoder: "GpuDecoder | TorchDecoder", eager: "TorchDecoder", count: int
) -> np.ndarray:
    """The logits of `count` made-up conversations; another one joins in the last step."""
    eager.clear()
    draw = np.random.default_rng(0)
    lengths = draw.integers(BLOCK_SIZE - STEPS, BLOCK_SIZE + 1, count)
    _forward(decoder, [(0, int(length)) for length in lengths], draw)
    logits = []
    for step in range(STEPS):
        parts = [(int(length) + step, 1) for length in lengths]
        if step == STEPS - 1:
            parts.append((0, 2 * BLOCK_SIZE + 1))
        logits.append(_forward(decoder, parts, draw))
    eager.clear()
    return np.concatenate(logits)


def _forward(
    decoder: "GpuDecoder | TorchDecoder", parts: list[tuple[int, int]], draw: np.random.Generator
) -> np.ndarray:
    """Logits of the last of each sequence's rows; see `_rows`."""
    return np.stack([np.asarray(logits) for logits in decoder.forward(_rows(parts, draw))])


def _rows(parts: list[tuple[int, int]], draw: np.random.Generator) -> Rows:
    """Rows of several sequences. parts: each one's first position and number of rows, whose tokens
    are drawn from the first 256."""
    counts = [count for _, count in parts]
    positions = [np.arange(start, start + count) for start, count in parts]
    tables: np.ndarray = np.arange(len(parts) * SEQUENCE_BLOCKS, dtype=np.int32)
    return Rows(
        draw.integers(0, 256, sum(counts)).astype(np.int32),
        np.zeros((0, 1), np.float32),
        np.concatenate(positions).astype(np.int32),
        np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        tables.reshape(len(parts), SEQUENCE_BLOCKS),
        np.cumsum(counts, dtype=np.int32) - 1,
    )
