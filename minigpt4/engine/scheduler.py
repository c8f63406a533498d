"""The scheduler: requests, and the rows of each step. No torch.

`Scheduler` plans the steps of the engine that runs the language model in this process: it reserves
blocks for a request, admits it, and divides a step's rows among prompts (prefill) and running
answers (decode).
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from minigpt4.engine.kvcache import BLOCK_SIZE, BlockCache, hashes
from minigpt4.engine.sampling import BeamSearch, Constraint, Draw, Sampler, Sampling
from minigpt4.engine.stream import Stream
from minigpt4.errors import UserError
from minigpt4.model.image import Encoded, Picture
from minigpt4.model.prompt import IMAGE_ID, Prompt

PROBE_BLOCKS = 1  # never reserved by requests, so that a health probe is always admitted
STEP_SECONDS = 2.0  # for a step with prompts: answers and probes must not wait long
GOOD_STEPS = 200  # after so many, the row limit that a shortage of memory has halved doubles again


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request for an answer: the prompt, its pictures by key, how to sample, where to stop."""

    prompt: Prompt
    pictures: Mapping[str, Picture]
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # tokens that end a beam: it has no text yet
    penalized: tuple[int, ...] = ()  # ids the repetition penalty covers from the start
    logprobs: bool = False
    top_logprobs: int = 0  # how many of the most likely tokens to report, with `logprobs`
    constraint: Constraint | None = None  # a rule that the answer follows; for this request alone
    watched: tuple[int, ...] = ()  # ids whose log-probability as the first token is wanted
    max_seconds: float = 600.0  # from submit; then the answer ends as it is
    session: str = ""  # the same for a whole conversation, which stays on one machine


def answer_limit(request: Request, context: int) -> int:
    """The maximum number of tokens of the answer; UserError if the prompt fills the context."""
    limit = min(request.sampling.max_new_tokens, context - len(request.prompt))
    if limit < 1:
        raise UserError(
            f"The conversation takes {len(request.prompt)} tokens, and the model reads at most "
            f"{context - 1}: shorten it.",
            "too_long",
        )
    return limit


def refuse_beyond_tokens(request: Request) -> None:
    """UserError for features that need the language model to run in this process."""
    if request.top_logprobs or request.constraint is not None:
        what = "response_format" if request.constraint is not None else "top_logprobs"
        raise UserError(
            f"{what} is not available if the language model runs in another process: leave it out."
        )


class Sequence:
    """The tokens of a conversation (or of one beam), and the blocks with their keys and values."""

    def __init__(
        self, ids: list[int], keys: list[int], blocks: list[int], last_hash: bytes = b""
    ) -> None:
        self.ids, self.keys, self.blocks = ids, keys, blocks
        self.last_hash = last_hash  # of the last registered block
        self.registered = len(blocks)
        self.computed = len(blocks) * BLOCK_SIZE  # positions

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.keys.append(token)


