"""The word head's training: binary cross-entropy on the words of the captions.

A head is far too confident on the pictures it was trained on. So the projection is trained with
words from heads that were not trained on the picture (`cross_fitted`).
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.model.detector import OBJECTS
from minigpt4.model.words import WordHead, soft_maximum, whole_and_cells
from minigpt4.training.vocabulary import Vocabulary
from minigpt4.weights.int8 import quantize_rows

_EPOCHS, _PEAK_LR, _WEIGHT_DECAY, _DROPOUT, _BATCH = 5, 4e-4, 0.5, 0.5, 128
_FLOOR = 0.02  # added to each input's deviation, so that rare classes are not scaled up too much
_MEASURED = 2000  # pictures from which mean and deviation are computed


def targets(vocabulary: Vocabulary, texts: Sequence[Sequence[str]]) -> Tensor:
    """[pictures, terms]: 1 if a picture's texts have the term; less if only one of many has it."""
    wanted = torch.zeros(len(texts), len(vocabulary.terms))
    for row, of_one in enumerate(texts):
        for text in of_one:
            for term in vocabulary.occurring(text):
                wanted[row, term] += 1.0
        if len(of_one) >= 5:
            wanted[row] *= 0.6
    return wanted.clamp_(max=1.0)


def fold_of(key: str, folds: int) -> int:
    """The picture's fold, which depends only on its key and so never changes."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % folds


class Layer(nn.Module):
    """The trained layers of a word head."""

    def __init__(self, width: int, channels: int, terms: int) -> None:
        super().__init__()
        self.whole = nn.Linear(width, terms)
        self.cells = nn.Linear(channels, terms, bias=False)

    def forward(self, whole: Tensor, cells: Tensor) -> Tensor:
        """[pictures, width] and [pictures, cells, channels], both standardised -> the terms' logits
        [pictures, terms]."""
        return self.whole(whole) + soft_maximum(self.cells(cells))


class Inputs:
    """The pictures' features, standardised as in a word head.

    read: numbers of pictures -> features [pictures, image_tokens, width]. learned: the pictures to
    learn from; mean and deviation are computed from some of them.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], Tensor],
        learned: Sequence[int],
        grid: int,
        channels: int,
    ) -> None:
        self._read, self.grid, self.channels = read, grid, channels
        some = read(learned[:: max(1, len(learned) // _MEASURED)])
        whole, cells = whole_and_cells(some, grid, channels)
        self.mean, self.deviation = whole.mean(0), whole.std(0) + _FLOOR
        cells = cells.flatten(0, 1)
        self.cell_mean, self.cell_deviation = cells.mean(0), cells.std(0) + _FLOOR

    def __call__(self, pictures: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[pictures, width] and [pictures, cells, channels]."""
        whole, cells = whole_and_cells(self._read(pictures), self.grid, self.channels)
        return (
            (whole - self.mean) / self.deviation,
            (cells - self.cell_mean) / self.cell_deviation,
        )


def fit(
    inputs: Inputs, rows: Tensor, wanted: Tensor, epochs: int = _EPOCHS, seed: int = 0
) -> Layer:
    """The layer of a word head, fitted to `rows` of the pictures; wanted: [pictures, terms]."""
    torch.manual_seed(seed)
    layer = Layer(len(inputs.mean), inputs.channels, wanted.shape[1])
    nn.init.zeros_(layer.whole.weight)
    nn.init.zeros_(layer.cells.weight)
    layer.whole.bias.data = torch.logit(wanted[rows].mean(0).clamp(1e-4, 0.99))
    # No decay for biases, which express how common a term is: it would make all terms likely.
    groups = [
        {"params": [layer.whole.weight, layer.cells.weight], "weight_decay": _WEIGHT_DECAY},
        {"params": [layer.whole.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK_LR)
    steps = epochs * (len(rows) // _BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    for _ in range(epochs):
        for chosen in rows[torch.randperm(len(rows))].split(_BATCH):
            if len(chosen) < _BATCH:
                continue
            whole, cells = inputs(chosen.tolist())
            logits = layer(F.dropout(whole, _DROPOUT), F.dropout(cells, _DROPOUT))
            loss = F.binary_cross_entropy_with_logits(logits, wanted[chosen], reduction="sum")
            optimizer.zero_grad()
            (loss / len(chosen)).backward()
            optimizer.step()
            schedule.step()
    return layer


@torch.no_grad()
def probabilities(inputs: Inputs, rows: Tensor, layer: Layer) -> Tensor:
    """The terms' probabilities [rows, terms], 16 bit."""
    return torch.cat(
        [layer(*inputs(some.tolist())).sigmoid().half() for some in rows.split(_BATCH)]
    )


def cross_fitted(
    inputs: Inputs, rows: Tensor, wanted: Tensor, folds: Tensor, epochs: int = _EPOCHS
) -> Tensor:
    """Probabilities [rows, terms], each by a head fitted to the other folds' pictures.

    folds: [pictures], the number of each picture's fold.
    """
    found = torch.zeros(len(rows), wanted.shape[1], dtype=torch.float16)
    for fold in folds[rows].unique():
        unseen = folds[rows] == fold
        layer = fit(inputs, rows[~unseen], wanted, epochs)
        found[unseen] = probabilities(inputs, rows[unseen], layer)
    return found


@torch.no_grad()
def finished(layer: Layer, inputs: Inputs, vocabulary: Vocabulary, column: int) -> WordHead:
    """The fitted layer as a word head with 8-bit weights; `column`: where the objects begin."""
    width = layer.whole.in_features
    head = WordHead(vocabulary.terms, width, inputs.grid, inputs.channels, OBJECTS, column)
    for part, linear in (("", layer.whole), ("cell_", layer.cells)):
        numbers, scale = quantize_rows(linear.weight)
        head.get_buffer(f"{part}weight").copy_(numbers)
        head.get_buffer(f"{part}scale").copy_(scale)
        head.get_buffer(f"{part}mean").copy_(getattr(inputs, f"{part}mean"))
        head.get_buffer(f"{part}deviation").copy_(getattr(inputs, f"{part}deviation"))
    head.bias.copy_(layer.whole.bias)
    return head.eval()


def mean_average_precision(wanted: Tensor, probabilities: Tensor, least: int = 5) -> float:
    """The mean over the terms that occur in the texts of at least `least` pictures."""
    scores = []
    for term in range(wanted.shape[1]):
        right = wanted[:, term] > 0
        if right.sum() >= least:
            ranked = right[probabilities[:, term].argsort(descending=True)]
            precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
            scores.append(precision[ranked].mean())
    return torch.stack(scores).mean().item() if scores else 0.0
