"""Beam search, step by step: log-probabilities in, which beam goes on with which token out."""

from collections.abc import Sequence

import numpy as np

from minigpt4.engine.sampling import Sampling, log_softmax, penalize

_NEVER = np.float32(-1e9)


class BeamSearch:
    """The best answer by its tokens' mean log-probability, as transformers' `generate` finds it.

    Of each step's likeliest continuations, those that end an answer are kept as finished when they
    are among the first `num_beams`; the best others go on. The search ends when no running beam
    can beat the worst of the finished ones, or at the length limit.
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
        self._seen = list(seen)
        self.beams: list[list[int]] = [[]]
        self._scores = np.zeros(1, np.float32)
        self._finished: list[tuple[np.float32, list[int]]] = []  # best first
        self.done = False

    @property
    def best(self) -> list[int]:
        """The ids of the best finished answer, or of the best so far."""
        return self._finished[0][1] if self._finished else self.beams[0]

    def step(self, logits: np.ndarray) -> list[int]:
        """Float32 logits [beams, vocabulary] -> the parent of each beam that goes on.

        `beams` then ends in the tokens to feed; `done` says that there is nothing to go on with.
        """
        penalty = self._sampling.repetition_penalty
        scores = np.stack(
            [
                penalize(row, self._seen + beam, penalty) + score
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
