"""The word head's training: binary cross-entropy on the words of the captions, in minutes.

A head is far too confident on the pictures it was trained on, so the projection is trained with
words from heads that have not seen the picture (`cross_fitted`).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.model.objects import OBJECTS
from minigpt4.model.words import WordHead
from minigpt4.training.vocabulary import Vocabulary
from minigpt4.weights.int8 import quantize_rows

_EPOCHS, _PEAK_LR, _WEIGHT_DECAY, _DROPOUT, _BATCH = 8, 4e-4, 0.5, 0.5, 128
_FLOOR = 0.02  # added to each input's deviation: rarely seen classes are not blown up


def targets(vocabulary: Vocabulary, texts: Sequence[Sequence[str]]) -> Tensor:
    """[pictures, terms]: 1 where a picture's texts hold the term; less where one of many does."""
    wanted = torch.zeros(len(texts), len(vocabulary.terms))
    for row, of_one in enumerate(texts):
        for text in of_one:
            for term in vocabulary.occurring(text):
                wanted[row, term] += 1.0
        if len(of_one) >= 5:
            wanted[row] *= 0.6
    return wanted.clamp_(max=1.0)


def fold_of(key: str, folds: int) -> int:
    """Which fold a picture is in: by its key alone, so that it stays there."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % folds


def fit(inputs: Tensor, wanted: Tensor, epochs: int = _EPOCHS, seed: int = 0) -> nn.Linear:
    """A linear layer from standardised inputs [pictures, width] to the terms' logits."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs.shape[1], wanted.shape[1])
    nn.init.zeros_(layer.weight)
    layer.bias.data = torch.logit(wanted.mean(0).clamp(1e-4, 0.99))
    # Biases say how common a term is; pulled towards 0 they would make all terms likely.
    groups = [
        {"params": [layer.weight], "weight_decay": _WEIGHT_DECAY},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK_LR)
    steps = epochs * (len(inputs) // _BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(_BATCH):
            if len(chosen) < _BATCH:
                continue
            logits = layer(F.dropout(inputs[chosen].float(), _DROPOUT))
            loss = F.binary_cross_entropy_with_logits(logits, wanted[chosen], reduction="sum")
            optimizer.zero_grad()
            (loss / len(chosen)).backward()
            optimizer.step()
            schedule.step()
    return layer


def standardised(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs in 16 bit with mean 0 and deviation 1, mean, deviation)."""
    mean, deviation = inputs.float().mean(0), inputs.float().std(0) + _FLOOR
    return ((inputs.float() - mean) / deviation).half(), mean, deviation


@torch.no_grad()
def cross_fitted(inputs: Tensor, wanted: Tensor, folds: Tensor, epochs: int = _EPOCHS) -> Tensor:
    """Probabilities [pictures, terms], each by a head fitted to the other folds' pictures.

    folds: [pictures], the number of each one's.
    """
    probabilities = torch.zeros(wanted.shape, dtype=torch.float16)
    for fold in folds.unique():
        unseen = folds == fold
        with torch.enable_grad():
            layer = fit(inputs[~unseen], wanted[~unseen], epochs)
        probabilities[unseen] = layer(inputs[unseen].float()).sigmoid().half()
    return probabilities


def finished(
    layer: nn.Linear,
    mean: Tensor,
    deviation: Tensor,
    vocabulary: Vocabulary,
    grid: int,
    column: int,
) -> WordHead:
    """The fitted layer as a word head with 8-bit weights; `column`: where the objects begin."""
    head = WordHead(vocabulary.terms, layer.in_features, grid, OBJECTS, column)
    numbers, scale = quantize_rows(layer.weight.detach())
    head.weight.copy_(numbers)
    head.scale.copy_(scale)
    head.bias.copy_(layer.bias.detach())
    head.mean.copy_(mean)
    head.deviation.copy_(deviation)
    return head.eval()


def mean_average_precision(wanted: Tensor, probabilities: Tensor, least: int = 5) -> float:
    """Mean over the terms that stand in at least `least` pictures' texts."""
    scores = []
    for term in range(wanted.shape[1]):
        right = wanted[:, term] > 0
        if right.sum() >= least:
            ranked = right[probabilities[:, term].argsort(descending=True)]
            precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
            scores.append(precision[ranked].mean())
    return torch.stack(scores).mean().item() if scores else 0.0
