"""Faults around the engine: memory that runs out, a GPU that fails, threads that collide."""

import importlib
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from minigpt4 import start
from minigpt4.engine import Engine, Totals, decoder
from minigpt4.engine.stream import LOST, Stats, device_lost
from minigpt4.engine.torch_decoder import TorchDecoder
from minigpt4.errors import UserError, out_of_memory
from minigpt4.options import from_mapping
from tests.block_llama import CONTEXT, as_transformers, block_llama, tiny_chat_model
from tests.running import until
from tests.test_engine import BRIEF, GREEDY, picture, request, settled

GPU = torch.device("cuda", 1)


class AcceleratorError(RuntimeError):
    """Stands for torch's own, which no machine without a GPU raises."""


ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model(as_transformers(block_llama()))


@pytest.fixture
def engine(model):
    with Engine(model) as engine:
        yield engine


@pytest.fixture
def gpu_calls(monkeypatch) -> list[tuple[str, str]]:
    """What is asked of a GPU, and by which thread."""
    calls = []

    def note(what: str, answer=None):
        return lambda *_: calls.append((what, threading.current_thread().name)) or answer

    monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
    monkeypatch.setattr(torch.cuda, "empty_cache", note("empty_cache"))
    stream = SimpleNamespace(wait_stream=note("wait_stream"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_stream", note("set_stream"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", note("mem_get_info", (139 * 2**30, 0)))
    return calls


def on_gpu(model) -> SimpleNamespace:
    """The same model, which says that it is on the second GPU."""
    return SimpleNamespace(**vars(model) | {"device": GPU})


# --- threads ------------------------------------------------------------------------------------


@pytest.fixture
def hasty_switches():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_no_count_is_lost(hasty_switches):
    totals = Totals()

    def count(_: int) -> None:
        for _ in range(2000):
            totals.add(tokens=1, requests=2)
            totals.add_error("memory")
            totals.add_answer(Stats(tokens=2, seconds_to_first=0.1, seconds=0.2))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    found = totals.snapshot()
    assert (found.tokens, found.requests, found.errors["memory"]) == (16_000, 32_000, 16_000)
    assert sum(found.seconds_to_first.counts) == sum(found.tokens_per_s.counts) == 16_000
    totals.add(tokens=1)
    totals.add_answer(Stats(tokens=2, seconds_to_first=0.1, seconds=0.2))
    assert found.tokens == 16_000 and sum(found.tokens_per_s.counts) == 16_000


def test_a_queue_that_changes_while_it_is_looked_at(model, hasty_switches):
    """Requests come, are closed, and ask for their place, while the engine drops and admits."""
    with Engine(model, max_running=2, max_waiting=100) as engine:
        thread = engine._answering.thread

        def come_and_go(visitor: int) -> None:
            for number in range(25):
                stream = engine.submit(request(visitor * 100 + number, sampling=BRIEF))
                assert stream.position >= 0 and engine.waiting >= 0
                if number % 2:
                    stream.close()
                else:
                    assert len(list(stream)) == 4

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(come_and_go, range(4)))
        assert engine._answering.thread is thread and thread.is_alive() and settled(engine)
        assert engine.totals.requests == 100 and not engine.totals.errors


def test_an_engine_ends_with_its_block(model):
    others = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), Engine(model) as engine:
        list(engine.submit(request(1, sampling=BRIEF)))
        raise ZeroDivisionError
    assert not [t for t in set(threading.enumerate()) - others if "engine" in t.name]
    with pytest.raises(UserError, match="ending"):
        engine.submit(request(1))


