"""Logits -> the next token. No torch."""

import random
from dataclasses import dataclass, fields

import numpy as np

from minigpt4.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. Defaults are the published demo's.

    temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 are off (min_p leaves out what is less
    likely than that share of the likeliest); repetition_penalty divides the positive and multiplies
    the negative logits of tokens already generated (CTRL, Keskar et al., 2019); seed None draws a
    fresh one; num_beams above 1 is beam search, without sampling.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.05
    max_new_tokens: int = 300
    num_beams: int = 1
    seed: int | None = None

    # field -> (lowest, highest, may be the lowest itself)
    RANGES = {
        "temperature": (0.0, 10.0, True),
        "top_p": (0.0, 1.0, False),
        "top_k": (0, 1_000_000, True),
        "min_p": (0.0, 1.0, True),
        "repetition_penalty": (0.1, 10.0, True),
        "max_new_tokens": (1, 100_000, True),
        "num_beams": (1, 16, True),
        "seed": (0, 2**63 - 1, True),
    }

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            low, high, inclusive = self.RANGES[name]
            whole = isinstance(low, int)
            number = isinstance(value, int if whole else (int, float))
            good = (
                number
                and not isinstance(value, bool)
                and (low <= value if inclusive else low < value)
                and value <= high  # NaN is not, and a whole number may be too long for a float
            )
            if name == "temperature" and good and 0 < value < 0.01:
                raise UserError("temperature must be 0, or from 0.01 up to 10.0.")
            if not good:
                kind = "a whole number" if whole else "a number"
                start = "from" if inclusive else "above"
                raise UserError(f"{name} must be {kind} {start} {low} up to {high}.")


class Sampler:
    """Chooses one request's tokens; its draws depend on its seed and its logits alone.

    seen: ids that the repetition penalty covers from the start.
    """

    def __init__(self, sampling: Sampling, seen: tuple[int, ...] = ()) -> None:
        self.sampling = sampling
        self._seen = dict.fromkeys(seen)
        self._random = random.Random(sampling.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token id from float32 logits [vocabulary]."""
        token = self._choose(penalize(logits, list(self._seen), self.sampling.repetition_penalty))
        self._seen[token] = None
        return token

    def _choose(self, logits: np.ndarray) -> int:
        """Order as in transformers' `generate`: temperature, top-k, top-p, min-p; then a draw."""
        s = self.sampling
        if s.temperature == 0:
            return int(logits.argmax())
        scaled = (logits - logits.max()) / np.float32(s.temperature)
        draw = self._random.random()
        weights = np.exp(scaled)
        # Nearly always the draw falls among few tokens: the rest need not be sorted.
        for floor in (1e-4, 1e-7, 0.0):
            token = _draw(weights, np.flatnonzero(weights >= floor), draw, s)
            if token is not None:
                return token
        raise AssertionError("the last floor leaves nothing out")


def _draw(weights: np.ndarray, candidates: np.ndarray, draw: float, s: Sampling) -> int | None:
    """The token at `draw` of the distribution that top-k, top-p and min-p leave of `weights`; None
    where it may lie outside `candidates`, the likeliest ones."""
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    complete = len(order) == len(weights)
    ordered = weights[order].astype(np.float64)
    total = weights.sum(dtype=np.float64)
    if s.top_k:
        if s.top_k > len(order) and not complete:
            return None
        order, ordered = order[: s.top_k], ordered[: s.top_k]
        total, complete = ordered.sum(), True
    if s.top_p < 1.0:  # the smallest set of likeliest tokens that reaches top_p
        sums = ordered.cumsum()
        count = int(np.searchsorted(sums, s.top_p * total)) + 1
        if count > len(order) and not complete:
            return None
        order, ordered = order[:count], ordered[:count]
        total, complete = ordered.sum(), True
    if s.min_p:
        kept = ordered >= s.min_p * ordered[0]
        if kept.all() and not complete:
            return None
        order, ordered = order[kept], ordered[kept]
        total = ordered.sum()
    place = int(np.searchsorted(ordered.cumsum(), draw * total, side="right"))
    if place >= len(order):
        if not complete:
            return None
        place = len(order) - 1
    return int(order[place])


def penalize(logits: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    """logits [vocabulary] with those of the token ids `seen` made less likely."""
    if penalty == 1.0 or not seen:
        return logits
    logits = logits.copy()
    chosen = logits[seen]
    penalty = np.float32(penalty)
    logits[seen] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
