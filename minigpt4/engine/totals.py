"""What an engine has done since it started: numbers that only grow. No torch."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from minigpt4.engine.stream import Stats


class Histogram:
    """Counts of values by size: `counts[i]` of those up to `bounds[i]`, the last of all others."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Totals:
    """Probes of the engine's health are not in it.

    errors: by `UserError.kind`, of requests that were refused or that failed; seconds_to_first:
    from `submit`; tokens_per_s: of each answer of two tokens or more, after its first.
    """

    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds_to_first: Histogram = field(
        default_factory=lambda: Histogram(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
    )
    tokens_per_s: Histogram = field(
        default_factory=lambda: Histogram(1, 2, 5, 10, 20, 50, 100, 200, 500)
    )

    def note_end(self, stats: Stats) -> None:
        """An answer has ended."""
        if stats.tokens:
            self.seconds_to_first.add(stats.seconds_to_first)
        if stats.tokens_per_s:
            self.tokens_per_s.add(stats.tokens_per_s)
