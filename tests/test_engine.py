"""The engine on a tiny random model: joining and leaving, reuse, isolation, limits, faults."""

import asyncio
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.engine import Engine, Request, Sampling
from minigpt4.engine.native import library
from minigpt4.engine.sampling import log_softmax
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.image import Picture
from minigpt4.model.prompt import ImageRef, Prompt
from tests.block_llama import (
    IMAGE_TOKENS,
    VOCABULARY,
    as_transformers,
    block_llama,
    tiny_chat_model,
)
from tests.running import python, until

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=20)
BRIEF = replace(GREEDY, max_new_tokens=4)


@pytest.fixture(scope="module", params=["native", "torch"])
def model(request):
    if request.param == "native" and library() is None:
        pytest.skip("no C compiler: install gcc")
    llama = block_llama()
    return tiny_chat_model(llama if request.param == "native" else as_transformers(llama))


@pytest.fixture
def engine(model):
    engine = Engine(model)
    yield engine
    engine.close()


def picture(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    key = hashlib.sha256(pixels.tobytes()).hexdigest()
    return Picture(Image.fromarray(pixels), key)


def request(seed: int, length: int = 30, pictures: tuple[Picture, ...] = (), **options) -> Request:
    """A prompt of random tokens (its nonce), pictures in front."""
    prompt = Prompt()
    prompt.add_tokens([1, 2, 3])
    for one in pictures:
        prompt.add_image(ImageRef(one.key), IMAGE_TOKENS)
    prompt.add_tokens(np.random.default_rng(seed).integers(4, VOCABULARY, length).tolist())
    sampling = options.pop("sampling", GREEDY)
    return Request(prompt, {p.key: p for p in pictures}, sampling, **options)


def longer(first: Request, *more: int) -> Request:
    """The same conversation, with more tokens after it."""
    prompt = Prompt([*first.prompt.ids], [*first.prompt.keys], first.prompt.images, [])
    prompt.loss_mask = [False] * len(prompt)
    prompt.add_tokens(more)
    return replace(first, prompt=prompt)


def alone(model, asked: Request) -> list[int]:
    """What a fresh engine answers."""
    engine = Engine(model)
    try:
        return list(engine.submit(asked))
    finally:
        engine.close()


def settled(engine: Engine) -> bool:
    """Nothing runs, and every block is available again, soon."""

    def is_settled() -> bool:
        cache = engine._scheduler.cache
        return not (engine.running or engine.waiting) and cache.available == cache.count

    return until(is_settled)


# --- joining, leaving, isolation -----------------------------------------------------------------


@pytest.mark.trust(
    "Isolation", "32 conversations at once answer as each alone, over HTTP and in the engine"
)
def test_thirty_two_conversations_are_as_alone(model, engine):
    """Each with its own words and picture, some greedy, some drawn, of different lengths, joining
    while others run: each answer is the one it is alone. (PyTorch's kernels round otherwise in
    other company; on this model that changes no token.)"""
    drawn = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1, max_new_tokens=25)
    asked = [
        request(
            seed,
            10 + seed,
            (picture(seed),),
            sampling=GREEDY if seed % 2 else replace(drawn, seed=seed),
        )
        for seed in range(32)
    ]
    streams = []
    for one in asked:
        streams.append(engine.submit(one))
        time.sleep(0.002)
    together = [list(stream) for stream in streams]
    # Each in an engine of its own would take long: one by one in another serves as well, without
    # company and without anything to reuse but the first three tokens.
    other = Engine(model)
    for one, answer in zip(asked, together, strict=True):
        assert list(other.submit(one)) == answer
    other.close()
    assert len({tuple(a) for a in together}) == 32
    assert settled(engine)


def test_a_long_prompt_does_not_stall_a_short_answer(engine):
    """While 450 tokens are read in chunks, another's tokens keep coming."""
    running = engine.submit(request(1, sampling=replace(GREEDY, max_new_tokens=200)))
    next(running)
    long = engine.submit(request(2, 450))
    before = running.stats.tokens
    next(long)
    assert running.stats.tokens - before > 5
    running.close()