def test_a_fork_is_told_to_load_the_model_itself(engine, monkeypatch):
    with monkeypatch.context() as fork:
        fork.setattr("os.getpid", lambda: 1)
        for ask in (lambda: engine.submit(request(1)), lambda: engine.encode(picture(1))):
            with pytest.raises(UserError, match="another process: load it in this one"):
                ask()
        engine.close()  # ends nothing here
    assert list(engine.submit(request(1, sampling=BRIEF)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_each_thread_uses_the_models_gpu(model, gpu_calls, monkeypatch):
    """The first one, and the one that takes the place of a dead one. The encoder has a stream of
    its own."""
    what = "set_device", "wait_stream", "set_stream"
    expected = {("set_device", "engine"), *((one, "engine pictures") for one in what)}
    with Engine(on_gpu(model), kv_megabytes=1) as engine:
        assert until(lambda: len(gpu_calls) == 4) and set(gpu_calls) == expected
        monkeypatch.setattr(engine.decoder, "forward", lambda rows: sys.exit())
        with pytest.raises(UserError, match="try again"):
            list(engine.submit(request(1)))
        assert until(lambda: gpu_calls[4:] == [("set_device", "engine")])


def test_each_thread_computes_with_the_usual_number_of_threads():
    """Though another thread computes with one more when it starts."""
    usual = torch.get_num_threads()
    begin = decoder.thread_start(torch.device("cpu"))
    torch.set_num_threads(usual + 1)
    try:
        with ThreadPoolExecutor(1, initializer=begin) as pool:
            assert pool.submit(torch.get_num_threads).result() == usual
    finally:
        torch.set_num_threads(usual)


# --- memory -------------------------------------------------------------------------------------


def test_a_failed_step_is_forgotten_before_the_next_try(model, gpu_calls, monkeypatch):
    """Nothing holds its tensors any more, and PyTorch gives back what it caches."""
    with Engine(on_gpu(model), kv_megabytes=1) as engine:
        real, steps, leaked = engine.decoder.forward, [], []

        def scarce(rows):
            leaked.extend(step for step in steps if step() is not None)
            tensor = torch.zeros(1)
            steps.append(weakref.ref(tensor))
            if len(rows.tokens) > 12:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(rows)

        monkeypatch.setattr(engine.decoder, "forward", scarce)
        streams = [engine.submit(request(seed, 60, sampling=BRIEF)) for seed in range(3)]
        assert all(len(list(stream)) == 4 for stream in streams)
        assert not leaked and ("empty_cache", "engine") in gpu_calls


def test_a_failed_batch_of_pictures_is_forgotten_before_the_next_try(model, gpu_calls):
    steps, leaked = [], []

    def scarce(pictures):
        leaked.extend(step for step in steps if step() is not None)
        tensor = torch.zeros(1)
        steps.append(weakref.ref(tensor))
        if len(pictures) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.encode_pictures(pictures)

    small = on_gpu(model)
    small.encode_pictures = scarce
    with Engine(small, kv_megabytes=1) as engine:
        with engine._lock:  # all four are there when the engine looks
            futures = [engine._pictures.request(picture(seed)) for seed in range(4)]
            engine._lock.notify_all()
        assert [future.result(5).embeds.shape for future in futures]
    assert len(steps) == 5 and not leaked and ("empty_cache", "engine pictures") in gpu_calls


def test_keys_and_values_get_the_memory_that_there_is(model, monkeypatch):
    real, tried = TorchDecoder.__init__, []

    def scarce(self, llm, blocks, kv_bits):
        tried.append(blocks)
        if blocks > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, llm, blocks, kv_bits)

    monkeypatch.setattr(TorchDecoder, "__init__", scarce)
    with Engine(model) as engine:
        assert engine._scheduler.cache.count == tried[-1] <= 100 < tried[-2]
        assert list(engine.submit(request(1, sampling=BRIEF)))


@pytest.mark.parametrize(
    ("megabytes", "said"),
    [
        (100, "There is no memory for 100 MB"),
        (0, "--kv-megabytes 0 is less than"),
        (2, ""),
        (None, ""),
    ],
)
def test_other_memory_for_keys_and_values_is_one_sentence(
    model, monkeypatch, capsys, megabytes, said
):
    real = TorchDecoder.__init__

    def scarce(self, llm, blocks, kv_bits):
        if blocks * TorchDecoder.block_bytes(llm, kv_bits) > 50 * 2**20:
            raise MemoryError
        real(self, llm, blocks, kv_bits)

    monkeypatch.setattr(TorchDecoder, "__init__", scarce)
    decoder.build_decoder(model, megabytes)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(line.startswith(said) for line in lines)
    assert all(" used" in line and " 0 MB" not in line for line in lines)


def test_no_memory_for_keys_and_values_is_one_sentence(model, monkeypatch):
    def none(self, llm, blocks, kv_bits):
        raise MemoryError

    monkeypatch.setattr(TorchDecoder, "__init__", none)
    with pytest.raises(UserError, match="not enough memory.*smaller --model") as error:
        Engine(model)
    assert error.value.kind == "memory"


def test_a_large_gpu_is_not_filled_with_keys_and_values(model, gpu_calls, monkeypatch):
    """At most what the answers at once can need."""
    monkeypatch.setattr(decoder, "GPU_SHARE", 0.3)
    _, blocks = decoder.build_decoder(on_gpu(model), None, max_running=32)
    assert blocks == 32 * (CONTEXT // 16) + 1
    assert decoder.build_decoder(on_gpu(model), None, max_running=1)[1] == CONTEXT // 16 + 1


def test_auto_asks_the_chosen_gpu_for_its_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (7, 9))
    assert start.free_gpu_memory(GPU) == 7 and asked == [GPU]
    assert start.free_gpu_memory(torch.device("cpu")) is None


# --- a GPU that fails -----------------------------------------------------------------------------


def test_which_errors_are_which():
    assert device_lost(AcceleratorError(ILLEGAL)) and device_lost(RuntimeError(ILLEGAL))
    for error in (RuntimeError("shapes differ"), ValueError(ILLEGAL), MemoryError()):
        assert not device_lost(error)
    full = AcceleratorError("CUDA error: out of memory")
    assert out_of_memory(full) and not device_lost(full)


def assert_lost(engine: Engine) -> None:
    """For good: nothing is taken, and the health check fails."""
    time.sleep(0.6)  # the watcher has looked
    assert engine.fault == LOST and not engine.health(1)
    for ask in (lambda: engine.submit(request(5)), lambda: engine.encode(picture(5))):
        with pytest.raises(UserError, match="must be restarted"):
            ask()
    assert engine.drain(2)


def test_a_lost_gpu_makes_the_engine_unhealthy(engine, monkeypatch):
    def lost(_rows):
        raise AcceleratorError(ILLEGAL)

    running = engine.submit(request(1, sampling=replace(GREEDY, max_new_tokens=400)))
    next(running)
    monkeypatch.setattr(engine.decoder, "forward", lost)
    with pytest.raises(UserError, match="must be restarted"):
        list(running)
    assert_lost(engine)


def test_a_gpu_lost_in_the_encoder(model, monkeypatch):
    def lost(_pictures):
        raise AcceleratorError(ILLEGAL)

    monkeypatch.setattr(model, "encode_pictures", lost)
    with Engine(model) as engine:
        with pytest.raises(UserError, match="must be restarted"):
            engine.encode(picture(1))
        assert_lost(engine)


# --- Ray ----------------------------------------------------------------------------------------


def test_a_replica_takes_passing_reports(monkeypatch, caplog):
    """With stand-ins for Ray's modules: what is tested is ours."""
    names = {
        "ray": "cluster_resources serve",
        "ray.exceptions": "RayError",
        "ray.serve": "Application ingress deployment",
        "ray.serve.config": "AutoscalingConfig RequestRouterConfig",
        "ray.serve.exceptions": "BackPressureError RayServeException",
        "ray.serve.handle": "DeploymentHandle",
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        for attribute in attributes.split():
            setattr(module, attribute, type(attribute, (Exception,), {}))
        monkeypatch.setitem(sys.modules, name, module)
    serve = sys.modules["ray"].serve = sys.modules["ray.serve"]
    serve.deployment = lambda thing=None, **_: thing or (lambda decorated: decorated)
    serve.ingress = lambda: lambda decorated: decorated
    monkeypatch.delitem(sys.modules, "minigpt4.remote.ray", raising=False)
    ray = importlib.import_module("minigpt4.remote.ray")
    monkeypatch.delitem(sys.modules, "minigpt4.remote.ray")

    def open_engine(options, report, **limits):
        report("Loading nano …")
        report("12 %", passing=True)
        return SimpleNamespace(limits=limits)

    monkeypatch.setattr(start, "open_engine", open_engine)
    with caplog.at_level("INFO", "minigpt4.remote.ray"):
        replica = ray.Replica(from_mapping(ray.OPTIONS, {"max_running": "3"}))
    assert replica._engine.limits["max_running"] == 3
    assert caplog.messages == ["Loading nano …"]