class RequestState:
    """A request in the engine: waiting, in prefill, or decoding.

    limit: the maximum number of tokens of its answer.
    """

    def __init__(self, request: Request, stream: Stream, limit: int) -> None:
        self.request, self.stream, self.limit = request, stream, limit
        self.sampler = Sampler(request.sampling, request.penalized, request.constraint)
        self.search: BeamSearch | None = None
        if request.sampling.num_beams > 1:
            sampling = replace(request.sampling, max_new_tokens=limit)
            self.search = BeamSearch(
                sampling, request.stop_ids, request.stop_sequences, request.penalized
            )
        self.pictures: dict[str, Future[Encoded]] = {}  # being encoded, by key
        self.embeds: dict[str, np.ndarray] = {}  # by picture key
        self.sequences: list[Sequence] = []
        self.reserved = 0  # blocks that are not allocated yet

    @property
    def has_pictures(self) -> bool:
        """Has the encoder finished all pictures, successfully or not?"""
        return all(future.done() for future in self.pictures.values())

    @property
    def is_late(self) -> bool:
        """Has the request exceeded its `max_seconds`?"""
        return self.stream._seconds() > self.request.max_seconds

    @property
    def in_prefill(self) -> bool:
        """Are there prompt tokens to compute before the last one?"""
        return self.sequences[0].computed < len(self.request.prompt) - 1

    @property
    def blocks_needed(self) -> int:
        """The maximum number of blocks, if none is reused."""
        tokens = len(self.request.prompt) + self.limit
        return -(-tokens // BLOCK_SIZE) * (self.request.sampling.num_beams if self.search else 1)

    def draw(self) -> Draw | None:
        """The draw for the next token; None if the logits are needed for something else, too."""
        request, sampling = self.request, self.request.sampling
        watched = request.watched and not self.stream.stats.tokens
        further = sampling.presence_penalty or sampling.frequency_penalty
        if self.search is not None or request.logprobs or watched or request.constraint or further:
            return None
        return self.sampler.draw()

    def embedding(self, position: int) -> np.ndarray:
        """The picture's embedding at a position of the prompt."""
        start, image = next(
            (start, image)
            for start, image in reversed(self.request.prompt.images)
            if start <= position
        )
        return self.embeds[image.key][position - start]


# --- what a step computes -------------------------------------------------------------------------


@dataclass
class Chunk:
    """The next `count` rows of one sequence."""

    state: RequestState
    sequence: Sequence
    count: int

    @property
    def reaches_end(self) -> bool:
        return self.sequence.computed + self.count == len(self.sequence.ids)


def by_request(chunks: list[Chunk]) -> list[tuple[RequestState, list[Chunk]]]:
    """Each request with its chunks, in the order of its first one."""
    groups: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(id(chunk.state), []).append(chunk)
    return [(group[0].state, group) for group in groups.values()]


class Scheduler:
    """Blocks for requests, and rows for steps. Used by the engine's thread alone.

    blocks, kept: see `BlockCache`. chunk_rows: (prompt rows in a step without running answers, with
    some); a slow model gets fewer than the first, but no fewer than the second. row_limit: rows in
    a step, fewer after a shortage of memory.
    """

    def __init__(
        self, blocks: int, kept: int | None = None, chunk_rows: tuple[int, int] = (256, 32)
    ) -> None:
        self.cache = BlockCache(blocks, kept)
        self.chunk_rows = chunk_rows
        self.row_limit = chunk_rows[0]
        self._prompt_rows = chunk_rows[1]  # as many as fit into STEP_SECONDS, by the last steps
        self._good_steps = 0

    def room(self, beams: int) -> int:
        """The maximum number of tokens of one request, prompt and answer together."""
        return (self.cache.count - PROBE_BLOCKS) // beams * BLOCK_SIZE

    def admit(self, state: RequestState) -> bool:
        """Share the cached blocks of the prompt and reserve the rest; False if too few are
        available."""
        prompt = state.request.prompt
        known = self.cache.match(prompt.keys[:-1])  # the last token's logits are needed
        needed = state.blocks_needed - len(known)
        if not self.cache.reserve(needed, spare=0 if state.stream.probe else PROBE_BLOCKS):
            self.cache.free(known)
            return False
        state.reserved = needed
        known_hashes = hashes(prompt.keys[: len(known) * BLOCK_SIZE])
        last_hash = known_hashes[-1] if known_hashes else b""
        state.sequences = [Sequence([*prompt.ids], [*prompt.keys], known, last_hash)]
        return True

    def schedule(self, running: list[RequestState]) -> tuple[list[Chunk], list[RequestState]]:
        """(the step's chunks, `running` in the order for the next step).

        One row of every answer comes first, then chunks of the prompts, in equal shares. The
        request at the front always runs, even with more beams than the step has rows; requests that
        do not fit move to the front.
        """
        chunks, room = [], self.row_limit
        prompts = [state for state in running if state.in_prefill]
        for place, state in enumerate(running):
            beams = len(state.sequences)
            if not state.in_prefill and (place == 0 or room >= beams):
                chunks += [Chunk(state, sequence, 1) for sequence in state.sequences]
                room = max(0, room - beams)
        if prompts:
            rows = min(room, self.chunk_rows[1] if chunks else self._prompt_rows)
            share = max(1, rows // len(prompts))
            for state in prompts:
                sequence = state.sequences[0]
                count = min(share, room, len(sequence.ids) - sequence.computed)
                if count:
                    chunks.append(Chunk(state, sequence, count))
                    room -= count
        scheduled = {id(chunk.state) for chunk in chunks}
        return chunks, sorted(running, key=lambda state: id(state) in scheduled)

    def allocate(self, chunk: Chunk) -> None:
        """Give the chunk's sequence the blocks that its rows are written to."""
        sequence = chunk.sequence
        while len(sequence.blocks) * BLOCK_SIZE < sequence.computed + chunk.count:
            sequence.blocks.append(self._allocate(chunk.state))

    def _allocate(self, state: RequestState) -> int:
        state.reserved -= 1
        return self.cache.allocate()

    def advance(self, chunk: Chunk) -> None:
        """Note that the chunk's rows are computed, and register the blocks that are full now."""
        sequence = chunk.sequence
        sequence.computed += chunk.count
        while (sequence.registered + 1) * BLOCK_SIZE <= sequence.computed:
            first = sequence.registered * BLOCK_SIZE
            sequence.last_hash = self.cache.register(
                sequence.blocks[sequence.registered],
                sequence.last_hash,
                sequence.keys[first : first + BLOCK_SIZE],
            )
            sequence.registered += 1

    def fork(self, state: RequestState, sequence: Sequence) -> tuple[Sequence, list[tuple]]:
        """(another sequence with this one's tokens, the (source, target) blocks to copy).

        Full blocks are shared. The fork is one of the state's sequences from the start, so that its
        blocks are freed even if copying fails.
        """
        full = sequence.computed // BLOCK_SIZE
        blocks = sequence.blocks[:full]
        fork = Sequence([*sequence.ids], [*sequence.keys], blocks, sequence.last_hash)
        fork.computed = sequence.computed
        for block in fork.blocks:
            self.cache.share(block)
        state.sequences.append(fork)
        copies = []
        for block in sequence.blocks[full:]:
            fork.blocks.append(self._allocate(state))
            copies.append((block, fork.blocks[-1]))
        return fork, copies

    def drop_beam(self, state: RequestState, sequence: Sequence) -> None:
        """Free a beam's blocks, and reserve them again for the beams that continue."""
        before = self.cache.available
        self.cache.free(sequence.blocks)
        freed = self.cache.available - before
        self.cache.reserve(freed)
        state.reserved += freed

    def finish(self, state: RequestState) -> None:
        """Free all of a request's blocks."""
        for sequence in state.sequences:
            self.cache.free(sequence.blocks)
        self.cache.unreserve(state.reserved)
        state.sequences, state.reserved = [], 0

    def note_success(self, chunks: list[Chunk], seconds: float) -> None:
        """Note that these chunks fitted into memory and took `seconds`."""
        most, least = self.chunk_rows
        rows = sum(chunk.count for chunk in chunks)
        if rows >= least:  # fewer take hardly less time, since each step reads all weights
            fitting = rows * STEP_SECONDS / max(seconds, 1e-9)
            self._prompt_rows = int(max(least, min(most, fitting)))
        self._good_steps += 1
        if self._good_steps % GOOD_STEPS == 0:
            self.row_limit = min(self.chunk_rows[0], 2 * self.row_limit)

    def note_shortage(self, chunks: list[Chunk]) -> None:
        """Note that these chunks did not fit into memory: later steps have at most half as many
        rows."""
        rows = sum(chunk.count for chunk in chunks)
        self.row_limit = max(1, min(self.row_limit, rows) // 2)


Outputs = np.ndarray | list[np.ndarray | int]  # of each wanted row: see `Decoder.forward`


@dataclass(frozen=True)
class Rows:
    """A decoder's input for one call. A row is one position of one sequence.

    tokens: int32 [rows], a token id, or -1 - i for row i of `embeds`.
    embeds: float32 [n, hidden_size], of pictures.
    positions: int32 [rows]; a sequence's rows are in order.
    table_rows: int32 [rows], the row of `tables` that belongs to the row's sequence.
    tables: int32 [sequences, width], each sequence's blocks, in order; padded with 0.
    wanted: int32 [n], the rows whose logits are needed, ascending.
    draws: for each wanted row its draw, if only the token is needed, or None; or empty.
    """

    tokens: np.ndarray
    embeds: np.ndarray
    positions: np.ndarray
    table_rows: np.ndarray
    tables: np.ndarray
    wanted: np.ndarray
    draws: tuple[Draw | None, ...] = ()

    def take(self, chosen: np.ndarray) -> "Rows":
        """Some of the rows, by their numbers in ascending order."""
        kept = np.isin(self.wanted, chosen)
        return Rows(
            self.tokens[chosen],
            self.embeds,
            self.positions[chosen],
            self.table_rows[chosen],
            self.tables,
            np.flatnonzero(np.isin(chosen, self.wanted)),
            tuple(draw for draw, keep in zip(self.draws, kept, strict=False) if keep),
        )

    def split(self, count: int) -> Iterator["Rows"]:
        """The same rows in parts of at most `count`."""
        if len(self.tokens) <= count:
            yield self
            return
        for start in range(0, len(self.tokens), count):
            yield self.take(np.arange(start, min(start + count, len(self.tokens))))


def rows_of(chunks: list[Chunk], hidden_size: int) -> Rows:
    """The chunks as a decoder's input."""
    tokens, embeds, positions, table_rows, wanted, draws = [], [], [], [], [], []
    for number, chunk in enumerate(chunks):
        sequence = chunk.sequence
        for position in range(sequence.computed, sequence.computed + chunk.count):
            token = sequence.ids[position]
            if token == IMAGE_ID:
                embeds.append(chunk.state.embedding(position))
                token = -len(embeds)
            tokens.append(token)
            positions.append(position)
            table_rows.append(number)
        if chunk.reaches_end:
            wanted.append(len(tokens) - 1)
            draws.append(chunk.state.draw())
    width = max(len(chunk.sequence.blocks) for chunk in chunks)
    tables: np.ndarray = np.zeros((len(chunks), width), np.int32)
    for number, chunk in enumerate(chunks):
        tables[number, : len(chunk.sequence.blocks)] = chunk.sequence.blocks
    return Rows(
        np.array(tokens, np.int32),
        np.stack(embeds) if embeds else np.zeros((0, hidden_size), np.float32),
        np.array(positions, np.int32),
        np.array(table_rows, np.int32),
        tables,
        np.array(wanted, np.int32),
        tuple(draws),
    )
