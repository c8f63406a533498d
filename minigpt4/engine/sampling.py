"""Logits -> tokens: sampling, and beam search. No torch."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Protocol

import numpy as np

from minigpt4.config import RANDOM_SEED, wrong_setting
from minigpt4.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are the published demo's.

    temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 are off (min_p drops tokens less likely
    than that fraction of the likeliest one); repetition_penalty divides positive and multiplies
    negative logits of tokens already generated (CTRL, Keskar et al., 2019); presence_penalty is
    subtracted from them once, frequency_penalty for each time (OpenAI's definition); seed None,
    or -1, picks one at random; num_beams above 1 is beam search, without sampling. UserError for
    values out of range.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.05
    max_new_tokens: int = 300
    num_beams: int = 1
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if wrong := wrong_setting(name, value):
                raise UserError(f"{name} {wrong}.")
            object.__setattr__(
                self, name, int(value) if isinstance(value, Integral) else float(value)
            )
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)


@dataclass(frozen=True)
class Draw:
    """All that the choice of one token needs besides the logits: the settings, the ids that the
    repetition penalty covers, and a random number from 0 to 1."""

    sampling: Sampling
    seen: list[int]
    uniform: float


class Constraint(Protocol):
    """A rule that an answer's tokens must follow, such as a grammar. It serves one answer.

    A UserError of its methods ends the answer.
    """

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """The logits [vocabulary], -inf for tokens that may not come next."""

    def accept(self, token: int) -> None:
        """Note that this token was chosen."""


class Sampler:
    """Chooses one request's tokens; the choice depends only on its seed and its logits.

    seen: ids that the repetition penalty covers from the start.
    """

    def __init__(
        self, sampling: Sampling, seen: tuple[int, ...] = (), constraint: Constraint | None = None
    ) -> None:
        self.sampling = sampling
        self._constraint = constraint
        self._seen = seen
        self._generated: Counter[int] = Counter()
        self._random = random.Random(sampling.seed)
        self._draw: Draw | None = None

    def __call__(self, logits: np.ndarray) -> int:
        """The next token id from float32 logits [vocabulary]."""
        draw = self.draw()
        logits = penalize_all(logits, self._seen, self._generated, self.sampling)
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        token = self._choose(logits, draw.uniform)
        self.accept(token)
        return token

    def draw(self) -> Draw:
        """The draw that chooses the next token; the same until `accept`."""
        if self._draw is None:
            uniform = self._random.random() if self.sampling.temperature else 0.0
            self._draw = Draw(self.sampling, [*self._seen, *self._generated], uniform)
        return self._draw

    def accept(self, token: int) -> None:
        """Note the token that was chosen, by this sampler or elsewhere by its `draw`."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._generated[token] += 1
        self._draw = None

    def _choose(self, logits: np.ndarray, draw: float) -> int:
        """As transformers' `generate`: temperature, top-k, top-p, min-p, then a draw."""
        s = self.sampling
        if s.temperature == 0:
            return int(logits.argmax())
        scaled = (logits - logits.max()) / np.float32(s.temperature)
        weights = np.exp(scaled)
        # The draw nearly always falls among a few tokens, so the others are not sorted at first.
        for floor in (1e-4, 1e-7, 0.0):
            token = _draw(weights, np.flatnonzero(weights >= floor), draw, s)
            if token is not None:
                return token
        raise AssertionError("the last floor includes every token")


def _draw(weights: np.ndarray, candidates: np.ndarray, draw: float, s: Sampling) -> int | None:
    """The token at `draw` (0 to 1) of the distribution after top-k, top-p and min-p.

    None if it may lie outside `candidates`, the likeliest tokens.
    """
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


