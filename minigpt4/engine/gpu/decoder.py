"""The decoder for int8 weights on a GPU.

All answers take a step together: their newest tokens go through the kernels, which one CUDA graph
launches. There is a graph for each number of rows in BUCKETS. Prompts go through the eager decoder,
in large chunks, with the same weights and the same key-value cache.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minigpt4.engine.gpu import kernels, sampling
from minigpt4.engine.gpu.sampling import UNDECIDED
from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.sampling import Draw
from minigpt4.engine.scheduler import Outputs, Rows
from minigpt4.engine.torch_decoder import TorchDecoder

BUCKETS = (1, 2, 4, 8, 16, 32)  # rows of a step
SEEN = 1024  # ids that the repetition penalty covers; if there are more, the host samples


# A step that allocates nothing and uses fixed memory -> a function that repeats it.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Run the step once, which compiles its kernels, and record its launches on the current GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class GpuDecoder:
    """Runs a Llama with `weights.int8` layers.

    eager: runs the same model, and owns the cache. context: positions of the longest sequence.
    dot: use tensor cores. Without them, a step that decodes more rows than the largest bucket
    goes to `eager`, which is then faster.
    """

    name = "CUDA graphs"

    def __init__(
        self,
        eager: TorchDecoder,
        llm: PreTrainedModel,
        context: int,
        capture: Capture,
        dot: bool = True,
        buckets: tuple[int, ...] = BUCKETS,
    ) -> None:
        self._eager, self._dot = eager, dot
        self.chunk_rows = eager.chunk_rows
        self._layers, self._norm = llm.get_decoder().layers, llm.get_decoder().norm
        self._embedding = llm.get_input_embeddings().stored
        self._head = llm.get_output_embeddings().stored
        self._eps = llm.config.rms_norm_eps
        self._rotation = _rotation(llm, context, eager.device)
        self._buffers = _Buffers(llm, context, eager, buckets[-1])
        self._replays = {rows: capture(partial(self._step, rows)) for rows in buckets}

    def forward(self, rows: Rows) -> Outputs:
        decoding, largest = _decoding(rows), max(self._replays)
        if not decoding.any() or (decoding.sum() > largest and not self._dot):
            return self._eager.forward(rows)
        *first, last = rows.take(np.flatnonzero(decoding)).split(largest)
        answers = [output for part in first for output in self._launch(part)()]
        wait = self._launch(last)
        prompts: Outputs = []
        if not decoding.all():  # meanwhile, the GPU computes the answers
            prompts = self._eager.forward(rows.take(np.flatnonzero(~decoding)))
        from_answers, from_prompts = iter(answers + wait()), iter(prompts)
        return [next(from_answers if decoding[row] else from_prompts) for row in rows.wanted]

    def copy_block(self, source: int, target: int) -> None:
        self._eager.copy_block(source, target)

    def _launch(self, rows: Rows) -> Callable[[], list[np.ndarray | int]]:
        """Start one step. The function returned waits for its outputs; call it before the next."""
        buffers, count = self._buffers, len(rows.tokens)
        bucket = min(size for size in self._replays if size >= count)
        inputs = buffers.inputs.host.numpy()
        inputs[:bucket, :2] = 0, -1
        inputs[:count, 0], inputs[:count, 1] = rows.tokens, rows.positions
        inputs[:count, 2 : 2 + rows.tables.shape[1]] = rows.tables[rows.table_rows]
        draws: list[Draw | None] = [None] * bucket
        for row, draw in zip(rows.wanted, rows.draws, strict=False):
            draws[row] = draw
        sampling.write(draws, buffers.settings.host.numpy(), buffers.seen.host.numpy())
        with torch.inference_mode():
            for sent in (buffers.inputs, buffers.settings, buffers.seen):
                sent.upload(bucket)
            self._replays[bucket]()
            for received in (buffers.logits, buffers.tokens):
                received.download(count)
        return partial(self._outputs, rows.wanted)

    def _outputs(self, wanted: np.ndarray) -> list[np.ndarray | int]:
        """Wait for the step; then these rows' tokens, or logits if no token was chosen."""
        if self._eager.device.type == "cuda":
            torch.cuda.current_stream(self._eager.device).synchronize()
        logits, tokens = self._buffers.logits.host.numpy(), self._buffers.tokens.host.tolist()
        return [logits[row].copy() if tokens[row] == UNDECIDED else tokens[row] for row in wanted]

    def _step(self, rows: int) -> None:
        """The step that a graph records: 7 kernels a layer, and the choice of tokens."""
        buffers = self._buffers
        inputs, x, qkv = buffers.inputs.device[:rows], buffers.x[:rows], buffers.qkv[:rows]
        attended, gated = buffers.attended[:rows], buffers.gated[:rows]
        linear = partial(kernels.linear, eps=self._eps, dot=self._dot)
        kernels.embed(inputs, self._embedding, x)
        for number, layer in enumerate(self._layers):
            attention, mlp, cache = layer.self_attn, layer.mlp, self._eager.layer_cache(number)
            linear(x, attention.qkv, qkv.flatten(1), norm=layer.input_layernorm.weight)
            kernels.rotate_and_store(qkv, inputs, self._rotation, *cache)
            kernels.attend(qkv, inputs, *cache, attended, buffers.partial)
            linear(attended.flatten(1), attention.output, x, residual=x)
            linear(x, mlp.gate_up, gated, norm=layer.post_attention_layernorm.weight, silu=True)
            linear(gated, mlp.down, x, residual=x)
        logits = buffers.logits.device[:rows]
        linear(x, self._head, logits, norm=self._norm.weight)
        settings, seen = buffers.settings.device[:rows], buffers.seen.device[:rows]
        buffers.tokens.device[:rows] = sampling.choose(logits, settings, seen)


