"""One model, many conversations: a thread owns the model and answers all of them together.

Each step encodes pictures that have come, lets waiting requests in, feeds a chunk of the prompts
being read and one token of every running answer through the model at once, and hands each request
its token. The engine knows no tokenizer and no template: it speaks token ids and picture keys.
"""

import atexit
import logging
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from minigpt4.engine.decoder import build_decoder
from minigpt4.engine.faults import (
    BROKEN,
    ENDING,
    HANGING,
    KINDS,
    NO_MEMORY,
    explain,
    fault,
    out_of_memory,
)
from minigpt4.engine.kvcache import PageCache
from minigpt4.engine.pictures import Pictures
from minigpt4.engine.queue import Queue
from minigpt4.engine.rows import PAGE
from minigpt4.engine.sampling import Sampling, log_softmax
from minigpt4.engine.stream import Stream
from minigpt4.engine.task import Piece, Request, Sequence, Task, answer_limit, by_task, rows_of
from minigpt4.errors import UserError
from minigpt4.model.image import Picture
from minigpt4.model.prompt import Prompt

if TYPE_CHECKING:  # it imports torch, in seconds
    from minigpt4.model.minigpt4 import MiniGPT4

ENCODED_ALONE, ENCODED_AMONG_OTHERS = 4, 1  # pictures in a step, so that nobody's words stall
PROBE_PAGES = 1  # kept for `health`
CHUNK_ALONE, CHUNK_AMONG_OTHERS = 256, 32  # rows of prompts in a step

log = logging.getLogger(__name__)


