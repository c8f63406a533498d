"""The word head: one linear layer from the encoders' features to words and phrases.

What it finds stands in the prompt as text, after the picture's embeddings: small language models
read words more surely than embeddings.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minigpt4.config import Words
from minigpt4.errors import UserError


class WordHead(nn.Module):
    """Features [batch, image_tokens, projection_in] -> probabilities [batch, terms].

    weight: int8 [terms, projection_in], a row's numbers times its `scale`.
    """

    def __init__(self, terms: Sequence[str], width: int, grid: int) -> None:
        super().__init__()
        self.terms, self.grid = tuple(terms), grid
        self.register_buffer("weight", torch.zeros(len(terms), width, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(len(terms)))
        self.register_buffer("bias", torch.zeros(len(terms)))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        inputs = (whole_picture(features.float(), self.grid) - self.mean) / self.deviation
        return (inputs @ self.weight.float().T * self.scale + self.bias).sigmoid()

    def save(self, path: str | Path) -> None:
        """Write tensors and terms as one safetensors file."""
        tensors = {
            name: t.half() if t.is_floating_point() else t for name, t in self._buffers.items()
        }
        metadata = {"terms": json.dumps(self.terms), "grid": str(self.grid)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def load_words(path: str | Path) -> WordHead:
    """The word head in a file that `WordHead.save` wrote. UserError where it holds none."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        terms, grid = json.loads(metadata["terms"]), int(metadata["grid"])
        head = WordHead(terms, tensors["weight"].shape[1], grid)
        head.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} holds no word head: fetch it again, or train one (“train-words”)."
        ) from error
    return head.eval()


def whole_picture(features: Tensor, grid: int) -> Tensor:
    """[batch, image_tokens, width] -> [batch, width]: the vector of the whole picture, and the
    classes', which fill other columns."""
    return features[:, grid * grid] + features[:, grid * grid + 1]


def choose(probabilities: Sequence[float], terms: Sequence[str], words: Words) -> list[str]:
    """The likely terms, the likeliest first, at most `words.most`.

    A phrase takes the place of its own words ("brown dog" of "dog").
    """
    order = sorted(range(len(terms)), key=lambda i: -probabilities[i])
    chosen: list[str] = []
    for number in order:
        if probabilities[number] < words.threshold or len(chosen) == words.most:
            break
        term = terms[number]
        if any(term in other.split() for other in chosen):
            continue
        covered = [i for i, other in enumerate(chosen) if other in term.split()]
        for i in covered[:1]:
            chosen[i] = term
        if not covered:
            chosen.append(term)
    return chosen


def listed(terms: Sequence[str]) -> str:
    """The terms as they stand in a prompt."""
    return ", ".join(terms)
