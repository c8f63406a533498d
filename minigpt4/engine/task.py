"""A request on its way through the engine: the tokens of its conversation, where their keys and
values lie, and what a step computes of it. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from minigpt4.engine.beams import BeamSearch
from minigpt4.engine.rows import PAGE, Rows
from minigpt4.engine.sampling import Sampler, Sampling
from minigpt4.engine.stream import Stream
from minigpt4.errors import UserError
from minigpt4.model.image import Picture
from minigpt4.model.prompt import IMAGE_ID, Prompt


@dataclass(frozen=True)
class Request:
    """What to answer: the prompt, its pictures by key, how to draw, where to end."""

    prompt: Prompt
    pictures: Mapping[str, Picture]
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # where beams end, which are shown when done
    penalized: tuple[int, ...] = ()  # ids the repetition penalty covers from the start
    logprobs: bool = False
    watched: tuple[int, ...] = ()  # ids whose log-probabilities as the first token are wanted
    max_seconds: float = 600.0  # from submit; the answer ends where it stands
    session: str = ""  # the same for all of a conversation: machines remember what they computed


def answer_limit(request: Request, context: int) -> int:
    """Tokens that the answer may have; UserError where the prompt leaves no room for any."""
    limit = min(request.sampling.max_new_tokens, context - len(request.prompt))
    if limit < 1:
        raise UserError(
            f"The conversation takes {len(request.prompt)} tokens, and the model reads at most "
            f"{context - 1}: shorten it.",
            "too_long",
        )
    return limit


class Sequence:
    """Tokens of one conversation (or beam), and the pages that hold what is computed of them."""

    def __init__(self, ids: list[int], keys: list[int], pages: list[int], digest: bytes) -> None:
        self.ids, self.keys, self.pages, self.digest = ids, keys, pages, digest
        self.filed = len(pages)
        self.computed = len(pages) * PAGE

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.keys.append(token)


class Task:
    """A request on its way: waiting, being read, being answered."""

    def __init__(self, request: Request, stream: Stream, limit: int, urgent: bool = False) -> None:
        self.request, self.stream, self.limit = request, stream, limit
        self.urgent = urgent  # waits for nobody: a probe of the engine's health
        self.sampler = Sampler(request.sampling, request.penalized)
        self.search: BeamSearch | None = None
        if request.sampling.num_beams > 1:
            self.search = BeamSearch(
                request.sampling, request.stop_ids, request.stop_sequences, request.penalized
            )
        self.embeds: dict[str, np.ndarray] = {}
        self.sequences: list[Sequence] = []
        self.promised = 0  # pages reserved and not taken yet

    @property
    def picture_keys(self) -> set[str]:
        return {image.key for _, image in self.request.prompt.images}

    @property
    def reading(self) -> bool:
        """Is some of the prompt still to be fed?"""
        return self.sequences[0].computed < len(self.request.prompt) - 1

    @property
    def pages_needed(self) -> int:
        """At most, whatever can be reused."""
        tokens = len(self.request.prompt) + self.limit
        return -(-tokens // PAGE) * (self.request.sampling.num_beams if self.search else 1)

    def embedding(self, position: int) -> np.ndarray:
        """The picture's vector that stands at `position` of the prompt."""
        start, image = next(
            (start, image)
            for start, image in reversed(self.request.prompt.images)
            if start <= position
        )
        return self.embeds[image.key][position - start]


@dataclass
class Piece:
    """Rows of one sequence in one step."""

    task: Task
    sequence: Sequence
    count: int

    @property
    def reaches_end(self) -> bool:
        return self.sequence.computed + self.count == len(self.sequence.ids)


def by_task(pieces: list[Piece]) -> Iterator[tuple[Task, list[Piece]]]:
    """(task, its pieces), in the order of the first of them."""
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(id(piece.task), []).append(piece)
    for group in groups.values():
        yield group[0].task, group


def rows_of(pieces: list[Piece], width: int) -> Rows:
    """What the decoder computes for these pieces; `width`: of an embedding."""
    tokens, embeds, positions, table_rows, wanted = [], [], [], [], []
    for number, piece in enumerate(pieces):
        sequence = piece.sequence
        for position in range(sequence.computed, sequence.computed + piece.count):
            token = sequence.ids[position]
            if token == IMAGE_ID:
                embeds.append(piece.task.embedding(position))
                token = -len(embeds)
            tokens.append(token)
            positions.append(position)
            table_rows.append(number)
        if piece.reaches_end:
            wanted.append(len(tokens) - 1)
    tables = np.zeros((len(pieces), max(len(p.sequence.pages) for p in pieces)), np.int32)
    for number, piece in enumerate(pieces):
        tables[number, : len(piece.sequence.pages)] = piece.sequence.pages
    return Rows(
        np.array(tokens, np.int32),
        np.stack(embeds) if embeds else np.zeros((0, width), np.float32),
        np.array(positions, np.int32),
        np.array(table_rows, np.int32),
        tables,
        np.array(wanted, np.int32),
    )
