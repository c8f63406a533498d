"""Logits -> the next token."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minigpt4.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. Defaults are the published demo's.

    temperature 0 is greedy; top_p 1 and top_k 0 are off; repetition_penalty divides the positive
    and multiplies the negative logits of tokens already generated (CTRL, Keskar et al., 2019);
    seed None draws a fresh one; num_beams above 1 is beam search, without sampling.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.05
    max_new_tokens: int = 300
    num_beams: int = 1
    seed: int | None = None

    # field -> (lowest, highest, may be the lowest itself)
    _RANGES = {
        "temperature": (0.0, 10.0, True),
        "top_p": (0.0, 1.0, False),
        "top_k": (0, 1_000_000, True),
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
            low, high, inclusive = self._RANGES[name]
            whole = isinstance(low, int)
            number = isinstance(value, int if whole else (int, float))
            good = (
                number
                and not isinstance(value, bool)
                and math.isfinite(value)
                and (low <= value if inclusive else low < value)
                and value <= high
            )
            if name == "temperature" and good and 0 < value < 0.01:
                raise UserError("temperature must be 0, or from 0.01 up to 10.0.")
            if not good:
                kind = "a whole number" if whole else "a number"
                start = "from" if inclusive else "above"
                raise UserError(f"{name} must be {kind} {start} {low} up to {high}.")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [vocabulary] with those of the token ids `seen` made less likely."""
    if penalty == 1.0 or not len(seen):
        return logits
    chosen = logits[seen]
    chosen = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits.index_put((seen,), chosen)


def choose(
    logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> int:
    """The next token id from float logits [vocabulary].

    Order as in the published demo's `generate`: penalty, temperature, top-k, top-p.
    """
    logits = penalize(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    ordered, order = logits.sort(descending=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    probabilities = ordered.softmax(-1)
    if sampling.top_p < 1.0:  # the smallest set of likeliest tokens that reaches top_p
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(order[drawn])
