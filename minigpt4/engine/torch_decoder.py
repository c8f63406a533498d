"""The decoder in PyTorch: a Llama's own modules, with keys and values in blocks."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.scheduler import Rows
from minigpt4.weights.int8 import quantize_rows

MAX_ROWS = 1024  # in one call of the model


class TorchDecoder:
    """Runs rows through a Hugging Face Llama, quantized or not.

    PyTorch's kernels round differently for other shapes, so the last bits of a row's results may
    depend on the other rows in the call. kv_bits: 16 keeps keys and values in the type that the
    model computes in, 8 as int8 with a scale for each slot and head. keys_values: [layers, 2,
    slots, kv_heads, head_dim]; scales: float32 [layers, 2, slots, kv_heads], or None. A block's
    slots are consecutive.
    """

    name = "PyTorch"

    def __init__(self, llm: PreTrainedModel, blocks: int, kv_bits: int = 16) -> None:
        self._model, self._head = llm.get_decoder(), llm.get_output_embeddings()
        self._embedding = llm.get_input_embeddings()
        config = llm.config
        self._kv_heads = config.num_key_value_heads
        self._head_dim = self._model.layers[0].self_attn.head_dim
        norm = self._model.norm.weight  # unquantized
        self.device, self.dtype = norm.device, norm.dtype
        # A GPU is faster with many rows; on a CPU, running answers would stall.
        self.chunk_rows = (1024, 512) if self.device.type == "cuda" else (256, 32)
        shape = (len(self._model.layers), 2, blocks * BLOCK_SIZE, self._kv_heads, self._head_dim)
        self.kv_bits = kv_bits
        dtype = torch.int8 if kv_bits == 8 else self.dtype
        self.keys_values = torch.zeros(shape, dtype=dtype, device=self.device)
        self.scales = torch.zeros(shape[:-1], device=self.device) if kv_bits == 8 else None

    @staticmethod
    def block_bytes(llm: PreTrainedModel, kv_bits: int = 16) -> int:
        """Bytes of one block."""
        layers, heads = llm.get_decoder().layers, llm.config.num_key_value_heads
        head_dim = layers[0].self_attn.head_dim
        element_size = llm.get_decoder().norm.weight.element_size()
        head_bytes = head_dim + 4 if kv_bits == 8 else head_dim * element_size
        return BLOCK_SIZE * len(layers) * 2 * heads * head_bytes

    def clear(self) -> None:
        """Zero all keys and values."""
        self.keys_values.zero_()
        if self.scales is not None:
            self.scales.zero_()

    def forward(self, rows: Rows) -> np.ndarray:
        """Float32 logits [wanted rows, vocabulary]; keys and values of every row are stored."""
        with torch.inference_mode():
            parts = [self._forward(part) for part in rows.split(MAX_ROWS)]
        return np.concatenate(parts)

    def _forward(self, rows: Rows) -> np.ndarray:
        hidden_states = self._embed(rows)  # [rows, hidden_size]
        positions = torch.from_numpy(rows.positions).long().to(self.device)
        rotation = self._model.rotary_emb(hidden_states[None], positions[None])
        groups = [_Group(rows, chosen, self.device) for chosen in _by_row_count(rows)]
        blocks = rows.tables[rows.table_rows, rows.positions // BLOCK_SIZE]
        places = blocks * BLOCK_SIZE + rows.positions % BLOCK_SIZE
        places = torch.from_numpy(places).long().to(self.device)
        for number, layer in enumerate(self._model.layers):
            normed = layer.input_layernorm(hidden_states)
            attended = self._attend(number, layer.self_attn, normed, rotation, places, groups)
            hidden_states = hidden_states + layer.self_attn.o_proj(attended)
            normed = layer.post_attention_layernorm(hidden_states)
            hidden_states = hidden_states + layer.mlp(normed)
        wanted = torch.from_numpy(rows.wanted).long().to(self.device)
        logits = self._head(self._model.norm(hidden_states[wanted]))
        return logits.float().cpu().numpy()

    def _embed(self, rows: Rows) -> Tensor:
        tokens = torch.from_numpy(rows.tokens).long().to(self.device)
        embeds = self._embedding(tokens.clamp_min(0))
        if len(rows.embeds):
            pictures = torch.from_numpy(rows.embeds).to(self.device, self.dtype)
            image = tokens < 0
            embeds[image] = pictures[-1 - tokens[image]]
        return embeds

    def _attend(self, number: int, attention, normed, rotation, places, groups) -> Tensor:
        """[rows, hidden_size] -> [rows, heads * head_dim], before the output projection."""
        count = len(normed)
        q = attention.q_proj(normed).view(1, count, -1, self._head_dim).transpose(1, 2)
        k = attention.k_proj(normed).view(1, count, -1, self._head_dim).transpose(1, 2)
        v = attention.v_proj(normed).view(count, -1, self._head_dim)
        q, k = apply_rotary_pos_emb(q, k, *rotation)  # [1, heads, rows, head_dim]
        self._store((number, 0), places, k[0].transpose(0, 1))
        self._store((number, 1), places, v)
        q = q[0].transpose(0, 1)  # [rows, heads, head_dim]
        attended = torch.empty_like(q)
        for group in groups:
            # [sequences, heads, rows of each or positions, head_dim]
            out = F.scaled_dot_product_attention(
                q[group.rows].transpose(1, 2),
                self._stored((number, 0), group.places).transpose(1, 2),
                self._stored((number, 1), group.places).transpose(1, 2),
                attn_mask=group.mask,
                enable_gqa=True,
            )
            attended[group.rows] = out.transpose(1, 2)
        return attended.flatten(1)

    def layer_cache(self, number: int) -> tuple[Tensor, Tensor | None]:
        """(keys and values [2, slots, kv_heads, head_dim], their scales or None) of a layer."""
        return self.keys_values[number], None if self.scales is None else self.scales[number]

    def _store(self, which: tuple[int, int], places: Tensor, x: Tensor) -> None:
        """x [rows, kv_heads, head_dim] -> the rows' slots. which: layer, and 0 for keys."""
        if self.scales is None:
            self.keys_values[which][places] = x.to(self.dtype)
            return
        numbers, scale = quantize_rows(x.flatten(0, 1))
        self.keys_values[which][places] = numbers.view_as(x)
        self.scales[which][places] = scale.view(x.shape[:2])

    def _stored(self, which: tuple[int, int], places: Tensor) -> Tensor:
        """The keys or values in these slots, [*places, kv_heads, head_dim]."""
        found = self.keys_values[which][places].to(self.dtype)
        if self.scales is None:
            return found
        return found * self.scales[which][places][..., None].to(self.dtype)

    def copy_block(self, source: int, target: int) -> None:
        for kept in (self.keys_values, self.scales):
            if kept is not None:
                blocks = kept.unflatten(2, (-1, BLOCK_SIZE))
                blocks[:, :, target] = blocks[:, :, source]


