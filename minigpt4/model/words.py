"""The word head: two linear layers from the encoders' features to words and phrases; and objects.

One layer reads the whole picture, the other each cell of the grid. A term's probability in the
cells is about that in its likeliest cell (multiple-instance learning), so that small things are
found. A detector's classes are terms, too: it finds objects more reliably than the layers do.

The terms found are written into the prompt as text, after the picture's embeddings: small language
models read words more reliably than embeddings.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minigpt4.config import Words
from minigpt4.data.files import check_pointer
from minigpt4.data.word_lists import singular
from minigpt4.errors import UserError

# A heat map's maximum h counts as the probability h / (h + HEAT_ODDS). On COCO photographs that the
# word head was not trained on, a maximum above 0.12 (a probability of 0.25) finds 69 % of the
# objects that captions mention and 5 % of those that they do not; the learned terms find 30 % and
# 0.3 %.
HEAT_ODDS = 0.36
# An object with a lower maximum is ignored: many pictures without people have weak signs of them.
LEAST_HEAT = {"person": 0.25}
# The detector was trained on photographs only: in drawings it finds kites and clocks.
DRAWING = "drawing"
_PEOPLE = "man, woman, boy, girl, child, people, lady, player, baby, kid, crowd"
PEOPLE = frozenset(_PEOPLE.split(", "))
SHARPNESS = 4.0  # of the soft maximum over a picture's cells


class WordHead(nn.Module):
    """Features [batch, image_tokens, projection_in] -> probabilities [batch, terms].

    learned: the layers' terms. channels: how many columns (the first ones) a cell's vector fills.
    objects: names of the classes whose heat maps' maxima the features hold, as square roots, from
    `column` on. terms: the learned ones, then the other objects. weight: int8
    [learned, projection_in], each row to be multiplied by its `scale`; cell_weight: the same for a
    cell, [learned, channels].
    """

    def __init__(
        self,
        learned: Sequence[str],
        width: int,
        grid: int,
        channels: int,
        objects: Sequence[str] = (),
        column: int = 0,
    ) -> None:
        super().__init__()
        self.grid, self.channels, self.column = grid, channels, column
        self.learned, self.objects = tuple(learned), tuple(objects)
        self.terms = joined_terms(learned, objects)
        for part, columns in (("", width), ("cell_", channels)):
            weight = torch.zeros(len(self.learned), columns, dtype=torch.int8)
            self.register_buffer(f"{part}weight", weight)
            self.register_buffer(f"{part}scale", torch.zeros(len(self.learned)))
            self.register_buffer(f"{part}mean", torch.zeros(columns))
            self.register_buffer(f"{part}deviation", torch.ones(columns))
        self.register_buffer("bias", torch.zeros(len(self.learned)))

    def forward(self, features: Tensor) -> Tensor:
        whole, cells = whole_and_cells(features, self.grid, self.channels)
        inputs = (whole - self.mean) / self.deviation
        local = (cells - self.cell_mean) / self.cell_deviation
        logits = inputs @ self.weight.float().T * self.scale + self.bias
        logits += soft_maximum(local @ self.cell_weight.float().T * self.cell_scale)
        heat = whole[:, self.column : self.column + len(self.objects)] ** 2
        return with_objects(logits.sigmoid(), heat, self.terms, self.objects)

    def save(self, path: str | Path) -> None:
        """Write tensors and terms as one safetensors file."""
        tensors = {
            name: t.half() if t.is_floating_point() else t for name, t in self._buffers.items()
        }
        metadata = {"terms": json.dumps(self.learned), "grid": str(self.grid)}
        metadata |= {"objects": json.dumps(self.objects), "column": str(self.column)}
        Path(path).write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata))


def load_words(path: str | Path) -> WordHead:
    """The word head in a file that `WordHead.save` wrote. UserError if it holds none or cannot be
    read."""
    check_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        terms, grid = json.loads(metadata["terms"]), int(metadata["grid"])
        width, channels = tensors["weight"].shape[1], tensors["cell_weight"].shape[1]
        objects, column = json.loads(metadata["objects"]), int(metadata["column"])
        head = WordHead(terms, width, grid, channels, objects, column)
        head.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} holds no word head: fetch it again, or train one (“train … --refit”)."
        ) from error
    return head.eval()


def soft_maximum(logits: Tensor) -> Tensor:
    """[batch, cells, terms] -> [batch, terms]: between the mean over the cells and the maximum."""
    total = torch.logsumexp(SHARPNESS * logits, 1)
    return (total - math.log(logits.shape[1])) / SHARPNESS


def whole_picture(features: Tensor, grid: int) -> Tensor:
    """[batch, image_tokens, width] -> [batch, width]: the sum of the whole picture's vector and the
    classes', which fill other columns."""
    return features[:, grid * grid] + features[:, grid * grid + 1]


def whole_and_cells(features: Tensor, grid: int, channels: int) -> tuple[Tensor, Tensor]:
    """The inputs of the two layers, [batch, width] and [batch, cells, channels], in float32."""
    features = features.float()
    return whole_picture(features, grid), features[:, : grid * grid, :channels]


def joined_terms(learned: Sequence[str], objects: Sequence[str]) -> tuple[str, ...]:
    """The learned terms, then the objects that are not among them."""
    return (*learned, *(name for name in objects if name not in learned))


def with_objects(
    learned: Tensor, heat: Tensor, terms: Sequence[str], objects: Sequence[str]
) -> Tensor:
    """Probabilities of `terms` [batch, terms] from those of the learned ones and the maxima of the
    objects' heat maps [batch, objects]; the larger one if a term is both. If the picture is likely
    a drawing, the heat maps count less."""
    found = nn.functional.pad(learned, (0, len(terms) - learned.shape[1]))
    places = [terms.index(name) for name in objects]
    least = torch.tensor([LEAST_HEAT.get(name, 0.0) for name in objects], device=heat.device)
    seen = (heat / (heat + HEAT_ODDS) * (heat >= least)).to(found.dtype)
    if DRAWING in terms:
        seen = seen * (1 - found[:, [terms.index(DRAWING)]])
    found[:, places] = torch.maximum(found[:, places], seen)
    return found


def choose(probabilities: Sequence[float], terms: Sequence[str], words: Words) -> list[str]:
    """The likely terms, the likeliest first, at most `words.most`.

    A phrase replaces the words in it ("brown dog" replaces "dog", as "two dogs" does), and a man
    replaces a person.
    """
    order = sorted(range(len(terms)), key=lambda i: -probabilities[i])
    chosen: list[str] = []

    def words_of(term: str) -> set[str]:
        return {singular(word) for word in term.split()}

    for number in order:
        if probabilities[number] < words.threshold or len(chosen) == words.most:
            break
        term = terms[number]
        if any(singular(term) in words_of(other) for other in chosen):
            continue
        covered = [i for i, other in enumerate(chosen) if singular(other) in words_of(term)]
        for i in covered[:1]:
            chosen[i] = term
        if not covered:
            chosen.append(term)
    if any(word in PEOPLE for term in chosen for word in term.split()):
        return [term for term in chosen if term != "person"]
    return chosen


def listed(terms: Sequence[str]) -> str:
    """The terms as they are written in a prompt."""
    return ", ".join(terms)
