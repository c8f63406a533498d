"""A language model on other machines: answers equal local ones, whatever happens to a server."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.config import get_model
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Request, Sampling
from minigpt4.engine.pictures import EmbeddingStore
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.prompt import Prompt
from minigpt4.remote.engine import RemoteEngine
from minigpt4.remote.vllm import VllmServers, as_base64
from minigpt4.weights.llm import TokenEmbedding
from minigpt4.weights.load import find_weights, load_model
from tests.api_case import at_rest, free_port
from tests.parity_case import ParityCase
from tests.running import wait_for
from tests.vllm_server import PARITY, Model, Served, Server

ROOT = Path(__file__).parent.parent
CASE = "vicuna_qformer_a"
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, max_new_tokens=40)
BEAST = resources.files("gradio") / "media_assets" / "images" / "cheetah1.jpg"


@pytest.fixture(scope="module")
def local():
    """The tiny model, whole."""
    engine = Engine(ParityCase(PARITY / CASE).load())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model():
    """The same without its language model."""
    return ParityCase(PARITY / CASE).load(quantize="remote")


@pytest.fixture(scope="module")
def served():
    served = Served(Server(Model(CASE)))
    yield served
    served.stop()


@pytest.fixture
def server(served):
    server = served.server
    server.pace, server.busy, server.key = 0.0, False, ""
    server.bodies.clear()
    server.answered = server.cancelled = 0
    yield server
    wait_for(lambda: not server.running)  # no completion goes on that nobody reads


@pytest.fixture
def remote(model, served, server):
    engine = RemoteEngine(model, VllmServers(model, [served.url]))
    yield engine
    assert at_rest(engine)
    engine.close()


def conversation(text: str = "What is this?", picture: bool = True) -> Conversation:
    asked = Conversation()
    pictures = [image.load(ParityCase(PARITY / CASE).image_paths[0])] if picture else []
    asked.add_question(text, pictures)
    return asked


def request(count: int = 12, **sampling) -> Request:
    prompt = Prompt()
    prompt.add_tokens([1, 5, 9, 30])
    settings = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": count}
    return Request(prompt, {}, Sampling(**settings | sampling))


# --- what is loaded and what is sent -------------------------------------------------------------


def test_pictures_encoded_by_an_earlier_program_are_on_the_disk(model, served, tmp_path):
    picture, found = next(iter(conversation().pictures.values())), []
    for encode in (model.encode_pictures, None):  # the second one would fail to encode
        part = SimpleNamespace(**vars(model), device=model.device, encode_pictures=encode)
        store = EmbeddingStore(tmp_path, model)
        with closing(RemoteEngine(model, VllmServers(part, [served.url], store=store))) as engine:
            found.append(engine.encode(picture).embeds)
    assert np.array_equal(*found)


def test_only_the_embedding_is_loaded(model, computing_type):
    """In the file's precision, whatever type a whole model would compute in here."""
    assert isinstance(model.llm, TokenEmbedding)
    assert [n for n, _ in model.llm.named_parameters()] == ["weight"]
    ids = torch.tensor([[0, 3, 31]])
    whole = ParityCase(PARITY / CASE).load()
    assert whole.llm.dtype == computing_type
    assert torch.equal(model.embed_tokens(ids).to(computing_type), whole.embed_tokens(ids))


def test_shards_without_the_embedding_are_not_needed(tmp_path):
    """As Vicuna's folder is: its last shard may be missing."""
    from minigpt4.weights.folder import read_tensor

    weight = torch.randn(10, 4)
    torch.save({"model.embed_tokens.weight": weight}, tmp_path / "pytorch_model-00001-of-2.bin")
    names = {"model.embed_tokens.weight": "pytorch_model-00001-of-2.bin", "x": "missing.bin"}
    index = {"weight_map": names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(read_tensor(tmp_path, "model.embed_tokens.weight"), weight)


def test_a_folder_without_the_embedding(tmp_path):
    case = ParityCase(PARITY / CASE)
    files = case.files.__class__(**{**vars(case.files), "llm": tmp_path})
    with pytest.raises(UserError, match="token embedding"):
        load_model(case.config, files, quantize="remote")


def test_a_part_is_sent_without_its_whole():
    assert len(as_base64(torch.zeros(1000, 100)[:2])) < 5000


# --- answers -------------------------------------------------------------------------------------


def test_greedy_answers_equal_local_ones(remote, local):
    for asked in (conversation(), conversation("Hello?", picture=False)):
        here, there = ask(local, asked, GREEDY), ask(remote, asked, GREEDY)
        assert "".join(there) == "".join(here) and there.tokens == here.tokens
        assert there.stop_reason == here.stop_reason
        assert there.stats.prompt_tokens == here.stats.prompt_tokens
        asked.add_answer(here.text)
        asked.add_question("And now?")
        assert "".join(ask(remote, asked, GREEDY)) == "".join(ask(local, asked, GREEDY))


def test_sampling_is_passed_on(remote, local, server):
    settings = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "seed": 7,
    }
    asked = request(30, **settings)
    assert [*remote.submit(asked)] == [*local.submit(asked)]
    (body,) = server.bodies
    assert {k: body[k] for k in settings} == settings and body["max_tokens"] == 30
    assert len([*remote.submit(request())]) == 12
    assert "seed" not in server.bodies[1]