class _Shared:
    """The same memory on the host and on the device; the host's is pinned."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.device = torch.zeros(shape, dtype=dtype, device=device)

    def upload(self, rows: int) -> None:
        self.device[:rows].copy_(self.host[:rows], non_blocking=True)

    def download(self, rows: int) -> None:
        self.host[:rows].copy_(self.device[:rows], non_blocking=True)


class _Buffers:
    """Fixed memory of a step with at most `rows` rows."""

    def __init__(self, llm: PreTrainedModel, context: int, eager: TorchDecoder, rows: int) -> None:
        config, device, dtype = llm.config, eager.device, eager.dtype
        kv_heads, head_dim = eager.keys_values.shape[-2:]
        heads = config.num_attention_heads
        self.x = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
        self.qkv = self.x.new_zeros(rows, heads + 2 * kv_heads, head_dim)
        self.attended = self.x.new_zeros(rows, heads, head_dim)
        self.gated = self.x.new_zeros(rows, config.intermediate_size)
        partial = rows * heads * kernels.SPLITS * (head_dim + 1)
        self.partial = torch.zeros(partial, device=device)
        wide = 2 + -(-context // BLOCK_SIZE)  # see `kernels`
        self.inputs = _Shared((rows, wide), torch.int32, device)
        self.inputs.host[:, 1] = self.inputs.device[:, 1] = -1
        self.settings = _Shared((rows, 6), torch.float64, device)
        self.seen = _Shared((rows, min(context, SEEN)), torch.int32, device)
        vocabulary = len(llm.get_output_embeddings().stored.scale)
        self.logits = _Shared((rows, vocabulary), torch.float32, device)
        self.tokens = _Shared((rows,), torch.int64, device)


def _decoding(rows: Rows) -> np.ndarray:
    """bool [rows]: is it the only row of its sequence, and a token, not part of a picture?"""
    counts = np.bincount(rows.table_rows)
    return (counts[rows.table_rows] == 1) & (rows.tokens >= 0)


def _rotation(llm: PreTrainedModel, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotary embedding's cosines and sines, float32 [context, head_dim / 2]."""
    positions = torch.arange(context, device=device)[None]
    both = llm.get_decoder().rotary_emb(torch.zeros(1, device=device), positions)
    cosines, sines = (table[0].float().chunk(2, -1)[0].contiguous() for table in both)
    return cosines, sines
