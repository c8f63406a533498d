"""Tokens from logits, as `engine.sampling` chooses them, for all rows of a step at once.

Only the `LIKELIEST` tokens are sorted. If a draw may fall outside of them, or its settings need
more, the host chooses that row's token. A CUDA graph records `choose`, so it may neither wait for
the GPU nor copy from the host.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt4.engine.sampling import Draw

LIKELIEST = 1024
BROKEN, UNDECIDED = -1, -2  # instead of a token: logits that are not finite; the host must choose
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, UNIFORM = range(6)  # columns of `settings`


def fits(draw: Draw, seen: int) -> bool:
    """Can `choose` decide this draw, with room for `seen` penalised ids?"""
    return draw.sampling.top_k <= LIKELIEST and len(draw.seen) <= seen


def write(draws: Sequence[Draw | None], settings: np.ndarray, seen: np.ndarray) -> None:
    """Fill `choose`'s inputs; a row whose draw is None or does not fit is undecided."""
    for row, draw in enumerate(draws):
        if draw is None or not fits(draw, seen.shape[1]):
            settings[row] = UNDECIDED, 0, 1, 0, 1, 0
            continue
        s, penalized = draw.sampling, draw.seen if draw.sampling.repetition_penalty != 1 else []
        settings[row] = s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, draw.uniform
        seen[row, : len(penalized)] = penalized
        seen[row, len(penalized) :] = -1


def choose(logits: Tensor, settings: Tensor, seen: Tensor) -> Tensor:
    """The token of each row, int64 [rows], or BROKEN or UNDECIDED.

    logits: float32 [rows, vocabulary]. settings: float64 [rows, 6]. seen: int32 [rows, n],
    penalised ids, filled up with -1.
    """
    finite = logits.amax(1).isfinite()
    column = settings[:, :, None].unbind(1)  # [rows, 1] each
    logits = _penalize(logits, seen.long(), column[PENALTY].float())
    greedy = column[TEMPERATURE] == 0
    temperature = column[TEMPERATURE].masked_fill(column[TEMPERATURE] <= 0, 1).float()
    weights = ((logits - logits.amax(1, keepdim=True)) / temperature).exp()
    count = min(LIKELIEST, logits.shape[1])
    top, order = weights.topk(count, 1)
    place, missed = _draw(
        top.double(), weights.sum(1, keepdim=True, dtype=torch.float64), column, logits.shape[1]
    )
    tokens = torch.where(greedy, logits.argmax(1, keepdim=True), order.gather(1, place))
    missed = missed & ~greedy | (column[TEMPERATURE] < 0)
    tokens = tokens.masked_fill(~finite[:, None], BROKEN)
    return tokens.masked_fill(missed, UNDECIDED)[:, 0]


def _penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    wide = F.pad(logits, (0, 1))  # a column for the padding of `seen`
    seen = seen.masked_fill(seen < 0, logits.shape[1])
    chosen = wide.gather(1, seen)
    wide = wide.scatter(1, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))
    return wide[:, :-1]


def _draw(
    top: Tensor, total: Tensor, column: tuple[Tensor, ...], vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(place among the likeliest [rows, 1], whether it may lie outside of them).

    top: float64 [rows, n], their weights, descending; total: the sum of all weights [rows, 1].
    top-k, top-p and min-p each shorten the list, which is `complete` once it holds every token that
    can be drawn.
    """
    complete = torch.full_like(total, top.shape[1] == vocabulary, dtype=torch.bool)
    missed = torch.zeros_like(complete)
    kept = torch.ones_like(top, dtype=torch.bool)

    def shorten(used: Tensor, shorter: Tensor, outside: Tensor) -> None:
        nonlocal kept, total, complete, missed
        missed = missed | used & ~complete & outside
        kept = kept & (shorter | ~used)
        total = torch.where(used, (top * kept).sum(1, keepdim=True), total)
        complete = complete | used

    top_k, top_p, min_p = column[TOP_K], column[TOP_P], column[MIN_P]
    ranks = torch.arange(top.shape[1], device=top.device)
    shorten(top_k > 0, ranks < top_k, torch.zeros_like(complete))
    sums = (top * kept).cumsum(1)
    reach = top_p * total
    shorten(top_p < 1, F.pad(sums[:, :-1], (1, 0)) < reach, sums[:, -1:] < reach)
    likely = top >= min_p * top[:, :1]
    shorten(min_p > 0, likely, (likely | ~kept).all(1, keepdim=True))
    place = ((top * kept).cumsum(1) <= column[UNIFORM] * total).sum(1, keepdim=True)
    last = (kept.sum(1, keepdim=True) - 1).clamp_min(0)  # 0: all logits may be NaN
    return place.clamp_max(last), missed | ~complete & (place > last)