@pytest.mark.parametrize(("pace", "largest"), [(2**-10, 256), (2**-6, 128), (1.0, 32)])
def test_a_step_of_a_prompt_takes_two_seconds_at_most(engine, monkeypatch, pace, largest):
    """A row takes `pace` seconds by the engine's clock; 32 rows are the fewest."""
    real, sizes, now = engine.decoder.forward, [], [0.0]

    def forward(rows):
        sizes.append(len(rows.tokens))
        now[0] += pace * len(rows.tokens)
        return real(rows)

    monkeypatch.setattr(engine.decoder, "forward", forward)
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("minigpt4.engine.engine.time", clock)
    assert list(engine.submit(request(1, 450, sampling=BRIEF)))
    assert sizes[0] == 32 and max(sizes) == largest


def test_answers_are_given_in_the_order_of_asking(model):
    """With room for one, each begins after the one before it has ended, by the streams' clocks."""
    engine = Engine(model, max_running=1)
    streams = [engine.submit(request(seed)) for seed in range(5)]
    for stream in reversed(streams):  # whoever reads first
        list(stream)
    begun = [stream._started + stream.stats.seconds_waiting for stream in streams]
    ended = [stream._started + stream.stats.seconds for stream in streams]
    assert all(end <= begin for end, begin in zip(ended, begun[1:], strict=False))
    engine.close()


@pytest.mark.trust(
    "Load and interruptions", "storms of connections, a full queue, probes meanwhile"
)
def test_the_queue_has_places_and_an_end(model):
    engine = Engine(model, max_running=1, max_waiting=3)
    first = engine.submit(request(0, sampling=replace(GREEDY, max_new_tokens=400)))
    next(first)
    waiting = [engine.submit(request(seed)) for seed in (1, 2, 3)]
    assert [s.position for s in (first, *waiting)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="waiting"):
        engine.submit(request(4))
    waiting[0].close()
    first.close()
    assert list(waiting[1]) and list(waiting[2])
    assert list(waiting[0]) == [] and waiting[0].stop_reason == "closed"
    assert settled(engine)
    engine.close()


def test_a_burst_fills_all_places(model):
    """Before the first of it runs, all of it waits."""
    with Engine(model, max_running=2, max_waiting=1) as engine:
        with engine._lock:
            streams = [engine.submit(request(seed)) for seed in range(3)]
            with pytest.raises(UserError, match="waiting"):
                engine.submit(request(3))
        assert all(list(stream) for stream in streams)


def test_a_request_that_is_admitted_is_not_overlooked(engine):
    """Though it has left the queue, and is not among the running ones yet."""

    class Slow(list):
        def append(self, state):
            time.sleep(0.1)
            super().append(state)

    engine._running = Slow()
    stream = engine.submit(request(1))
    assert engine.drain(5.0) and stream.stop_reason == "length"


def test_a_running_request_is_running_all_the_time(engine, monkeypatch):
    """Seen from another thread, also while the requests are brought into another order."""

    def slow_id(thing):
        time.sleep(0.001)
        return id(thing)

    monkeypatch.setattr("minigpt4.engine.scheduler.id", slow_id, raising=False)
    stream = engine.submit(request(1, sampling=replace(GREEDY, max_new_tokens=400)))
    next(stream)
    seen = set()
    while stream.stats.tokens < 20:
        seen.add(engine.running)
    assert seen == {1}
    stream.close()


# --- reuse ---------------------------------------------------------------------------------------


def test_the_next_turn_feeds_only_what_is_new(model, engine):
    first = request(1, 60, (picture(1),))
    answer = list(engine.submit(first))
    second = longer(first, *answer, 5, 6, 7)
    stream = engine.submit(second)
    assert list(stream) == alone(model, second)
    assert stream.stats.reused_tokens >= len(first.prompt) + len(answer) - 17
    assert stream.stats.prompt_tokens == len(second.prompt)


