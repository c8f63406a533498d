"""One model, many conversations: one thread owns the language model and answers all of them
together; another one encodes pictures meanwhile.

Each step schedules (admits waiting requests, chooses rows), runs the model on a chunk of the
prompts in prefill and one token of every running answer, and postprocesses the logits: each request
gets its token. The engine knows no tokenizer and no template, only token ids and pictures' keys.
"""

import atexit
import logging
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from minigpt4.engine.base import AnyEngine
from minigpt4.engine.decoder import build_decoder, empty_cache, kept_blocks, thread_start
from minigpt4.engine.pictures import EmbeddingStore, Pictures
from minigpt4.engine.sampling import BeamSearch, Sampling, log_softmax, most_likely
from minigpt4.engine.scheduler import (
    Chunk,
    Outputs,
    Request,
    RequestState,
    Scheduler,
    Sequence,
    answer_limit,
    by_request,
    rows_of,
)
from minigpt4.engine.stream import (
    BROKEN,
    ENDING,
    HANGING,
    LOST,
    NO_MEMORY,
    Stream,
    failure,
    sentence_for,
)
from minigpt4.engine.worker import Worker
from minigpt4.errors import Count, UserError, ignore
from minigpt4.model.image import Encoded, Picture
from minigpt4.model.prompt import Prompt

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from minigpt4.model.minigpt4 import MiniGPT4

log = logging.getLogger(__name__)