class Engine(Queue):
    """Owns the model: `encode` pictures early, `submit` requests, read their streams.

    max_running: answers at once; max_waiting: requests that may wait for their turn; kv_megabytes:
    memory for keys and values, of running and of remembered conversations (None: a model's usual);
    hang_seconds: a step that takes longer means that the model hangs.
    """

    def __init__(
        self,
        model: "MiniGPT4",
        max_running: int = 32,
        max_waiting: int = 64,
        kv_megabytes: int | None = None,
        hang_seconds: float = 60.0,
    ) -> None:
        self.model = model
        super().__init__(max_running, max_waiting)
        self._hang_seconds = hang_seconds
        self.decoder, pages = build_decoder(model, kv_megabytes)
        self._cache = PageCache(pages)
        self._condition = self._lock = threading.Condition()
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []
        self._pictures = Pictures(model, explain)
        self._row_limit = CHUNK_ALONE
        self._good_steps = 0
        self._step_started: float | None = None
        self._draining = self._closing = False
        self.fault = ""  # a sentence while the engine cannot answer
        self._thread = self._start_thread()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="engine watch", daemon=True)
        self._watcher.start()
        atexit.register(self.close)  # a thread within the model would not outlive the interpreter

    # --- what callers use ----------------------------------------------------------------------

    def encode(self, picture: Picture) -> np.ndarray:
        """The picture's embeddings, float32 [image_tokens, llm_hidden_size], computed once."""
        with self._condition:
            embeds = self._pictures.find(picture.key)
            if embeds is not None:
                return embeds
            self._refuse_if_faulty()
            future = self._pictures.want(picture)
            self._condition.notify_all()
        return future.result()

    def submit(self, request: Request) -> Stream:
        """Start answering. UserError where the queue is full or the request cannot ever fit."""
        try:
            return self._submit(request, urgent=False)
        except UserError as error:
            self.totals.errors[error.kind] += 1
            raise

    def health(self, seconds: float = 10.0) -> bool:
        """Does a real token come within `seconds`? It does not wait behind others' requests."""
        if self.fault:
            return False
        probe = Request(
            Prompt([0], [0], [], [False]),
            {},
            Sampling(temperature=0.0, max_new_tokens=1),
            max_seconds=seconds,
        )
        try:
            stream = self._submit(probe, urgent=True)
        except UserError:
            return False
        timer = threading.Timer(seconds, stream.close)
        timer.start()
        try:
            return len(list(stream)) == 1
        except UserError:
            return False
        finally:
            timer.cancel()

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and let those that were taken end: did they, within `seconds`?"""
        with self._condition:
            self._draining = True
        return self._drained(seconds)

    def close(self) -> None:
        """End the threads; whoever waits gets an error.

        Both are waited for: a thread that let go of the model while the interpreter ends would
        abort the program.
        """
        atexit.unregister(self.close)
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._ended.set()
        self._thread.join(timeout=5)
        self._watcher.join(timeout=5)
        self._fail_all(ENDING)

    def _submit(self, request: Request, urgent: bool) -> Stream:
        limit = answer_limit(request, self.model.config.context)
        task = Task(request, Stream(self._position, len(request.prompt)), limit, urgent)
        if task.pages_needed > self._cache.count - PROBE_PAGES:
            raise UserError(
                "The conversation needs more memory than there is for conversations: shorten it, "
                "allow a shorter answer, or use fewer beams.",
                "too_long",
            )
        with self._condition:
            if urgent:
                self._refuse_if_faulty()
                self._waiting.appendleft(task)
            else:
                self._refuse_any()
                self._waiting.append(task)
            self._missing(task)
            self.totals.requests += not urgent
            self._condition.notify_all()
        return task.stream

    def _refuse_if_faulty(self) -> None:
        # The fault is read once: `_watch` may take it back at any time.
        sentence = self.fault or (ENDING if self._closing or self._draining else "")
        if sentence:
            raise fault(sentence)

    def _refuse_any(self) -> None:
        self._refuse_if_faulty()
        super()._refuse_any()

    def _missing(self, task: Task) -> bool:
        """Have those of its pictures encoded that are not; were there any? The lock is held.

        Where there are none, the embeddings are all it needs: the pictures, which may be large, are
        let go long before the answer ends.
        """
        keys = task.picture_keys - task.embeds.keys()
        found = {key: self._pictures.find(key) for key in keys}
        missing = [key for key, embeds in found.items() if embeds is None]
        for key in missing:
            self._pictures.want(task.request.pictures[key])
        if not missing:
            task.embeds |= found
            task.request = replace(task.request, pictures={})
        return bool(missing)

    def _position(self, stream: Stream) -> int:
        with self._condition:
            return next((i for i, t in enumerate(self._waiting, 1) if t.stream is stream), 0)

    # --- the thread ----------------------------------------------------------------------------

    def _start_thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        thread.start()
        return thread

    def _loop(self) -> None:
        while True:
            with self._condition:
                while not (
                    self._waiting or self._running or self._pictures.waiting or self._closing
                ):
                    self._condition.wait()
                if self._closing:
                    return
            self._step_started = time.monotonic()  # what `_watch` tells steps apart by
            self._step()
            self._step_started = None

    def _step(self) -> None:
        self._drop_ended()
        self._encode_some()
        self._admit()
        pieces = self._plan()
        if pieces:
            self._compute(pieces)

    def _drop_ended(self) -> None:
        """Requests that were closed, or have had their time, leave."""
        for task in [*self._running, *self._waiting]:
            if not task.stream.stop_reason and task.stream._seconds() > task.request.max_seconds:
                task.stream._end("time")
        for task in [t for t in self._running if t.stream.stop_reason]:
            self._leave(task)
        with self._condition:
            self._waiting = deque(t for t in self._waiting if not t.stream.stop_reason)

    def _encode_some(self) -> None:
        with self._condition:
            pictures = self._pictures.next(ENCODED_AMONG_OTHERS if self._running else ENCODED_ALONE)
        if not pictures:
            return
        outcomes = self._pictures.encode(pictures)
        with self._condition:
            for picture, outcome in zip(pictures, outcomes, strict=True):
                self._pictures.note(picture, outcome)
                if isinstance(outcome, UserError):
                    for task in self._waiting:
                        if picture.key in task.picture_keys:
                            self._fail(task, str(outcome))
            for task in self._waiting:
                if not task.stream.stop_reason:
                    self._missing(task)

    def _admit(self) -> None:
        """Let waiting requests in, first come first, while there are slots and pages."""
        while self._waiting:
            task = self._waiting[0]  # a probe of `health` may come in before it at any time
            if len(self._running) >= self.max_running and not task.urgent:
                return
            if task.stream.stop_reason:
                with self._condition:
                    self._waiting.remove(task)
                continue
            with self._condition:
                if self._missing(task):
                    return
            if not self._give_pages(task):
                return
            with self._condition:
                self._waiting.remove(task)
                self._running.append(task)
            stats = task.stream.stats
            stats.seconds_waiting = task.stream._seconds()
            stats.reused_tokens = task.sequences[0].computed
            if not task.urgent:
                self.totals.prompt_tokens += stats.prompt_tokens
                self.totals.reused_tokens += stats.reused_tokens

    def _give_pages(self, task: Task) -> bool:
        """Reuse what is known of the prompt, promise the rest."""
        prompt = task.request.prompt
        known = self._cache.match(prompt.keys[:-1])  # the last token's logits are wanted
        needed = task.pages_needed - len(known)
        if not self._cache.reserve(needed, spare=0 if task.urgent else PROBE_PAGES):
            self._cache.release(known)
            return False
        task.promised = needed
        digests = self._cache.digests(prompt.keys[: len(known) * PAGE])
        digest = digests[-1] if digests else b""
        task.sequences = [Sequence([*prompt.ids], [*prompt.keys], known, digest)]
        return True

    def _leave(self, task: Task) -> None:
        """A task that has ended gives back its place and its pages."""
        self._running.remove(task)
        if not task.urgent:
            self.totals.note_end(task.stream.stats)
        for sequence in task.sequences:
            self._cache.release(sequence.pages)
        self._cache.unreserve(task.promised)
        task.sequences, task.promised = [], 0

    # --- a step's rows -------------------------------------------------------------------------

    def _plan(self) -> list[Piece]:
        """One row of every answer, then a chunk of the prompts being read, in equal shares.

        An answer that is first in line runs, even with more beams than there is room for.
        """
        pieces, room = [], self._row_limit
        reading = [t for t in self._running if t.reading]
        for place, task in enumerate(self._running):
            if not task.reading and (place == 0 or room >= len(task.sequences)):
                pieces += [Piece(task, sequence, 1) for sequence in task.sequences]
                room = max(0, room - len(task.sequences))
        if reading:
            chunk = min(room, CHUNK_AMONG_OTHERS if pieces else CHUNK_ALONE)
            share = max(1, chunk // len(reading))
            for task in reading:
                sequence = task.sequences[0]
                count = min(share, room, len(sequence.ids) - sequence.computed)
                if count:
                    pieces.append(Piece(task, sequence, count))
                    room -= count
        # Whoever did not fit into this step is first in the next. Another list: others look at this
        # one, and while a list is sorted it is empty.
        planned = {id(p.task) for p in pieces}
        self._running = sorted(self._running, key=lambda task: id(task) in planned)
        return pieces

    def _take_page(self, task: Task) -> int:
        task.promised -= 1
        return self._cache.take()

    def _compute(self, pieces: list[Piece]) -> None:
        """Run the pieces through the model and hand each request what came out.

        Where that fails, the step is tried again in smaller parts, down to single requests: only
        the one that fails alone gets an error.
        """
        for piece in pieces:
            while len(piece.sequence.pages) * PAGE < piece.sequence.computed + piece.count:
                piece.sequence.pages.append(self._take_page(piece.task))
        try:
            rows = rows_of(pieces, self.model.config.llm_hidden_size)
            results = iter(self.decoder.forward(rows))
        except Exception as error:
            self._recover(pieces, error)
            return
        self._good_steps += 1
        if self._good_steps % 200 == 0:
            self._row_limit = min(CHUNK_ALONE, 2 * self._row_limit)
        for task, group in by_task(pieces):
            found = [next(results) for piece in group if piece.reaches_end]
            try:
                for piece in group:
                    self._advance(piece)
                if found:
                    self._answer(task, np.stack(found) if task.search else found[0][None])
            except Exception:
                log.exception("while choosing a token")
                self._fail(task, BROKEN)

    def _recover(self, pieces: list[Piece], error: Exception) -> None:
        short = out_of_memory(error)
        if short:
            log.warning("out of memory with %d rows", sum(p.count for p in pieces))
            self._row_limit = max(1, min(self._row_limit, sum(p.count for p in pieces)) // 2)
        else:
            log.error("while running the model", exc_info=error)
        tasks = list(by_task(pieces))
        if len(tasks) > 1:
            half = len(tasks) // 2
            for part in (tasks[:half], tasks[half:]):
                self._compute([piece for _, group in part for piece in group])
        elif short and len(pieces) == 1 and pieces[0].count > 1:
            self._compute([Piece(pieces[0].task, pieces[0].sequence, pieces[0].count // 2)])
        else:
            self._fail(tasks[0][0], NO_MEMORY if short else BROKEN)

    def _advance(self, piece: Piece) -> None:
        """Note that the piece's rows are computed; file the pages they filled."""
        sequence = piece.sequence
        sequence.computed += piece.count
        while (sequence.filed + 1) * PAGE <= sequence.computed:
            part = slice(sequence.filed * PAGE, (sequence.filed + 1) * PAGE)
            page = sequence.pages[sequence.filed]
            sequence.digest = self._cache.file(page, sequence.digest, sequence.keys[part])
            sequence.filed += 1

    # --- tokens --------------------------------------------------------------------------------

    def _answer(self, task: Task, logits: np.ndarray) -> None:
        """Logits [sequences, vocabulary] -> the task's next token or tokens."""
        if not np.isfinite(logits.max(-1)).all():
            log.error("the model's logits are no numbers")
            for sequence in task.sequences:  # nobody shall go on from what led here
                self._cache.forget(sequence.pages)
            self._fail(task, BROKEN)
        elif task.search is not None:
            self._go_on_with_beams(task, logits)
        else:
            if task.request.watched and not task.stream.stats.tokens:
                watched = log_softmax(logits[0])[list(task.request.watched)]
                task.stream.watched = watched.tolist()
            token = task.sampler(logits[0])
            logprob = float(log_softmax(logits[0])[token]) if task.request.logprobs else None
            self._give(task, token, logprob)
            task.sequences[0].add(token)

    def _give(self, task: Task, token: int, logprob: float | None = None) -> None:
        """Hand out a token, and end the request where it was the last."""
        stream = task.stream
        stream._put(token, logprob)
        self.totals.tokens += not task.urgent
        if token in task.request.stop_ids:
            stream._end("stop")
        elif stream.stats.tokens >= task.limit:
            stream._end("length")

    def _go_on_with_beams(self, task: Task, logits: np.ndarray) -> None:
        parents = task.search.step(logits)
        if task.search.done:
            for token in task.search.best:
                self._give(task, token)
            task.stream._end("stop")
            return
        old, new, used = [*task.sequences], [], set()
        for parent in parents:
            new.append(old[parent] if parent not in used else self._fork(task, old[parent]))
            used.add(parent)
        task.sequences = new
        for sequence, ids in zip(new, task.search.beams, strict=True):
            sequence.add(ids[-1])
        for place, sequence in enumerate(old):
            if place not in used:
                before = self._cache.free
                self._cache.release(sequence.pages)
                freed = self._cache.free - before
                self._cache.reserve(freed)
                task.promised += freed

    def _fork(self, task: Task, sequence: Sequence) -> Sequence:
        """Another sequence that goes on from this one's tokens: full pages are shared.

        It is among the task's from the start, so that its pages come back where copying fails.
        """
        fork = Sequence([*sequence.ids], [*sequence.keys], [], sequence.digest)
        task.sequences.append(fork)
        full = sequence.computed // PAGE
        for page in sequence.pages[:full]:
            self._cache.share(page)
        fork.pages = sequence.pages[:full]
        fork.filed, fork.computed = full, sequence.computed
        for page in sequence.pages[full:]:
            fork.pages.append(self._take_page(task))
            self.decoder.copy_page(page, fork.pages[-1])
        return fork

    # --- faults --------------------------------------------------------------------------------

    def _fail(self, task: Task, sentence: str) -> None:
        if not (task.urgent or task.stream.stop_reason):
            self.totals.errors[KINDS[sentence]] += 1
        task.stream._end("error", fault(sentence))

    def _fail_all(self, sentence: str) -> None:
        with self._condition:
            tasks = [*self._waiting, *self._running]
            self._pictures.fail_all(fault(sentence))
        for task in tasks:
            self._fail(task, sentence)

    def _watch(self) -> None:
        """Notice a loop that hangs or has died; tell everyone who waits.

        Time is counted in this thread's own ticks: a program that was put to sleep as a whole does
        not hang.
        """
        tick = min(0.5, self._hang_seconds / 4)
        watched, lasted = None, 0.0
        while not self._ended.wait(tick):
            started = self._step_started
            lasted = lasted + tick if started == watched else 0.0
            watched = started
            if not self._thread.is_alive() and not self._closing:
                log.error("the engine's thread died; starting it again")
                with self._condition:  # who came in between would wait for ever
                    self._fail_all(BROKEN)
                    self._waiting.clear()
                    self._running.clear()
                    self._cache = PageCache(self._cache.count)
                    self._step_started = None
                    self._thread = self._start_thread()
            elif started is None:  # at rest, or back from a hang
                self.fault = ""
            elif lasted > self._hang_seconds:
                self.fault = HANGING
                self._fail_all(HANGING)