def test_a_stop_a_retry_and_an_edit_keep_what_was_computed(model, engine):
    first = request(2, 60)
    stopped = engine.submit(replace(first, sampling=replace(GREEDY, max_new_tokens=200)))
    for _ in range(5):
        next(stopped)
    stopped.close()
    assert settled(engine)
    again = engine.submit(first)
    assert list(again) == alone(model, first) and again.stats.reused_tokens >= 48
    edited = replace(first, prompt=request(2, 40).prompt)  # the same, up to its 43rd token
    stream = engine.submit(edited)
    assert list(stream) == alone(model, edited) and stream.stats.reused_tokens == 32


def test_another_picture_never_matches(model, engine):
    """The same words about another picture: only what stands before the picture is shared."""
    prompts = [request(3, 60, (picture(seed),)) for seed in (1, 2)]
    answers = [list(engine.submit(p)) for p in prompts]
    assert answers == [alone(model, p) for p in prompts] and answers[0] != answers[1]
    shared = engine.submit(request(4, 60, (picture(1),)))
    list(shared)
    assert shared.stats.reused_tokens == 0  # the shared beginning fills no block of 16


def test_a_picture_is_shared_by_all_who_ask_about_it(engine):
    many = tuple(picture(seed) for seed in range(6))
    list(engine.submit(request(5, 20, many)))
    others = [engine.submit(request(seed, 20, many)) for seed in range(6, 10)]
    for stream in others:
        list(stream)
        assert stream.stats.reused_tokens == 32  # 3 + 6 * 5 positions, in whole blocks


def test_memory_for_conversations_is_bounded(model):
    """Room for one conversation only: the oldest blocks go, and every answer stays right."""
    engine = Engine(model, kv_megabytes=0)
    assert engine._scheduler.cache.count == 512 // 16 + 1
    for seed in (1, 2, 1, 3, 2):
        asked = request(seed, 200)
        assert list(engine.submit(asked)) == alone(model, asked)
    assert settled(engine)
    with pytest.raises(UserError, match="memory"):
        engine.submit(request(1, 400, sampling=replace(GREEDY, max_new_tokens=50, num_beams=8)))
    engine.close()


def test_pictures_are_let_go_once_they_are_encoded(model, monkeypatch):
    """While the answer runs, and while another waits for its turn."""
    engine = Engine(model, max_running=1)
    real, before = engine.decoder.forward, image.held.pixels
    monkeypatch.setattr(engine.decoder, "forward", lambda rows: time.sleep(0.01) or real(rows))

    def held(seed: int) -> Picture:
        image.held.take(64)
        return image.hold(picture(seed).rgb, picture(seed).key)

    def asked(seed: int) -> Request:
        endless = replace(GREEDY, max_new_tokens=400)
        return request(seed, 20, (held(seed), held(seed + 1)), sampling=endless)

    running = engine.submit(asked(1))
    next(running)
    assert until(lambda: image.held.pixels <= before) and not running.stop_reason
    waiting = engine.submit(asked(3))
    assert until(lambda: image.held.pixels <= before) and waiting.position == 1
    running.close()
    tokens = [next(waiting) for _ in range(5)]
    waiting.close()
    assert tokens == alone(model, replace(asked(3), sampling=GREEDY))[:5] and settled(engine)
    engine.close()


def test_those_that_end_while_they_wait_are_counted(model, monkeypatch):
    engine = Engine(model, max_running=1)
    real = engine.decoder.forward
    monkeypatch.setattr(engine.decoder, "forward", lambda rows: time.sleep(0.01) or real(rows))
    running = engine.submit(request(1, 20, sampling=replace(GREEDY, max_new_tokens=400)))
    next(running)
    closed, late = engine.submit(request(2)), engine.submit(request(3, max_seconds=0.05))
    closed.close()
    assert not list(late) and late.stop_reason == "time"
    running.close()
    assert settled(engine) and engine.totals.endings == {"closed": 2, "time": 1}
    engine.close()