def _by_row_count(rows: Rows) -> list[np.ndarray]:
    """Row numbers [sequences, n] of the sequences with the same number n of rows."""
    by_sequence = [np.flatnonzero(rows.table_rows == t) for t in np.unique(rows.table_rows)]
    by_count: dict[int, list[np.ndarray]] = {}
    for chosen in by_sequence:
        by_count.setdefault(len(chosen), []).append(chosen)
    return [np.stack(group) for group in by_count.values()]


class _Group:
    """Sequences whose attention is computed together, padded to the longest.

    rows [sequences, n]; places [sequences, positions], where keys and values are stored; mask
    [sequences, 1, n, positions], true where a row may attend.
    """

    def __init__(self, rows: Rows, chosen: np.ndarray, device: torch.device) -> None:
        positions = rows.positions[chosen]
        reach = np.arange(positions.max() + 1)
        blocks = rows.tables[rows.table_rows[chosen[:, 0]]][:, reach // BLOCK_SIZE]
        mask = reach <= positions[:, :, None]
        self.rows = torch.from_numpy(chosen).to(device)
        self.places = torch.from_numpy(blocks * BLOCK_SIZE + reach % BLOCK_SIZE).long().to(device)
        self.mask = torch.from_numpy(mask[:, None]).to(device)
