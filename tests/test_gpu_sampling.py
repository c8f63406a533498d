"""Tokens chosen for all rows at once, against the host's sampler with the same random numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minigpt4.engine.gpu.sampling import BROKEN, UNDECIDED, choose, write
from minigpt4.engine.sampling import Draw, Sampler, Sampling

SETTINGS = [
    Sampling(temperature=0.0, repetition_penalty=1.5),
    Sampling(),  # the published demo's
    Sampling(temperature=0.7, top_p=0.5, repetition_penalty=1.0),
    Sampling(temperature=1.5, top_p=1.0, top_k=40),
    Sampling(top_p=1.0, min_p=0.05, repetition_penalty=0.8),
    Sampling(temperature=2.0, top_p=0.95, top_k=1000, min_p=0.01),
    Sampling(temperature=0.01, top_p=1.0),
    Sampling(temperature=10.0, top_p=0.001),
    Sampling(temperature=3.0, top_p=1.0, repetition_penalty=1.0),
]


def chosen(logits: np.ndarray, draws: list[Draw | None], seen: int = 16) -> list[int]:
    settings = np.zeros((len(draws), 6))
    ids = np.full((len(draws), seen), 7, np.int32)  # as an earlier step leaves them
    write(draws, settings, ids)
    return choose(*map(torch.from_numpy, (logits, settings, ids))).tolist()


@pytest.mark.parametrize("vocabulary", [50, 1024, 4000])
def test_the_same_uniform_gives_the_hosts_token(vocabulary):
    """All settings, side by side in 270 rows; the likelier a token, the more draws hit it."""
    draw = np.random.default_rng(0)
    draws = [
        Draw(s, draw.choice(vocabulary, count, replace=False).tolist(), draw.random())
        for s in SETTINGS
        for count in [0, 1, 16] * 10
    ]
    logits = draw.normal(size=(len(draws), vocabulary)).astype(np.float32) * 3
    found = chosen(logits, draws)
    undecided = 0
    for row, one in enumerate(draws):
        sampler = Sampler(one.sampling, tuple(one.seen))
        sampler._draw = one
        expected = sampler(logits[row])
        undecided += found[row] == UNDECIDED
        assert found[row] in (expected, UNDECIDED), (row, one)
    assert undecided <= (0 if vocabulary <= 1024 else 30)
    assert len({*found}) > 20


def test_draws_outside_of_the_likeliest_are_undecided():
    """A flat distribution over more tokens than are sorted: nothing is cut silently."""
    flat = Sampling(top_p=1.0, repetition_penalty=1.0)
    settings = [flat, flat, replace(flat, top_p=0.5), replace(flat, min_p=0.5)]
    draws: list[Draw | None] = [
        Draw(s, [], u) for s, u in zip(settings, (0.1, 0.5, 0.1, 0.1), strict=True)
    ]
    found = chosen(np.zeros((4, 4000), np.float32), draws)
    assert found[0] >= 0 and found[1:] == [UNDECIDED] * 3


def test_what_does_not_fit_is_undecided():
    draws = [None, Draw(Sampling(top_k=1025), [], 0.5), Draw(Sampling(), [*range(17)], 0.5)]
    assert chosen(np.zeros((3, 40), np.float32), draws) == [UNDECIDED] * 3


def test_logits_that_are_not_finite_are_reported():
    logits = np.zeros((3, 40), np.float32)
    logits[0, 3], logits[1, 3], logits[2] = np.nan, np.inf, -np.inf
    for temperature in (0.0, 1.0):
        draws = [Draw(Sampling(temperature=temperature), [3], 0.5)] * 3
        assert {*chosen(logits, draws)} <= {BROKEN, UNDECIDED}