# --- one request's options -----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_answer(engine):
    draw = Sampling(temperature=1.5, top_p=1.0, seed=7, max_new_tokens=30)
    first, again, other = (
        list(engine.submit(request(1, sampling=replace(draw, seed=seed)))) for seed in (7, 7, 8)
    )
    assert first == again != other


def test_ends(engine):
    """Stop ids, the longest answer, the context, and the time."""
    whole = list(engine.submit(request(1)))
    stream = engine.submit(request(1, stop_ids=frozenset({whole[4]})))
    assert list(stream) == whole[: whole.index(whole[4]) + 1] and stream.stop_reason == "stop"
    stream = engine.submit(request(1, 500))
    assert len(list(stream)) == 512 - 503 and stream.stop_reason == "length"
    with pytest.raises(UserError, match="at most 511"):
        engine.submit(request(1, 510))
    asked = request(1, max_seconds=0.005, sampling=replace(GREEDY, max_new_tokens=400))
    stream = engine.submit(asked)
    assert len(list(stream)) < 400 and stream.stop_reason == "time"


def test_logprobs(engine):
    asked = request(1, logprobs=True)
    stream = engine.submit(asked)
    tokens = list(stream)
    assert len(stream.logprobs) == len(tokens) and max(stream.logprobs) <= 0
    # The first one's, computed directly.
    ids = np.array(asked.prompt.ids, np.int32)
    from minigpt4.engine.scheduler import Rows

    n = len(ids)
    fresh = Rows(
        ids,
        np.zeros((0, 64), np.float32),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.array([[40, 41, 42]], np.int32),
        np.array([n - 1], np.int32),
    )
    logits = engine.decoder.forward(fresh)[0]
    assert stream.logprobs[0] == pytest.approx(log_softmax(logits)[tokens[0]], abs=1e-4)


def test_beams_among_others_are_transformers(model):
    """Beam search in company, against transformers' `generate` on the same weights."""
    if not hasattr(model.llm, "generate"):
        pytest.skip("the compiled decoder rounds; its logits are compared elsewhere")
    engine = Engine(model)
    stop = frozenset({5, 17})
    for beams, penalty in ((2, 1.0), (4, 1.2), (5, 1.0)):
        s = Sampling(num_beams=beams, repetition_penalty=penalty, max_new_tokens=25)
        company = [engine.submit(request(seed)) for seed in (11, 12)]
        asked = request(beams, sampling=s, stop_ids=stop)
        found = list(engine.submit(asked))
        for stream in company:
            list(stream)
        ids = torch.tensor([asked.prompt.ids])
        with torch.inference_mode():
            embeds = model.llm.get_input_embeddings()(ids)
            expected = model.llm.generate(  # from embeddings: the penalty covers the answer alone
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(ids),
                num_beams=beams,
                do_sample=False,
                max_new_tokens=25,
                repetition_penalty=penalty,
                eos_token_id=sorted(stop),
                pad_token_id=0,
            )[0].tolist()
        assert found == expected[: len(found)] and not any(expected[len(found) :])
    assert settled(engine)
    engine.close()


def test_beams_give_their_memory_back(engine):
    """Stopped half-way as well."""
    wide = replace(GREEDY, num_beams=6, max_new_tokens=100)
    assert len(list(engine.submit(request(1, sampling=wide)))) > 0
    stream = engine.submit(request(2, sampling=wide))
    time.sleep(0.05)
    stream.close()
    assert list(stream) == [] and settled(engine)


# --- leaving early --------------------------------------------------------------------------------