def test_stop_ids_and_logprobs(remote, local):
    plain = [*local.submit(request())]
    stop = plain[3]
    asked = Request(request().prompt, {}, GREEDY, frozenset({stop}), logprobs=True)
    here, there = local.submit(asked), remote.submit(asked)
    assert [*here] == [*there] == plain[: plain.index(stop) + 1]
    assert there.stop_reason == "stop"
    assert there.logprobs == pytest.approx(here.logprobs, abs=1e-4)


def test_many_at_once(remote, local):
    asked = [request(8 + i) for i in range(12)]
    streams = [remote.submit(r) for r in asked]
    assert [[*s] for s in streams] == [[*local.submit(r)] for r in asked]
    assert remote.totals.requests == 12 and remote.totals.tokens == sum(8 + i for i in range(12))


def test_beams_are_refused_in_a_sentence(remote):
    with pytest.raises(UserError, match="Beam search is not available.*num_beams to 1"):
        remote.submit(request(num_beams=3))
    assert remote.totals.errors["request"] == 1


# --- limits --------------------------------------------------------------------------------------


def test_closing_a_stream_ends_the_request_there(remote, server):
    server.pace = 0.05
    stream = remote.submit(request(500))
    assert len([token for token, _ in zip(stream, range(3), strict=False)]) == 3
    stream.close()
    assert [*stream] == [] and stream.stop_reason == "closed"
    wait_for(lambda: server.cancelled == 1 and not server.running)
    assert server.answered == 0 and at_rest(remote)


def test_the_queue_has_places_and_an_end(model, served, server):
    engine = RemoteEngine(model, VllmServers(model, [served.url]), max_running=1, max_waiting=1)
    server.pace = 0.05
    first, second = engine.submit(request(500)), None
    wait_for(lambda: engine.running == 1)
    second = engine.submit(request(2))
    assert second.position == 1 and first.position == 0
    for refused in (lambda: engine.submit(request()), engine.refuse_if_full):
        with pytest.raises(UserError, match="Too many people"):
            refused()
    first.close()
    assert len([*second]) == 2
    slow = Request(request().prompt, {}, Sampling(max_new_tokens=500), max_seconds=0.2)
    stream = engine.submit(slow)
    assert len([*stream]) < 500 and stream.stop_reason == "time"
    last = engine.submit(request(500))
    assert not engine.drain(0.1)
    with pytest.raises(UserError, match="ending"):
        engine.submit(request())
    engine.close()
    with pytest.raises(UserError, match="ending"):
        list(last)


def test_a_request_that_begins_is_not_overlooked(model, served, server):
    """Though it has left the queue, and is not among the running ones yet."""

    class Slow(set):
        def add(self, job):
            time.sleep(0.1)
            super().add(job)

    engine = RemoteEngine(model, VllmServers(model, [served.url]))
    engine._running = Slow()
    stream = engine.submit(request())
    assert engine.drain(5.0) and stream.stop_reason == "length"
    engine.close()


def test_who_leaves_the_queue_makes_room(model, served, server):
    engine = RemoteEngine(model, VllmServers(model, [served.url]), max_running=1, max_waiting=2)
    server.pace = 0.05
    first = engine.submit(request(500))
    wait_for(lambda: engine.running == 1)
    left, second = engine.submit(request()), engine.submit(request(2))
    left.close()
    assert second.position == 1 and engine.waiting == 1
    third = engine.submit(request(3))
    second.close()
    engine.refuse_if_full()
    assert third.position == 1
    first.close()
    assert len([*third]) == 3 and at_rest(engine)
    engine.close()


def test_a_conversation_stays_at_its_server_until_it_is_much_busier(model):
    servers = VllmServers(model, [f"http://127.0.0.1:{port}/v1" for port in range(1, 5)])
    chosen = {session: servers._choose(session) for session in map(str, range(40))}
    assert len({s.url for s in chosen.values()}) == 4
    assert all(servers._choose(session) is server for session, server in chosen.items())
    own = chosen["1"]
    own.running = 5
    assert servers._choose("1") is not own
    own.running = 4
    assert servers._choose("1") is own
    own.down_until = time.monotonic() + 5
    assert servers._choose("1") is not own


# --- faults --------------------------------------------------------------------------------------


