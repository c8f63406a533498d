"""What a decoder computes in one call: rows of any conversations. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PAGE = 16  # positions whose keys and values lie together


@dataclass(frozen=True)
class Rows:
    """A row is one position of one conversation. A conversation's rows stand in order.

    tokens: int32 [rows], a token id, or -1 - i for row i of `embeds`.
    embeds: float32 [n, hidden_size], of pictures.
    positions: int32 [rows].
    table_rows: int32 [rows], the conversation: which row of `tables`.
    tables: int32 [conversations, width], each conversation's pages, in order; unused places 0.
    wanted: int32 [n], the rows whose logits are asked for, ascending.
    """

    tokens: np.ndarray
    embeds: np.ndarray
    positions: np.ndarray
    table_rows: np.ndarray
    tables: np.ndarray
    wanted: np.ndarray

    def split(self, count: int) -> Iterator["Rows"]:
        """The same in parts of at most `count` rows."""
        if len(self.tokens) <= count:
            yield self
            return
        for start in range(0, len(self.tokens), count):
            part = slice(start, start + count)
            here = (self.wanted >= start) & (self.wanted < start + count)
            yield Rows(
                self.tokens[part],
                self.embeds,
                self.positions[part],
                self.table_rows[part],
                self.tables,
                self.wanted[here] - start,
            )