def test_closing_ends_within_a_step(engine):
    endless = replace(GREEDY, max_new_tokens=450)
    streams = [engine.submit(request(seed, sampling=endless)) for seed in range(8)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    counts = [s.stats.tokens for s in streams]
    assert settled(engine)
    assert [s.stats.tokens for s in streams] == counts  # not one token after the close
    assert list(engine.submit(request(1)))


def test_async_readers(engine, monkeypatch):
    """Two at once on one event loop; the one that is cancelled leaves, the other goes on."""
    expected = list(engine.submit(request(1)))
    forward = engine.decoder.forward

    def slow(rows):
        time.sleep(0.01)  # so that the long answer is not over where the loop is busy
        return forward(rows)

    monkeypatch.setattr(engine.decoder, "forward", slow)

    async def read(stream) -> list[int]:
        try:
            return [token async for token in stream]
        finally:
            stream.close()

    async def both() -> list[int]:
        endless = engine.submit(request(2, sampling=replace(GREEDY, max_new_tokens=400)))
        task = asyncio.create_task(read(endless))
        found = await read(engine.submit(request(1)))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert endless.stop_reason == "closed"
        return found

    assert asyncio.run(both()) == expected
    assert settled(engine)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.trust("Faults", "memory, NaN, exception, hang or dead thread in the engine")
def test_an_exception_ends_its_request_only(engine, monkeypatch):
    """The decoder fails whenever token 299 is fed: only the request that holds it gets an error."""
    real = engine.decoder.forward

    def fail(rows):
        if (rows.tokens == 299).any():
            raise RuntimeError("kernel panic at 0x7f0000000000")
        return real(rows)

    good = [request(seed) for seed in (1, 2, 3) if 299 not in request(seed).prompt.ids]
    expected = [list(engine.submit(one)) for one in good]
    monkeypatch.setattr(engine.decoder, "forward", fail)
    streams = [engine.submit(one) for one in good]
    bad = engine.submit(longer(request(9), 299, 7))
    with pytest.raises(UserError, match="try again") as error:
        list(bad)
    assert "0x7f" not in str(error.value) and bad.stop_reason == "error"
    assert [list(stream) for stream in streams] == expected
    assert settled(engine)


@pytest.mark.trust("Faults", "memory, NaN, exception, hang or dead thread in the engine")
def test_out_of_memory_shrinks_the_step_and_goes_on(model, engine, monkeypatch):
    real, sizes = engine.decoder.forward, []

    def scarce(rows):
        sizes.append(len(rows.tokens))
        if len(rows.tokens) > 12:
            raise MemoryError
        return real(rows)

    asked = [request(seed, 100) for seed in range(5)]
    expected = [alone(model, one) for one in asked]
    monkeypatch.setattr(engine.decoder, "forward", scarce)
    assert [list(s) for s in [engine.submit(one) for one in asked]] == expected
    assert max(sizes) > 12 and max(sizes[-20:]) <= 12
    assert settled(engine)


def test_more_beams_than_a_step_has_rows(model, engine, monkeypatch):
    """After a shortage of memory a step is smaller than one answer's beams: it is tried on its own,
    others are answered beside it, and where the shortage lasts it gets an error."""
    real = engine.decoder.forward

    def scarce(rows):
        if len(rows.tokens) > 3:
            raise MemoryError
        return real(rows)

    asked = [request(seed, 100, max_seconds=5.0) for seed in range(3)]
    wide = request(9, sampling=replace(GREEDY, num_beams=6), max_seconds=5.0)
    expected = [alone(model, one) for one in (*asked, wide)]
    monkeypatch.setattr(engine.decoder, "forward", scarce)
    with pytest.raises(UserError, match="not enough memory"):
        list(engine.submit(wide))
    assert engine._scheduler.row_limit < 6
    monkeypatch.undo()
    streams = [engine.submit(one) for one in (*asked, wide)]
    assert [list(stream) for stream in streams] == expected
    assert settled(engine)


@pytest.mark.trust("Faults", "memory, NaN, exception, hang or dead thread in the engine")
def test_logits_that_are_no_numbers_are_an_error(engine, monkeypatch):
    real = engine.decoder.forward

    def nan(rows):
        logits = real(rows)
        return logits * np.float32("nan") if (rows.tokens == 299).any() else logits

    poisoned = longer(request(9), 299)
    expected = list(engine.submit(poisoned))
    other = longer(request(10), 299)
    monkeypatch.setattr(engine.decoder, "forward", nan)
    with pytest.raises(UserError, match="try again"):
        list(engine.submit(other))
    monkeypatch.undo()
    stream = engine.submit(other)  # nothing is reused of what went wrong
    assert list(stream) and stream.stats.reused_tokens == 0
    assert list(engine.submit(poisoned)) == expected and settled(engine)


@pytest.mark.trust("Faults", "exception, memory, NaN or hang in the encoder")
def test_a_picture_that_cannot_be_encoded_fails_alone(model, monkeypatch):
    bad, good = picture(1), picture(2)
    real = model.encode_pictures

    def fail(pictures):
        if any(p is bad.rgb for p in pictures):
            raise RuntimeError("no")
        return real(pictures)

    monkeypatch.setattr(model, "encode_pictures", fail)
    engine = Engine(model)
    first, second = (engine.submit(request(1, 20, (p,))) for p in (bad, good))
    with pytest.raises(UserError):
        list(first)
    assert list(second)
    with pytest.raises(UserError):
        engine.encode(bad)
    assert engine.encode(good).embeds.shape == (IMAGE_TOKENS, 64)
    assert settled(engine)
    engine.close()


def test_a_picture_that_fails_while_it_is_asked_for(model, monkeypatch):
    monkeypatch.setattr(model, "encode_pictures", Mock(side_effect=RuntimeError("no")))
    engine = Engine(model)
    pictures, ask = engine._pictures, engine._pictures.request

    def fail_meanwhile(it):
        pictures.request = ask
        future = ask(it)
        pictures.encode_some(1)
        return future

    pictures.request = fail_meanwhile
    with pytest.raises(UserError):
        list(engine.submit(request(1, 20, (picture(1),))))
    assert settled(engine)
    engine.close()


def test_an_encoder_at_work_stalls_nobody(model, monkeypatch):
    """Others' answers begin and end meanwhile, and nothing runs in circles. Who gives up leaves."""
    engine = Engine(model)
    real, go_on = model.encode_pictures, threading.Event()
    monkeypatch.setattr(
        model, "encode_pictures", lambda pictures: go_on.wait(10) and real(pictures)
    )
    asked = request(1, 20, (picture(1),), sampling=BRIEF)
    running = engine.submit(request(2))
    next(running)
    looking, closed = engine.submit(asked), engine.submit(asked)
    assert len(list(running)) == 19 and list(engine.submit(request(3))) and engine.health()
    closed.close()
    assert until(lambda: len(engine._waiting) == 1) and looking.position == 1
    with engine._lock:
        assert not engine._has_work() and not go_on.is_set()
    go_on.set()
    assert list(looking) == alone(model, asked) and settled(engine)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_encoder_thread_is_replaced(model, monkeypatch):
    engine = Engine(model)
    asked = request(1, 20, (picture(1),), sampling=BRIEF)
    monkeypatch.setattr(model, "encode_pictures", Mock(side_effect=SystemExit))
    with pytest.raises(UserError, match="try again"):
        list(engine.submit(asked))
    monkeypatch.undo()
    assert until(engine._encoding.thread.is_alive)
    assert len(list(engine.submit(asked))) == 4 and settled(engine)
    engine.close()


def no_memory(_embeds: np.ndarray) -> np.ndarray:
    raise MemoryError


def one_nan(embeds: np.ndarray) -> np.ndarray:
    embeds[-1, -1] = np.nan
    return embeds


@pytest.mark.parametrize(
    ("fault", "says"), [(no_memory, "not enough memory"), (one_nan, "went wrong")]
)
@pytest.mark.trust("Faults", "exception, memory, NaN or hang in the encoder")
def test_nothing_is_kept_of_a_fault_in_the_encoder(model, monkeypatch, fault, says):
    """It hits one picture, encoded beside another; the next question about it is answered."""
    bad, good = picture(1), picture(2)
    asked = [request(1, 20, (p,), sampling=BRIEF) for p in (bad, good)]
    expected = [alone(model, one) for one in asked]
    real = model.encode_pictures

    def embed(pictures):
        pairs = zip(pictures, real(pictures), strict=True)
        return [
            encoded._replace(embeds=fault(encoded.embeds)) if p is bad.rgb else encoded
            for p, encoded in pairs
        ]

    monkeypatch.setattr(model, "encode_pictures", embed)
    engine = Engine(model)
    first, second = map(engine.submit, asked)
    with pytest.raises(UserError, match=says):
        list(first)
    with pytest.raises(UserError, match=says):
        engine.encode(bad)
    assert list(second) == expected[1]
    monkeypatch.undo()
    assert list(engine.submit(asked[0])) == expected[0] and settled(engine)
    engine.close()


@pytest.mark.trust("Faults", "exception, memory, NaN or hang in the encoder")
def test_an_encoder_that_hangs(model, monkeypatch):
    """Everybody is told, and who asks about the same picture afterwards is answered."""
    engine = Engine(model, hang_seconds=0.2)
    real, go_on = model.encode_pictures, threading.Event()
    monkeypatch.setattr(
        model, "encode_pictures", lambda pictures: go_on.wait(10) and real(pictures)
    )
    asked = request(1, 20, (picture(1),), sampling=BRIEF)
    uploading = ThreadPoolExecutor(1).submit(engine.encode, picture(1))
    for _ in range(2):
        with pytest.raises(UserError, match="stopped responding"):
            list(engine.submit(asked))
    with pytest.raises(UserError, match="stopped responding"):
        uploading.result(2)
    assert not engine.health()
    monkeypatch.undo()
    engine._hang_seconds = 60.0  # a busy machine's steps are no hangs
    go_on.set()
    assert until(lambda: not engine.fault)
    assert list(engine.submit(asked)) == alone(model, asked) and settled(engine)
    engine.close()


def test_a_beam_that_cannot_be_copied_gives_its_memory_back(engine, monkeypatch):
    real, copied = engine.decoder.copy_block, []

    def fail(source, target):
        copied.append(target)
        if len(copied) == 3:
            raise RuntimeError("no")
        real(source, target)

    monkeypatch.setattr(engine.decoder, "copy_block", fail)
    wide = replace(GREEDY, num_beams=6)
    with pytest.raises(UserError, match="try again"):
        list(engine.submit(request(1, sampling=wide)))
    assert settled(engine) and len(list(engine.submit(request(1, sampling=wide)))) > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.trust("Faults", "memory, NaN, exception, hang or dead thread in the engine")
def test_a_dead_thread_is_replaced(engine, monkeypatch):
    expected = list(engine.submit(request(1)))

    def die(_rows):
        raise SystemExit

    monkeypatch.setattr(engine.decoder, "forward", die)
    started = time.monotonic()
    with pytest.raises(UserError, match="try again"):
        list(engine.submit(request(2)))
    assert time.monotonic() - started < 30  # long before `hang_seconds`
    monkeypatch.undo()
    time.sleep(0.6)
    assert list(engine.submit(request(1))) == expected and engine.health()


@pytest.mark.trust("Faults", "memory, NaN, exception, hang or dead thread in the engine")
def test_a_hang_is_noticed_and_forgiven(model, monkeypatch):
    engine = Engine(model, hang_seconds=0.4)
    list(engine.submit(request(1)))
    real, go_on = engine.decoder.forward, threading.Event()

    def hang(rows):
        go_on.wait(10)
        return real(rows)

    monkeypatch.setattr(engine.decoder, "forward", hang)
    started = time.monotonic()
    with pytest.raises(UserError, match="stopped responding"):
        list(engine.submit(request(2)))
    assert time.monotonic() - started < 9  # before the step goes on
    assert not engine.health()
    with pytest.raises(UserError, match="stopped responding"):
        engine.submit(request(3))
    monkeypatch.undo()
    engine._hang_seconds = 60.0  # a busy machine's steps are no hangs
    go_on.set()
    assert settled(engine) and until(lambda: not engine.fault)
    assert engine.health() and list(engine.submit(request(1)))
    engine.close()


def test_a_thread_that_was_ended_has_not_died(model, monkeypatch):
    """Whoever waits when the engine is closed hears that it ends, whoever notices first."""
    engine = Engine(model, hang_seconds=0.4)
    stream = engine.submit(request(1, sampling=replace(GREEDY, max_new_tokens=400)))
    next(stream)
    real, thread = engine._ended.set, engine._answering.thread
    monkeypatch.setattr(engine._ended, "set", lambda: time.sleep(0.3) or real())
    engine.close()
    assert engine._answering.thread is thread
    with pytest.raises(UserError, match="ending"):
        list(stream)


def test_no_thread_outlives_the_engine(model, monkeypatch):
    """One that lets go of the model while the interpreter ends aborts the program."""
    others = set(threading.enumerate())
    engine = Engine(model, hang_seconds=0.4)
    list(engine.submit(request(1)))
    real = engine._ended.wait
    monkeypatch.setattr(engine._ended, "wait", lambda tick: real(tick) and not time.sleep(0.3))
    time.sleep(0.2)  # the watcher waits by the slow one from here on
    engine.close()
    assert not [t for t in set(threading.enumerate()) - others if "engine" in t.name]


def test_a_program_that_ends_amid_an_answer_ends_cleanly(tmp_path):
    """As after Ctrl-C or an error: status 3 here, no crash of a thread inside the model."""
    code = (
        "import sys; from minigpt4.engine import Engine; from tests import test_engine as t;"
        "from tests.block_llama import *;"
        "engine = Engine(tiny_chat_model(as_transformers(block_llama())));"
        "sampling = t.replace(t.GREEDY, max_new_tokens=450);"
        "streams = [engine.submit(t.request(i, 40, sampling=sampling)) for i in range(9)];"
        "next(streams[8]); sys.exit(3)"
    )
    python("-c", code, status=3)


def test_health_is_a_real_token_and_waits_for_nobody(model, monkeypatch):
    engine = Engine(model, max_running=2, max_waiting=1)
    real = engine.decoder.forward

    def slow(rows):
        time.sleep(0.01)
        return real(rows)

    monkeypatch.setattr(engine.decoder, "forward", slow)
    busy = []
    for seed in (1, 2):
        busy.append(engine.submit(request(seed, sampling=replace(GREEDY, max_new_tokens=400))))
        next(busy[-1])
    engine.submit(request(3))
    assert engine.health(5.0)  # though both places are taken, and somebody waits
    assert engine.running == 2 and engine.waiting == 1
    monkeypatch.setattr(engine.decoder, "forward", lambda rows: time.sleep(0.2) or real(rows))
    assert not engine.health(0.1)
    monkeypatch.undo()
    for stream in busy:
        stream.close()
    assert engine.health(5.0)
    engine.close()
    with pytest.raises(UserError, match="ending"):
        engine.submit(request(1))


def test_a_probe_that_comes_while_another_is_admitted(engine, monkeypatch):
    expected = list(engine.submit(request(1)))
    real, healthy = engine._scheduler.admit, []
    probing = threading.Thread(target=lambda: healthy.append(engine.health(2.0)))

    def meanwhile(state):
        if not state.stream.probe:
            probing.start()
            time.sleep(0.1)
        return real(state)

    monkeypatch.setattr(engine._scheduler, "admit", meanwhile)
    assert list(engine.submit(request(1))) == expected
    probing.join()
    assert healthy == [True] and settled(engine)