class Engine(AnyEngine):
    """Owns the model: `encode` pictures early, `submit` requests, read their streams.

    max_running: answers at once; max_waiting: requests that may wait; kv_megabytes: memory for keys
    and values of running and remembered conversations (None: see `build_decoder`); hang_seconds: a
    step that takes longer means that the model hangs; eager: use no CUDA graphs; store: keeps
    pictures' embeddings on disk; count: is called with the bytes of weights that are read here.
    UserError if the memory is not available.
    """

    model: "MiniGPT4"

    def __init__(
        self,
        model: "MiniGPT4",
        max_running: int = 32,
        max_waiting: int = 64,
        kv_megabytes: int | None = None,
        hang_seconds: float = 60.0,
        eager: bool = False,
        store: EmbeddingStore | None = None,
        count: Count = ignore,
    ) -> None:
        super().__init__(max_running, max_waiting)
        self._running: list[RequestState] = []
        self.model = model
        self.decoder, blocks = build_decoder(model, kv_megabytes, max_running, eager, count)
        kept = kept_blocks(model.device, blocks, kv_megabytes)
        self._scheduler = Scheduler(blocks, kept, self.decoder.chunk_rows)
        self._pictures = Pictures(model, self._explain, store)
        self._hang_seconds = hang_seconds
        self._hanging = self._lost = False
        self._closing = threading.Event()
        alone = self._lock, self._closing, thread_start(model.device)
        self._answering = Worker("engine", *alone, self._has_work, self._step)
        beside = self._lock, self._closing, thread_start(model.device, own_stream=True)
        waiting = self._pictures.is_waiting
        self._encoding = Worker("engine pictures", *beside, waiting, self._encode_pictures)
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="engine watch", daemon=True)
        self._watcher.start()
        atexit.register(self.close)  # a thread inside the model would crash the exiting interpreter

    # --- what callers use ----------------------------------------------------------------------

    @property
    def fault(self) -> str:
        if self._lost:  # a lost GPU does not come back
            return LOST
        return HANGING if self._hanging else super().fault

    @property
    def decoder_name(self) -> str:
        return self.decoder.name

    @property
    def cache_use(self) -> float:
        cache = self._scheduler.cache
        return 1 - cache.available / cache.count

    def encode(self, picture: Picture) -> Encoded:
        self._refuse_fork()
        with self._lock:
            encoded = self._pictures.find(picture.key)
            if encoded is not None:
                return encoded
            self._refuse_if_ending()
            future = self._pictures.request(picture)
            self._lock.notify_all()
        return future.result()

    def health(self, seconds: float = 10.0) -> bool:
        """Does the model generate a valid token within `seconds`? The probe skips the queue."""
        if self.fault:
            return False
        sampling = Sampling(temperature=0.0, max_new_tokens=1)
        probe = Request(Prompt([0], [0], [], [False]), {}, sampling, max_seconds=seconds)
        try:
            stream = self._submit(probe, probe=True)
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

    def close(self) -> None:
        """End the threads; requests that are not answered yet get an error.

        Waits for all threads: a thread that returns from the model while the interpreter exits
        would abort the program.
        """
        atexit.unregister(self.close)
        if os.getpid() != self._process:
            return
        with self._lock:
            self._ending = True
            self._closing.set()
            self._lock.notify_all()
        self._ended.set()
        for thread in (self._answering.thread, self._encoding.thread, self._watcher):
            thread.join(timeout=5)
        self._fail_all(ENDING)

    def _submit(self, request: Request, probe: bool = False) -> Stream:
        limit = answer_limit(request, self.model.config.context)
        limit = min(limit, self._scheduler.room(request.sampling.num_beams) - len(request.prompt))
        if limit < 1:
            raise UserError(
                "The conversation needs more memory than there is for conversations: shorten it, "
                "or use fewer beams.",
                "too_long",
            )
        stream = Stream(self._position, len(request.prompt), probe)
        state = RequestState(request, stream, limit)
        with self._lock:
            if probe:
                self._refuse_if_ending()
                self._waiting.appendleft(state)
            else:
                self._refuse_if_full()
                self._waiting.append(state)
                self.totals.add(requests=1)
            keys, pictures = request.prompt.picture_keys, request.pictures
            state.pictures = {key: self._pictures.request(pictures[key]) for key in keys}
            self._lock.notify_all()
        return state.stream

    def _refuse_if_ending(self) -> None:
        if sentence := self.fault:  # read once: `_watch` may clear it at any time
            raise failure(sentence)

    # --- the threads ---------------------------------------------------------------------------

    def _has_work(self) -> bool:
        """Is there work? Requests that only wait for a picture do not count. The lock is held."""
        return bool(self._running) or any(
            state.has_pictures or state.is_late or state.stream.stop_reason
            for state in self._waiting
        )

    def _step(self) -> None:
        """Remove requests that have ended, let waiting ones in, and compute the chosen rows."""
        with self._lock:
            self._remove_ended()
            self._admit()
            chunks, self._running = self._scheduler.schedule(self._running)
        if chunks:
            self._run(chunks)

    def _encode_pictures(self) -> None:
        self._pictures.encode_some()
        with self._lock:
            self._lock.notify_all()  # there is work for the other thread

    # --- schedule ------------------------------------------------------------------------------

    def _remove_ended(self) -> None:
        for state in [*self._running, *self._waiting]:
            if state.is_late:
                state.stream._end("time")
        self._drop_closed()
        ended = [state for state in self._running if state.stream.stop_reason]
        self._running = [state for state in self._running if not state.stream.stop_reason]
        for state in ended:
            self._scheduler.finish(state)
            self._count(state.stream)

    def _admit(self) -> None:
        """Admit requests, first come first served, while there are places and blocks. A request
        that waits for a picture does not delay others."""
        for state in [state for state in self._waiting if self._take_pictures(state)]:
            full = len(self._running) >= self.max_running and not state.stream.probe
            if full or not self._scheduler.admit(state):
                return
            self._waiting.remove(state)
            self._running.append(state)
            stats = state.stream.stats
            stats.seconds_waiting = state.stream._seconds()
            stats.reused_tokens = state.sequences[0].computed
            if not state.stream.probe:
                self.totals.add(
                    prompt_tokens=stats.prompt_tokens, reused_tokens=stats.reused_tokens
                )

    def _take_pictures(self, state: RequestState) -> bool:
        """Takes the pictures' embeddings; false if there is one to come. If a picture has failed,
        the request fails.

        The pictures, which may be large, are released here, long before the answer ends.
        """
        if not state.has_pictures:
            return False
        for future in state.pictures.values():
            error = future.exception()
            if isinstance(error, UserError):
                self._fail(state.stream, error)
                return False
        if state.pictures:
            state.embeds = {key: one.result().embeds for key, one in state.pictures.items()}
            state.request, state.pictures = replace(state.request, pictures={}), {}
        return True

    # --- run -----------------------------------------------------------------------------------

    def _run(self, chunks: list[Chunk]) -> None:
        """Compute the chunks, and give each request its output.

        If that fails, the step is tried again in smaller parts, down to single requests: only a
        request that fails on its own gets an error.
        """
        for chunk in chunks:
            self._scheduler.allocate(chunk)
        begun = time.monotonic()
        outputs, sentence = self._forward(chunks)
        if outputs is None:
            self._recover(chunks, sentence)
        else:
            self._scheduler.note_success(chunks, time.monotonic() - begun)
            self._postprocess(chunks, outputs)

    def _forward(self, chunks: list[Chunk]) -> tuple[Outputs | None, str]:
        """(the decoder's output for each sequence that reaches its end, ""), or (None, the error's
        sentence). Not the exception itself: its traceback would keep the step's tensors."""
        try:
            return self.decoder.forward(rows_of(chunks, self.model.config.llm_hidden_size)), ""
        except Exception as error:
            return None, self._note_failure(error, "while running the model")

    def _note_failure(self, error: Exception, where: str) -> str:
        """Log an exception of the model. Returns the sentence that describes it."""
        sentence = sentence_for(error)
        if sentence == NO_MEMORY:
            log.warning("out of memory %s", where)
        else:
            log.error(where, exc_info=error)
        if sentence == LOST:
            self._lost = True
        return sentence

    def _explain(self, error: Exception) -> UserError:
        return failure(self._note_failure(error, "while encoding a picture"))

    def _recover(self, chunks: list[Chunk], sentence: str) -> None:
        short = sentence == NO_MEMORY
        if short:
            self._scheduler.note_shortage(chunks)
            empty_cache(self.model.device)
        groups = by_request(chunks)
        if self._lost:
            self._fail_all(LOST)
        elif len(groups) > 1:
            half = len(groups) // 2
            for part in (groups[:half], groups[half:]):
                self._run([chunk for _, group in part for chunk in group])
        elif short and len(chunks) == 1 and chunks[0].count > 1:
            self._run([Chunk(chunks[0].state, chunks[0].sequence, chunks[0].count // 2)])
        else:
            self._fail(groups[0][0].stream, failure(sentence))

    # --- postprocess ---------------------------------------------------------------------------

    def _postprocess(self, chunks: list[Chunk], outputs: Outputs) -> None:
        rows = iter(outputs)
        for state, group in by_request(chunks):
            found = [next(rows) for chunk in group if chunk.reaches_end]
            try:
                for chunk in group:
                    self._scheduler.advance(chunk)
                if found:
                    self._choose(state, found)
            except UserError as error:  # from the request's constraint
                self._fail(state.stream, error)
            except Exception as error:
                self._fail(
                    state.stream, failure(self._note_failure(error, "while choosing a token"))
                )

    def _choose(self, state: RequestState, found: list[np.ndarray | int]) -> None:
        """Decoder outputs for the request's sequences -> its next token (or its beams' tokens)."""
        if not all(_is_finite(output) for output in found):
            log.error("the model's logits are not finite")
            for sequence in state.sequences:  # no other conversation may continue from these
                self._scheduler.cache.unregister(sequence.blocks)
            self._fail(state.stream, failure(BROKEN))
        elif state.search is not None:
            self._continue_beams(state, state.search, np.stack(found))
        else:
            token, logprob, top = self._next_token(state, found[0])
            self._give(state, token, logprob, top)
            state.sequences[0].add(token)

    def _next_token(
        self, state: RequestState, output: np.ndarray | int
    ) -> tuple[int, float | None, list[tuple[int, float]]]:
        """(the token, its log-probability, the most likely tokens), the last two if requested."""
        if isinstance(output, int):
            state.sampler.accept(output)
            return output, None, []
        if state.request.watched and not state.stream.stats.tokens:
            state.stream.watched = log_softmax(output)[list(state.request.watched)].tolist()
        token = state.sampler(output)
        if not state.request.logprobs:
            return token, None, []
        logprobs = log_softmax(output)
        top = most_likely(logprobs, state.request.top_logprobs)
        return token, float(logprobs[token]), top

    def _give(
        self,
        state: RequestState,
        token: int,
        logprob: float | None = None,
        top: list[tuple[int, float]] | tuple[()] = (),
    ) -> None:
        """Put a token into the stream, and end the stream if this is the last one."""
        stream = state.stream
        stream._put(token, logprob, top)
        if not state.stream.probe:
            self.totals.add(tokens=1)
        if token in state.request.stop_ids:
            stream._end("stop")
        elif stream.stats.tokens >= state.limit:
            stream._end("length")

    def _continue_beams(self, state: RequestState, search: BeamSearch, logits: np.ndarray) -> None:
        parents = search.step(logits)
        if search.done:
            for token in search.best:
                self._give(state, token)
            state.stream._end("stop")
            return
        old, new, used = [*state.sequences], [], set()
        for parent in parents:
            new.append(old[parent] if parent not in used else self._fork(state, old[parent]))
            used.add(parent)
        state.sequences = new
        for sequence, ids in zip(new, search.beams, strict=True):
            sequence.add(ids[-1])
        for place, sequence in enumerate(old):
            if place not in used:
                self._scheduler.drop_beam(state, sequence)

    def _fork(self, state: RequestState, sequence: Sequence) -> Sequence:
        fork, copies = self._scheduler.fork(state, sequence)
        for source, target in copies:
            self.decoder.copy_block(source, target)
        return fork

    # --- faults --------------------------------------------------------------------------------

    def _fail_all(self, sentence: str) -> None:
        with self._lock:
            states = [*self._waiting, *self._running]
            self._pictures.fail_all(failure(sentence))
        for state in states:
            self._fail(state.stream, failure(sentence))

    def _fail_pictures(self, sentence: str) -> None:
        """Give pictures that are not encoded yet, and the requests that wait for them, an error."""
        with self._lock:
            self._pictures.fail_all(failure(sentence))
            self._lock.notify_all()

    def _watch(self) -> None:
        """Notice threads that hang or have died, and end the requests that wait for them.

        Time is counted in this thread's own ticks, so that a suspended program does not count as
        hanging.
        """
        tick = min(0.5, self._hang_seconds / 4)
        answering, encoding = self._answering, self._encoding
        while not self._ended.wait(tick):
            for worker in (answering, encoding):
                started = worker.started  # a step's start identifies it
                same = started is not None and started == worker.watched
                worker.lasted = worker.lasted + tick if same else 0.0
                worker.watched = started
            self._hanging = max(answering.lasted, encoding.lasted) > self._hang_seconds
            if answering.lasted > self._hang_seconds:
                self._fail_all(HANGING)
            elif encoding.lasted > self._hang_seconds:
                self._fail_pictures(HANGING)
            if not answering.thread.is_alive() and not self._closing.is_set():
                self._restart_answering()
            if not encoding.thread.is_alive() and not self._closing.is_set():
                log.error("the thread that encodes pictures died; starting it again")
                self._fail_pictures(BROKEN)
                encoding.start()
            if self._waiting:
                with self._lock:
                    self._lock.notify_all()  # so that closed and late requests are removed

    def _restart_answering(self) -> None:
        log.error("the engine's thread died; starting it again")
        with self._lock:  # a request that came in meanwhile would wait for ever
            self._fail_all(BROKEN)
            self._waiting.clear()
            self._running.clear()
            cache = self._scheduler.cache
            self._scheduler = Scheduler(cache.count, cache.kept, self.decoder.chunk_rows)
            self._answering.start()


def _is_finite(output: np.ndarray | int) -> bool:
    return output >= 0 if isinstance(output, int) else bool(np.isfinite(output.max()))
