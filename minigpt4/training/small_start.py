"""The initial projection of a small model, which maps features to embeddings of fitting words.

Classes and objects are mapped to the mean embedding of their names' words; the other features by a
ridge regression onto the mean embedding of the captions' words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minigpt4.data.files import prompt_lines
from minigpt4.errors import UserError
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.parts import Maps, PooledMap
from minigpt4.model.words import whole_picture

_HEAT_SCALE = 3.0  # the few heat columns learn faster: AdamW's steps are equal for all weights
_PENALTY = 0.3  # of the ridge, in mean variances of the features
_LENGTH = 0.5  # of a word's embedding, approximately
_EMPTY = frozenset(prompt_lines("empty-words.txt"))  # words for nothing visible


def eigenbasis(vectors: Tensor, maps: Maps) -> Tensor:
    """The basis [projection_in, projection_in]: the eigenvectors of each encoder's features
    [n, projection_in].

    Heat and classes are not rotated; the heat is scaled.
    """
    width = vectors.shape[-1]
    basis = torch.eye(width)
    found = maps.objects_column
    seen = found - maps.channels[-2]  # the detector's
    for first, last in ((0, seen), (seen, found)):
        part = vectors[:, first:last].float()
        basis[first:last, first:last] = torch.linalg.eigh(part.T @ part / len(part)).eigenvectors
    heat = range(found, found + maps.objects)
    basis[heat, heat] = _HEAT_SCALE
    return basis


def start(
    model: MiniGPT4, features: Tensor, texts: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(basis, weight [hidden, projection_in] in that basis, bias).

    features: [pictures, image_tokens, projection_in], 16 bit; texts: the pictures'.
    """
    maps, bridge = model.config.features, model.config.bridge
    if not (model.config.detects and isinstance(bridge, PooledMap)):
        raise TypeError(f"{model.config.name} does not pool a detector's maps")
    grid = bridge.grid
    cells = features[:512, : grid * grid + 1].flatten(0, 1)
    basis = eigenbasis(cells, maps)
    wanted = torch.stack([_mean_embedding(model, " ".join(of_one)) for of_one in texts])
    inputs = whole_picture(features.float(), grid) @ basis
    learned = maps.objects_column  # columns before heat and classes
    weight, bias = _ridge(inputs[:, :learned], wanted)
    whole = torch.zeros(wanted.shape[1], inputs.shape[1])
    whole[:, :learned] = weight
    names = torch.stack([_mean_embedding(model, name) for name in _names(maps)])
    whole[:, learned:] = names.T / names.norm(dim=1)
    whole[:, learned : learned + maps.objects] /= _HEAT_SCALE
    return basis, whole, bias


def in_basis(projection: nn.Linear, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the same projection for features in the basis."""
    weight = projection.weight.detach().float()
    return torch.linalg.solve(basis, weight.T).T, projection.bias.detach().float()


def _ridge(inputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a ridge regression, scaled so that its outputs vary by the length of a
    word's embedding."""
    mean, centre = inputs.mean(0), wanted.mean(0)
    inputs, wanted = inputs - mean, wanted - centre
    covariance = inputs.T @ inputs / len(inputs)
    penalty = _PENALTY * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + penalty, inputs.T @ wanted / len(inputs)).T
    weight *= _LENGTH / (inputs @ weight.T).norm(dim=1).mean()
    return weight, centre - weight @ mean


def _names(maps: Maps) -> list[str]:
    """The detector's classes, then the classifier's, in the order of the columns."""
    names = [*prompt_lines("coco-classes.txt"), *prompt_lines("imagenet-classes.txt")]
    if len(names) != maps.objects + maps.classes:
        raise UserError("prompts/coco-classes.txt or imagenet-classes.txt lacks or repeats lines.")
    return names


def _mean_embedding(model: MiniGPT4, text: str) -> Tensor:
    words = [w for w in text.lower().replace(",", " ").replace(".", " ").split() if w not in _EMPTY]
    ids = model.tokenizer.encode(" " + " ".join(words), add_special_tokens=False)
    return model.embed_tokens(torch.tensor(ids)).float().mean(0)