def test_what_servers_refuse(model, served, server, monkeypatch):
    def refused(**options) -> str:
        engine = RemoteEngine(model, VllmServers(model, [served.url], **options))
        try:
            with pytest.raises(UserError) as error:
                [*engine.submit(request())]
            assert engine.health(5) is False and engine.fault
            return str(error.value)
        finally:
            engine.close()

    server.key = "sesame"
    assert "--llm-key" in refused(key="wrong")
    engine = RemoteEngine(model, VllmServers(model, [served.url], key="sesame"))
    assert engine.health(10) and not engine.fault
    engine.close()
    server.key, server.busy = "", True
    assert "Too many people" in refused()
    server.busy = False
    monkeypatch.setattr(server.model, "hidden_size", 17)
    assert "another model than --model" in refused()


def test_a_server_that_fails_is_not_one_that_is_silent(model, caplog):
    """The log says it once, and when it is over."""
    status = 500

    def answer(asked):
        if status == 0:
            raise httpx.ConnectError("no route")
        event = {"choices": [{"token_ids": [1], "finish_reason": "length"}]}
        return httpx.Response(status, text=f"data: {json.dumps(event)}\n\n")

    servers = VllmServers(model, ["http://a/v1"])
    servers._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    engine = RemoteEngine(model, servers)
    try:
        said = str(engine.call(servers.probe_all(5), 6)["http://a/v1"])
        assert said == "The language model's server failed (status 500): see its log."
        assert not engine.health(5) and not engine.health(5)
        assert caplog.text.count(said) == 1
        status = 200
        assert engine.health(5) and "It answers again." in caplog.text
        status = 0
        said = str(engine.call(servers.probe_all(5), 6)["http://a/v1"])
        assert said.startswith("The language model's server does not answer (no route): check")
    finally:
        engine.close()


def test_mistakes_are_one_sentence(capsys, monkeypatch, tmp_path):
    photo = str(BEAST)
    url = f"http://127.0.0.1:{free_port()}/v1"
    for arguments, said in (
        (["--llm-url", url], "say which model"),
        (["--llm-url", url, "--model", "nano", "--quantize", "int8"], "--quantize is for"),
        (["--llm-url", "ftp://x", "--model", "nano"], "is not a server's address"),
        (["--llm-url", url, "--model", "nano"], "): check --llm-url and the server's log."),
    ):
        assert main(["ask", photo, "What?", *arguments]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("minigpt4: ") and said in last, last


# --- nano, in processes that die -----------------------------------------------------------------


def start_server(pace: float) -> tuple[subprocess.Popen, str]:
    port = free_port()
    command = [sys.executable, "-m", "tests.vllm_server", "nano", str(port), str(pace)]
    return subprocess.Popen(command, cwd=ROOT), f"http://127.0.0.1:{port}/v1"


def test_nano_goes_on_where_a_server_was_killed(capsys):
    """Two servers; the one that answers is killed amid the answer, then the other."""
    begun = [start_server(0.03) for _ in range(2)]
    processes = {url: process for process, url in begun}
    config = get_model("nano")
    quantize = start.quantize_of("auto", config, torch.device("cpu"))
    whole = Engine(load_model(config, find_weights(config), quantize=quantize))
    model = load_model(config, find_weights(config), quantize="remote")
    backend = VllmServers(model, list(processes))
    engine = RemoteEngine(model, backend)
    try:
        for url in processes:
            wait_for(lambda url=url: _answers(url), 60)
        asked = Conversation.asking("Describe this image in detail.", [image.load(str(BEAST))])
        expected = ask(whole, asked, GREEDY)
        "".join(expected)
        assert "".join(ask(engine, asked, GREEDY)) == expected.text

        # The same on the command line, by the environment.
        os.environ["MINIGPT4_LLM_URL"] = ",".join(processes)
        options = ["--model", "nano", "--temperature", "0", "--repetition-penalty", "1"]
        question = ["ask", str(BEAST), "Describe this image in detail."]
        assert main([*question, *options, "--max-new-tokens", "40"]) == 0
        assert capsys.readouterr().out.strip() == expected.text.strip()

        answer = ask(engine, asked, GREEDY)
        pieces = iter(answer)
        said = [next(pieces) for _ in range(5)]
        (own,) = [s for s in backend._servers if s.running]
        processes[own.url].send_signal(signal.SIGKILL)
        assert "".join(said + [*pieces]) == expected.text
        assert answer.tokens == expected.tokens and len(answer.tokens) > 5
        assert engine.health(10)

        answer = ask(engine, asked, GREEDY)
        pieces = iter(answer)
        next(pieces)
        for process in processes.values():
            process.kill()
        with pytest.raises(UserError, match="servers do not answer; please try again"):
            list(pieces)
        assert not engine.health(5) and "servers do not answer" in engine.fault
        assert engine.totals.errors["hanging"] == 1
    finally:
        os.environ.pop("MINIGPT4_LLM_URL", None)
        for process in processes.values():
            process.kill()
            process.wait()
        engine.close()
        whole.close()


def _answers(url: str) -> bool:
    try:
        return httpx.post(url + "/completions", json={}).status_code == 400
    except httpx.HTTPError:
        return False
