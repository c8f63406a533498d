"""The decoder in PyTorch: a Llama's own modules, with keys and values in blocks."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.scheduler import Rows

MAX_ROWS = 1024  # in one call of the model


class TorchDecoder:
    """Runs rows through a Hugging Face Llama, quantized or not.

    Kernels for other shapes round differently, so the last bits of a row's numbers may depend on
    what is computed with it. keys_values: [layers, 2, slots, kv_heads, head_dim]; a block's slots
    follow each other.
    """

    name = "PyTorch"

    def __init__(self, llm: PreTrainedModel, blocks: int) -> None:
        self._model, self._head = llm.get_decoder(), llm.get_output_embeddings()
        self._embedding = llm.get_input_embeddings()
        config = llm.config
        self._kv_heads = config.num_key_value_heads
        self._head_dim = self._model.layers[0].self_attn.head_dim
        norm = self._model.norm.weight  # unquantized
        self.device, self._dtype = norm.device, norm.dtype
        # A GPU is faster with many rows; a CPU's answers would stall.
        self.chunk_rows = (1024, 512) if self.device.type == "cuda" else (256, 32)
        shape = (len(self._model.layers), 2, blocks * BLOCK_SIZE, self._kv_heads, self._head_dim)
        self.keys_values = torch.zeros(shape, dtype=self._dtype, device=self.device)

    @staticmethod
    def block_bytes(llm: PreTrainedModel) -> int:
        """Bytes of one block."""
        layers = llm.get_decoder().layers
        width = llm.config.num_key_value_heads * layers[0].self_attn.head_dim
        element_size = llm.get_decoder().norm.weight.element_size()
        return BLOCK_SIZE * len(layers) * 2 * width * element_size

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
            pictures = torch.from_numpy(rows.embeds).to(self.device, self._dtype)
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
        keys, values = self.keys_values[number]
        keys[places] = k[0].transpose(0, 1).to(self._dtype)
        values[places] = v.to(self._dtype)
        q = q[0].transpose(0, 1)  # [rows, heads, head_dim]
        attended = torch.empty_like(q)
        for group in groups:
            # [sequences, heads, rows of each or positions, head_dim]
            out = F.scaled_dot_product_attention(
                q[group.rows].transpose(1, 2),
                keys[group.places].transpose(1, 2),
                values[group.places].transpose(1, 2),
                attn_mask=group.mask,
                enable_gqa=True,
            )
            attended[group.rows] = out.transpose(1, 2)
        return attended.flatten(1)

    def copy_block(self, source: int, target: int) -> None:
        """Copy block `source` to block `target`."""
        blocks = self.keys_values.unflatten(2, (-1, BLOCK_SIZE))
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
