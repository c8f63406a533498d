"""A language model's token embedding alone: all that is held here of one that runs elsewhere."""

import base64
import io
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minigpt4.config import ModelConfig
from minigpt4.errors import UserError
from minigpt4.weights.gguf import INDEX, BlockLlama, BlockTensor
from minigpt4.weights.llm_folder import load_tokenizer

NAME = "model.embed_tokens.weight"  # in a Hugging Face Llama's files

log = logging.getLogger(__name__)


class TokenEmbedding(nn.Module):
    """Token ids [...] -> embeddings [..., hidden_size], in the file's own precision."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.hidden_size = weight.shape[1]

    def get_input_embeddings(self) -> nn.Module:
        """As a whole language model has it."""
        return self

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class BlockEmbedding(nn.Module):
    """The same from a GGUF file's blocks, of which only the rows asked for are unpacked: float32,
    the numbers that the engine's own decoder reads."""

    def __init__(self, blocks: BlockTensor) -> None:
        super().__init__()
        self._blocks = blocks
        self.hidden_size = blocks.shape[1]

    def get_input_embeddings(self) -> nn.Module:
        """As a whole language model has it."""
        return self

    def forward(self, ids: Tensor) -> Tensor:
        rows = self._blocks.data[ids.flatten().cpu().numpy()]
        shape = (len(rows), self.hidden_size)
        numbers = torch.from_numpy(BlockTensor(self._blocks.kind, shape, rows).numbers())
        return numbers.view(*ids.shape, self.hidden_size).to(ids.device)


def load_embedding(config: ModelConfig, folder: Path, device: torch.device):
    """(token embedding, tokenizer) from a language model's folder, of whose weights nothing else
    is read. UserError where the folder does not hold them."""
    try:
        if (folder / INDEX).exists():
            blocks = BlockLlama.open(folder).embedding
            return BlockEmbedding(blocks), load_tokenizer(folder)
        return TokenEmbedding(_read(folder).to(device)), load_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        log.debug("loading the embedding of %s", folder, exc_info=True)
        raise UserError(
            f"{folder} does not hold the language model's token embedding ({NAME}) and tokenizer: "
            f"run “python -m minigpt4 download {config.name}”."
        ) from error


def _read(folder: Path) -> Tensor:
    """The one tensor, from a file or from the shard that the index names."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            shard = json.loads(index.read_text(encoding="utf-8"))["weight_map"][NAME]
            path = folder / Path(shard).name
        elif (folder / single).is_file():
            path = folder / single
        else:
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return file.get_tensor(NAME)
        # Mapped, so that only this tensor's pages are read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[NAME].clone()
    raise FileNotFoundError(f"{folder} holds no weights")


def as_base64(embeds: Tensor) -> str:
    """A tensor as vLLM's `prompt_embeds` takes it: what torch.save writes, in base64."""
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), file)  # a part would be saved with its whole
    return base64.b64encode(file.getvalue()).decode("ascii")