def penalize_all(
    logits: np.ndarray, seen: Sequence[int], generated: Counter[int], s: Sampling
) -> np.ndarray:
    """Logits [vocabulary] after the three penalties. seen: further ids for the repetition penalty;
    generated: token -> how often it was generated."""
    logits = penalize(logits, [*seen, *generated], s.repetition_penalty)
    if generated and (s.presence_penalty or s.frequency_penalty):
        logits = logits.copy()
        counts = np.fromiter(generated.values(), np.float32)
        logits[list(generated)] -= s.presence_penalty + s.frequency_penalty * counts
    return logits


def penalize(logits: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    """Logits [vocabulary] that make the token ids `seen` less likely."""
    if penalty == 1.0 or not seen:
        return logits
    logits = logits.copy()
    chosen = logits[seen]
    factor = np.float32(penalty)
    logits[seen] = np.where(chosen > 0, chosen / factor, chosen * factor)
    return logits


def most_likely(logprobs: np.ndarray, count: int) -> list[tuple[int, float]]:
    """(token id, log-probability) of the `count` most likely ones, in order, from [vocabulary]."""
    count = min(count, len(logprobs))
    top = np.argpartition(-logprobs, count - 1)[:count] if count else []
    return sorted(((int(i), float(logprobs[i])) for i in top), key=lambda pair: -pair[1])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class BeamSearch:
    """Finds the answer with the best mean log-probability, as transformers' `generate` does.

    Among each step's likeliest continuations, those that end the answer are finished if they rank
    within the first `num_beams`; the best of the others continue. The search is over when no beam
    can beat the worst finished answer, or at the length limit.
    """

    def __init__(
        self,
        sampling: Sampling,
        stop_ids: frozenset[int],
        stop_sequences: Sequence[Sequence[int]] = (),
        seen: tuple[int, ...] = (),
    ) -> None:
        self._sampling = sampling
        self._count = sampling.num_beams
        self._stop_ids = stop_ids
        self._stop_sequences = [list(s) for s in stop_sequences]
        self._seen = seen
        self.beams: list[list[int]] = [[]]
        self._scores: np.ndarray = np.zeros(1, np.float32)
        self._finished: list[tuple[np.float32, list[int]]] = []  # best first
        self.done = False

    @property
    def best(self) -> list[int]:
        """The ids of the best finished answer, or else of the best beam."""
        return self._finished[0][1] if self._finished else self.beams[0]

    def step(self, logits: np.ndarray) -> list[int]:
        """Float32 logits [beams, vocabulary] -> the parent of each beam that continues.

        Each of `beams` then ends with the token to feed next; `done`: the search is over.
        """
        scores = np.stack(
            [
                penalize_all(row, self._seen, Counter(beam), self._sampling) + score
                for row, beam, score in zip(
                    log_softmax(logits), self.beams, self._scores, strict=True
                )
            ]
        )
        width = scores.shape[1]
        kept = min(max(2, 1 + len(self._stop_ids)) * self._count, scores.size)
        flat = scores.ravel()
        top = np.argpartition(-flat, kept - 1)[:kept]
        top = top[np.argsort(-flat[top], kind="stable")]
        length = len(self.beams[0]) + 1
        running, finished = [], []
        for rank, place in enumerate(top.tolist()):
            parent, token = divmod(place, width)
            ids = [*self.beams[parent], token]
            if self._ends(ids):
                if rank < self._count:
                    finished.append((flat[place] / np.float32(length), ids))
            else:
                running.append((parent, ids, flat[place]))
        merged = sorted(self._finished + finished, key=lambda pair: -pair[0])
        self._finished = merged[: self._count]
        running = running[: self._count]
        if not running:
            self.done = True
            return []
        self.beams = [ids for _, ids, _ in running]
        self._scores = np.array([score for _, _, score in running], np.float32)
        if len(self._finished) == self._count:
            self.done = self._scores[0] / np.float32(length) <= self._finished[-1][0]
        return [parent for parent, _, _ in running]

    def _ends(self, ids: list[int]) -> bool:
        return (
            ids[-1] in self._stop_ids
            or len(ids) >= self._sampling.max_new_tokens
            or any(ids[-len(s) :] == s for s in self._stop_sequences)
        )
