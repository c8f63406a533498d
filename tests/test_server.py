"""Endpoints beside the page: keys, health, metrics, gradio's endpoint; and the shutdown."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from importlib import resources
from pathlib import Path
from unittest.mock import Mock

import httpx
import openai
import pytest
from gradio_client import Client, handle_file
from starlette.applications import Starlette
from starlette.testclient import TestClient

import app
from minigpt4 import conversation as chat
from minigpt4.conversation import Conversation
from minigpt4.engine import Engine, Request, Sampling
from minigpt4.engine.stream import ENDING
from minigpt4.errors import UserError
from minigpt4.model.prompt import Prompt
from minigpt4.web.api.access import Keys, cors
from minigpt4.web.api.metrics import VLLM_HISTOGRAMS
from minigpt4.web.api.routes import endpoints
from minigpt4.web.api.service import ChatService
from minigpt4.web.guard.image_url import ImageUrls
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.page import launch
from minigpt4.web.server import Server
from tests.api_case import (
    GREEDY,
    MODEL,
    address_fixture,
    at_rest,
    client,
    data_url,
    engine_fixture,
    free_port,
    options,
    picture_file,
    question,
    served,
    tiny_engine,
)
from tests.parity_case import ParityCase
from tests.running import python, responds, wait_for

OTHER = "llama2_patch_concat"
ROOT = Path(__file__).parent.parent


engine, address = engine_fixture(), address_fixture()


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No probe's result is given a second time."""
    monkeypatch.setattr("minigpt4.web.api.health.FRESH_SECONDS", 0.0)


def metrics(address: str) -> dict[str, float]:
    """Every sample, by name and labels."""
    response = httpx.get(address + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = re.findall(r"(?m)^([a-z_0-9:]+(?:\{.*\})?) ([0-9.e+-]+)$", response.text)
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(lines) == len(dict(samples))
    return {name: float(value) for name, value in samples}


# --- keys ----------------------------------------------------------------------------------------


def test_an_api_key(engine):
    with served(lambda: engine, engine, "--api-key", "sesame") as address:
        assert client(address, "sesame").models.list().data
        for key in ("wrong", "sesam", "sesame2", "none"):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                client(address, key).models.list()
        for given in ("Basic sesame", "sesame", "Bearer", "Bearer \xe9"):
            headers = {"authorization": given.encode("latin-1")}
            assert httpx.get(address + "/v1/models", headers=headers).status_code == 401
        for path in ("/v1/models", "/metrics"):
            response = httpx.get(address + path)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        body = b"{" * 10
        assert httpx.post(address + "/v1/chat/completions", content=body).status_code == 401
        for path in ("/healthz", "/readyz", "/"):
            assert httpx.get(address + path).status_code == 200


def test_the_pages_password(engine):
    """It keeps the page, and the API must not be a way around it."""
    with served(lambda: engine, engine, "--auth", "ann:secret:s\n") as address:
        assert httpx.get(address + "/config").status_code == 401
        assert httpx.get(address + "/v1/models").status_code == 401
        assert httpx.get(address + "/healthz").status_code == 200
        with pytest.raises(Exception, match="credentials"):
            Client(address, verbose=False)
        ann = Client(address, auth=("ann", "secret:s"), verbose=False)
        assert ann.predict(message="Hello?", max_tokens=3, api_name="/chat")
    with served(lambda: engine, engine, "--auth", "ann:s", "--api-key", "k") as address:
        assert client(address, "k").models.list().data


def test_a_password_without_a_name(capsys):
    assert app.main(["--auth", "secret"]) == 2
    assert "--auth must be a name and a password" in capsys.readouterr().err


def test_under_a_proxys_path(engine):
    with served(lambda: engine, engine, "--root-path", "minigpt4/") as address:
        assert client(address).models.list().data  # the proxy took the path away
        assert client(address + "/minigpt4").models.list().data  # or left it there
        assert httpx.get(address + "/config").json()["root"].endswith("/minigpt4")
        for icon in httpx.get(address + "/manifest.json").json()["icons"]:
            assert httpx.get(f"{address}/minigpt4/{icon['src']}").status_code == 200
        described = httpx.get(address + "/v1/openapi.json").json()
        assert described["servers"] == [{"url": "/minigpt4"}]
        for end in ("/", "/?a=1"):
            asked = httpx.URL("https://example.org/minigpt4/readyz" + end)  # of the proxy
            redirect = httpx.get(address + asked.raw_path.decode().removeprefix("/minigpt4"))
            assert redirect.status_code == 307
            found = asked.join(redirect.headers["location"])
            assert str(found) == "https://example.org/minigpt4/readyz" + end.strip("/")
        doubled = httpx.get(address + "/readyz//").headers["location"]
        assert doubled == address + "/readyz"
        for path, named in (("/minigpt4/x/models", "/x/models"), ("/minigpt4x/models",) * 2):
            assert f"no endpoint {named}:" in httpx.get(address + path).text


@pytest.mark.parametrize("host", [b"[::1", b"a:b:c", "é".encode()])
def test_a_proxy_that_names_no_host(address, host):
    for path in ("/", "/config"):
        response = httpx.get(address + path, headers={b"X-Forwarded-Host": host})
        assert response.status_code == 400 and "check the proxy" in response.text


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (None, None),
        ("/", ""),
        (" /a/b/ ", "/a/b"),
        ("https://example.org/a/", "https://example.org/a"),
        ("HTTPS://example.org/A/", "https://example.org/A"),
    ],
)
def test_a_proxys_path_is_read_in_one_form(given, path):
    arguments = [] if given is None else ["--root-path", given]
    assert Server(lambda: [], options(*arguments)).launching["root_path"] == path


@pytest.mark.parametrize("host", ["::1", "[::1]", " ::1 "])
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address(engine, host):
    with served(lambda: engine, engine, "--host", host) as address:
        assert address.startswith("http://[::1]:")
        assert httpx.get(address + "/healthz").status_code == 200


# --- health and metrics --------------------------------------------------------------------------


def test_health(address, engine, monkeypatch):
    assert httpx.get(address + "/healthz").text == "ok\n"
    assert httpx.get(address + "/readyz").text == "ready\n"

    def fail(_):
        raise RuntimeError("CUDA out of cheese")

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "forward", fail)
        response = httpx.get(address + "/readyz")
        assert (response.status_code, response.text) == (503, "The model generates no tokens.\n")
        assert httpx.get(address + "/healthz").status_code == 200
    for sentence, name, value in (
        ("The model generates no tokens.\n", "health", Mock(side_effect=RuntimeError("closed"))),
        ("The model generates no tokens.\n", "health", Mock(side_effect=OSError("no socket"))),
        (f"{ENDING}\n", "_ending", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, value)
            assert httpx.get(address + "/readyz").text == sentence
        time.sleep(1.1)  # a younger result is given again
    assert httpx.get(address + "/readyz").status_code == 200


def test_one_probe_at_a_time(address, engine, monkeypatch):
    probes, asked = [], engine.health

    def health(seconds):
        probes.append(seconds)
        time.sleep(1)
        return asked(seconds)

    monkeypatch.setattr(engine, "health", health)
    found = []
    with httpx.Client(base_url=address, timeout=20) as program:  # made before: it takes a while
        threads = [
            threading.Thread(target=lambda: found.append(program.get("/readyz").status_code))
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [200] * 5 and len(probes) == 1


def test_ready_while_every_place_is_taken(address, engine, monkeypatch):
    """The probe cannot get in; the others' tokens show that the model answers."""
    monkeypatch.setattr(engine, "max_running", 1)
    monkeypatch.setattr(engine, "pace", 0.05)
    health = engine.health
    monkeypatch.setattr(engine, "health", lambda seconds: health(0.5))
    settings = {"model": MODEL, "max_tokens": 500, "stream": True, **GREEDY}
    stream = client(address).chat.completions.create(messages=[question("Hello?")], **settings)
    next(iter(stream))
    assert httpx.get(address + "/readyz").status_code == 200
    stream.close()
    assert at_rest(engine)


def test_while_loading(engine):
    with served(lambda: None, engine) as address:
        assert httpx.get(address + "/healthz").status_code == 200
        assert httpx.get(address + "/readyz").status_code == 503
        assert "process_resident_memory_bytes" in metrics(address)
        with pytest.raises(openai.InternalServerError, match="still loading") as caught:
            client(address).models.list()
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]


def test_metrics(address, engine):
    before = metrics(address)
    settings = {"model": MODEL, "max_tokens": 8, **GREEDY}
    asked = question("What is this?", data_url(picture_file("teal")))
    client(address).chat.completions.create(messages=[asked], **settings)
    with pytest.raises(openai.NotFoundError):
        client(address).chat.completions.create(messages=[asked], **{**settings, "model": "x"})
    conversation = Conversation()  # as the page asks
    conversation.add_question("Hello?")
    list(chat.ask(engine, conversation, Sampling(temperature=0.0, max_new_tokens=4)))
    assert at_rest(engine)
    after = metrics(address)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["minigpt4_requests_total"] == 2
    assert grown["minigpt4_tokens_total"] == 12
    assert grown["minigpt4_prompt_tokens_total"] > 40
    assert grown["minigpt4_time_to_first_token_seconds_count"] == 2
    assert grown['minigpt4_time_to_first_token_seconds_bucket{le="+Inf"}'] == 2
    assert grown["minigpt4_time_to_first_token_seconds_sum"] > 0
    assert grown["minigpt4_answer_tokens_per_second_count"] == 2
    for status in (200, 404):
        name = f'minigpt4_api_responses_total{{path="/v1/chat/completions",status="{status}"}}'
        assert grown[name] == 1
    label = f'{{model_name="{MODEL}"}}'
    for name in VLLM_HISTOGRAMS:
        assert grown[f"vllm:{name}_sum{label}"] > 0, name
        between = name == "inter_token_latency_seconds"  # of two answers
        assert grown[f"vllm:{name}_count{label}"] == (10 if between else 2), name
    assert grown[f"vllm:request_generation_tokens_sum{label}"] == 12
    assert grown[f"vllm:generation_tokens_total{label}"] == 12
    assert grown["llamacpp:tokens_predicted_total"] == 12
    ended = f'{{finished_reason="length",model_name="{MODEL}"}}'
    assert grown[f"vllm:request_success_total{ended}"] == 2
    assert after[f"vllm:kv_cache_usage_perc{label}"] == 0  # no answer is running
    assert after["minigpt4_queue_length"] == after["minigpt4_active_chats"] == 0
    assert after[f'minigpt4_decoder_info{{name="{engine.decoder_name}"}}'] == 1
    assert after["process_resident_memory_bytes"] > 1e8


def test_metrics_while_an_answer_runs(address, engine, monkeypatch):
    monkeypatch.setattr(engine, "pace", 0.2)
    settings = {"model": MODEL, "max_tokens": 20, "stream": True}
    with client(address).chat.completions.create(messages=[question("Hello?")], **settings) as text:
        next(text)
        found = metrics(address)
    label = f'{{model_name="{MODEL}"}}'
    assert found["minigpt4_active_chats"] == found[f"vllm:num_requests_running{label}"] == 1
    assert 0 < found[f"vllm:kv_cache_usage_perc{label}"] <= 1
    assert found["llamacpp:kv_cache_usage_ratio"] == found[f"vllm:kv_cache_usage_perc{label}"]
    assert at_rest(engine)


def test_metrics_for_any_reader(address):
    accept = {"Accept": "application/openmetrics-text;version=abc"}
    response = httpx.get(address + "/metrics", headers=accept)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    helped = re.findall(r"(?m)^# HELP (\S+) (.*)$", response.text)
    assert not [name for name, text in helped if text in ("As in vLLM.", name.partition(":")[2])]


def test_several_models(engine):
    other = Engine(ParityCase(ROOT / "tests" / "parity" / OTHER).load())
    service = ChatService(lambda: [engine, other], ImageUrls())
    asked = {"messages": [question("What is this?", data_url(picture_file()))], "max_tokens": 3}
    with closing(other), TestClient(Starlette(routes=endpoints(service, Keys(), 2**20))) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed] == [MODEL, OTHER]
        assert client.get(f"/v1/models/{OTHER}").json()["id"] == OTHER
        before = engine.totals.requests
        for name, path in ((OTHER, "chat/completions"), (OTHER, "responses")):
            body = asked | {"model": name}
            if path == "responses":
                body = {"input": "Hello?", "model": name, "max_output_tokens": 3}
            reply = client.post(f"/v1/{path}", json=body)
            assert reply.status_code == 200 and reply.json()["model"] == name, reply.text
        assert (engine.totals.requests, other.totals.requests) == (before, 2)
        assert client.post("/v1/chat/completions", json=asked).json()["model"] == MODEL
        assert (engine.totals.requests, other.totals.requests) == (before + 1, 2)
        refused = client.post("/v1/chat/completions", json=asked | {"model": "x"})
        assert refused.status_code == 404
        assert f"“{MODEL}” or “{OTHER}”" in refused.json()["error"]["message"]
        assert client.get("/readyz").status_code == 200
        text = client.get("/metrics").text
        assert f'vllm:request_generation_tokens_count{{model_name="{OTHER}"}} 2.0' in text
        assert f"minigpt4_requests_total {before + 3:.1f}" in text
        lines = [line for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(lines) == len({*lines})  # each name once


# --- gradio's clients ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradio(address):
    return Client(address, verbose=False)


def test_chat_is_the_only_endpoint(gradio):
    known = gradio.view_api(return_format="dict")
    assert list(known["named_endpoints"]) == ["/chat"] and not known["unnamed_endpoints"]


def test_chat(gradio, tmp_path):
    (tmp_path / "picture.png").write_bytes(picture_file("navy"))
    picture = handle_file(tmp_path / "picture.png")
    settings = {"temperature": 0, "max_tokens": 12, "api_name": "/chat"}
    seen = gradio.predict(message="What is this?", image=picture, **settings)
    assert seen and seen != gradio.predict(message="What is this?", **settings)
    history = [question("What is this?", data_url(picture_file("navy")))]
    history.append({"role": "assistant", "content": seen})
    assert gradio.predict(message="And now?", history=history, system="Be brief.", **settings)
    job = gradio.submit(message="What is this?", image=picture, **settings)
    assert job.result() == seen and len(job.outputs()) > 3  # it streams


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("^message is empty", {"message": " "}),
        (r"^history\[0\] must be an object", {"message": "Hello?", "history": [["a", "b"]]}),
        (r"^history\[0\].role must", {"message": "?", "history": [{"role": 1}], "system": "a"}),
        ("^system must be a string", {"message": "Hello?", "system": 5}),
        ("^system must be a string", {"message": "Hello?", "system": ["a"]}),
        ("temperature must be", {"message": "Hello?", "temperature": "hot"}),
        ("history must be", {"message": "Hello?", "history": "Hello?"}),
        ("^message must be", {"message": 3}),
        ("uploaded file", {"message": "Hello?", "image": "picture.png"}),
    ],
)
def test_what_cannot_be_asked(gradio, says, arguments):
    with pytest.raises(Exception, match=says):
        gradio.predict(**arguments, api_name="/chat")


@pytest.mark.trust("Protocol", "addresses of other machines, redirects, `file:`")
def test_no_address_is_fetched(gradio):
    """192.0.2.1 is nobody's, and public as far as gradio knows."""
    image = {"path": "http://192.0.2.1/picture.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="not its address"):
        gradio.predict(message="What is this?", image=image, api_name="/chat")


def test_a_client_that_cancels_ends_its_request(gradio, engine, monkeypatch):
    monkeypatch.setattr(engine, "pace", 0.05)
    job = gradio.submit(message="Hello?", max_tokens=500, api_name="/chat")
    while not job.outputs():
        time.sleep(0.05)
    assert engine.running == 1
    job.cancel()
    assert at_rest(engine, 2.0)


def test_no_file_of_this_machine_is_opened(address, tmp_path):
    (tmp_path / "private.png").write_bytes(picture_file())
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
        image = {"path": str(tmp_path / "private.png"), **meta}
        called = httpx.post(
            address + "/gradio_api/call/chat", json={"data": ["What is this?", image]}
        )
        event = called.json()["event_id"]
        said = httpx.get(f"{address}/gradio_api/call/chat/{event}", timeout=30).text
        assert "event: error" in said and "event: complete" not in said
        assert ("meta" in image) == ("Upload the file" in said) and "null" not in said, said


def test_arguments_at_the_end_may_be_left_out(address):
    for data, expected in ((["Hello?"], "event: complete"), ([], "event: error")):
        called = httpx.post(address + "/gradio_api/call/chat", json={"data": data})
        event = called.json()["event_id"]
        said = httpx.get(f"{address}/gradio_api/call/chat/{event}", timeout=30).text
        assert expected in said and "null" not in said, said
    called = httpx.post(address + "/gradio_api/call/chat", json={"data": ["Hello?"] * 11})
    assert called.status_code == 400 and "at most 10" in called.text


def test_old_uploads_are_deleted_while_the_server_runs(engine):
    old = Path(os.environ["GRADIO_TEMP_DIR"]) / "old" / "picture.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(picture_file())
    os.utime(old, (0, 0))
    with served(lambda: engine, engine):
        wait_for(lambda: not old.exists())


# --- options, and the end ------------------------------------------------------------------------


def test_options_from_the_environment(monkeypatch):
    monkeypatch.setenv("MINIGPT4_API_KEY", "secret")
    monkeypatch.setenv("MINIGPT4_IMAGE_HOSTS", "example.org, example.com:8443")
    monkeypatch.setenv("MINIGPT4_MAX_RUNNING", "4")
    chosen = options()
    assert (chosen.api_key, chosen.max_running) == ("secret", 4)
    service = Server(lambda: [], chosen).chat_service
    assert service.image_urls.hosts == {"example.org", "example.com:8443"}


def test_numbers_that_make_no_sense(capsys):
    for option in ("--max-running", "--max-queue", "--max-upload-mb", "--kv-megabytes"):
        for number in ("0", "9999999999"):
            with pytest.raises(SystemExit):
                options(option, number)
            said = capsys.readouterr().err
            assert f"{option}: must be an integer from 1 to 1" in said and f"not “{number}”" in said


def test_draining(engine):
    """What was taken is answered, what comes then is refused."""
    other = Engine(engine.model)
    try:
        stream = other.submit(_request(20))
        assert other.drain(10) and stream.stop_reason == "length"
        with pytest.raises(Exception, match="ending"):
            other.submit(_request(20))
        assert not other.health(1)
    finally:
        other.close()


def test_draining_does_not_wait_for_ever(engine):
    other = Engine(engine.model)
    stream = other.submit(_request(1500))
    assert not other.drain(0.1)
    other.close()
    with pytest.raises(UserError, match="ending"):
        list(stream)


def test_ctrl_c_lets_answers_end(monkeypatch, capsys):
    monkeypatch.setattr("minigpt4.web.server.FLUSH_SECONDS", 0)
    engine, page = Mock(running=1), Mock()
    engine.drain.return_value = True
    server, before = Server(lambda: [engine], options()), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), server.until_terminated(page):
        signal.raise_signal(signal.SIGINT)
    engine.drain.assert_called_once_with(25.0)
    assert engine.close.called and page.close.called
    assert "Waiting up to 25 s for running answers" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_amid_a_finalizer_ends_the_server(monkeypatch):
    """Python drops what is raised there, and collects garbage at any time."""

    class Garbage:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("sys.unraisablehook", dropped := Mock())
    server, page = Server(list, options()), Mock(is_running=True)
    page.close.side_effect = lambda **_: setattr(page, "is_running", False)
    with server.until_terminated(page):
        Garbage()
        monkeypatch.setattr("time.sleep", Mock(side_effect=TimeoutError))  # it would wait for ever
        server.wait(page)
    assert dropped.called and page.close.called


def test_a_signal_that_is_ignored_stays_ignored():
    server, before = Server(list, options()), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with server.until_terminated(Mock()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _request(max_new_tokens):
    prompt = Prompt()
    prompt.add_tokens([1, 2, 3])
    return Request(prompt, {}, Sampling(temperature=0.0, max_new_tokens=max_new_tokens))


def test_a_lost_gpu_ends_the_server(monkeypatch, capsys):
    """Once who waits has been told, with an exit status that is not 0."""
    page, chosen = Mock(is_running=True), options()
    with tiny_engine() as engine:
        broken = RuntimeError("CUDA error: an illegal memory access was encountered")
        monkeypatch.setattr(engine.decoder, "forward", Mock(side_effect=broken))
        stream = engine.submit(Request(Prompt([1], [1], [], [False]), {}))
        server = Server(lambda: [engine], chosen)
        monkeypatch.setattr("minigpt4.web.server.FLUSH_SECONDS", 0)
        for name in ("serve", "freeze_objects"):
            monkeypatch.setattr(f"minigpt4.web.page.page.{name}", Mock())
        launching = partial(launch, page, chosen, Loading.done(engine), server)
        monkeypatch.setattr("minigpt4.web.run.serve", lambda _: launching())
        assert app.main([]) == 2 and "must be restarted" in capsys.readouterr().err
        page.close.assert_called_once()
        with pytest.raises(UserError, match="must be restarted"):
            list(stream)


@pytest.mark.parametrize("path", ["minigpt4/__main__.py", "app.py"])
@pytest.mark.parametrize("module", ["minigpt4.web.run", "minigpt4.data.files"])
def test_ctrl_c_amid_imports(path, module):
    program = f"""
import runpy, signal, sys

class Press:
    def find_spec(self, name, *_):
        if name == "{module}":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Press())
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path("{path}", run_name="__main__")
"""
    assert python("-c", program, status=130).stderr == ""


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_signal_while_loading_ends_the_program(number, status):
    program = f"""
import signal, sys, threading, time
from unittest.mock import Mock
from minigpt4.web.page import page
from minigpt4.web.page.loading import Loading
from minigpt4.web.run import options
from minigpt4.web.server import Server

def load(report):
    main = threading.main_thread().ident
    while not sys._current_frames()[main].f_code.co_filename.endswith("threading.py"):
        pass
    signal.pthread_kill(main, signal.{number})
    threading.Event().wait()

page.serve = Mock(return_value="x")
page.launch(Mock(), options([]), Loading(load), Server(list, options([])))
raise SystemExit(77)
"""
    run = python("-c", program, status=status)
    assert (run.stdout, run.stderr) == ("Open x\n", "")


@pytest.mark.trust("Faults", "SIGTERM while streaming")
def test_the_real_server_and_its_end():
    """nano from end to end: a picture, a stream that SIGTERM does not cut, exit status 0."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "app.py", "--model", "nano", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "MINIGPT4_SHUTDOWN_SECONDS": "20"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout.readline() == f"Open {address}\n"
        assert httpx.get(address + "/healthz", timeout=20).status_code == 200
        wait_for(lambda: responds(address + "/readyz"), 60)  # the page is there before the model
        idle, since = http.client.HTTPConnection("127.0.0.1", port, timeout=20), time.monotonic()
        idle.request("GET", "/healthz")
        idle.getresponse().read()
        connection = idle.sock
        program = client(address)
        beast = resources.files("gradio") / "media_assets" / "images" / "cheetah1.jpg"
        photo = data_url(beast.read_bytes())
        settings = {"model": "nano", "max_tokens": 30, "temperature": 0}
        answer = program.chat.completions.create(
            messages=[question("Describe this image briefly.", photo)], **settings
        )
        animals = "lion|cat|dog|animal|bear|leopard|cow|horse"
        assert re.search(animals, answer.choices[0].message.content.lower())
        assert answer.usage.prompt_tokens > 26  # a picture's
        # A proxy that kept its connection for a few seconds may use it again.
        time.sleep(max(0.0, since + 6 - time.monotonic()))
        idle.request("GET", "/healthz")
        assert idle.getresponse().status == 200 and idle.sock is connection
        count = {"role": "user", "content": "Write a long story about a lake."}
        long = {**settings, "max_tokens": 60, "stream": True}
        pieces = iter(program.chat.completions.create(messages=[count], **long))
        for _ in range(3):
            next(pieces)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(openai.APIError) as refused:
            program.chat.completions.create(messages=[count], **settings)
        assert getattr(refused.value, "status_code", 503) == 503
        last = list(pieces)[-1]
        assert last.choices[0].finish_reason in ("stop", "length")
        assert server.wait(timeout=20) == 0
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.wait()


# --- web pages of other origins ------------------------------------------------------------------


def allowed(address: str, origin: str, path: str = "/v1/models") -> tuple[str | None, str | None]:
    """(what a browser reads before a request with a key, and with its answer)."""
    wants = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
        "Access-Control-Request-Private-Network": "true",  # of a page that comes from the internet
    }
    before = httpx.options(address + path, headers={"Origin": origin, **wants})
    assert (before.status_code == 200) == ("access-control-allow-origin" in before.headers)
    after = httpx.get(address + path, headers={"Origin": origin})
    name = "access-control-allow-origin"
    return before.headers.get(name), after.headers.get(name)


def test_web_pages_of_other_origins(engine):
    chat = "https://chat.example.org"
    with served(lambda: engine, engine) as address:
        assert allowed(address, "http://localhost:3000") == ("http://localhost:3000",) * 2
        assert allowed(address, chat) == (None, None)
        asks = {"Origin": chat, "Access-Control-Request-Method": "POST"}
        refused = httpx.options(address + "/v1/models", headers=asks)
        assert refused.status_code == 400 and "--cors-origins" in refused.text
        assert chat in refused.text

        def status(origin: str, kind: str = "text/plain") -> int:
            sent = {"content-type": kind, **({"origin": origin} if origin else {})}
            return httpx.post(address + "/v1/responses", content="{}", headers=sent).status_code

        # Without a preflight, only what has asked for nothing is refused as a mistake (400).
        assert status(chat) == status("null", "") == status(chat, "multipart/form-data") == 403
        assert {status("", ""), status("http://localhost:1"), status(address)} == {400}
        assert status(chat, "application/json; charset=utf-8") == 400
    with served(
        lambda: engine, engine, "--cors-origins", "HTTPS://Chat.example.org:443/, http://[::1]:8080"
    ) as address:
        assert allowed(address, chat) == allowed(address, chat, "/v1/none") == (chat, chat)
        assert allowed(address, "http://[::1]:8080")[0]
        assert allowed(address, "http://localhost:3000") == (None, None)
        answer = httpx.get(address + "/v1/models", headers={"Origin": chat})
        assert "X-Dropped-Turns" in answer.headers["access-control-expose-headers"]
    with served(lambda: engine, engine, "--cors-origins", "*") as address:
        assert allowed(address, chat) == ("*", "*")


@pytest.mark.parametrize(
    "origin", ["app://obsidian.md", "tauri://localhost", "chrome-extension://abc", "null"]
)
def test_origins_of_applications(origin):
    assert cors(origin.upper() if origin != "null" else origin).kwargs["allow_origins"] == [origin]


@pytest.mark.parametrize(
    "origin", ["chat.example.org", "https://*.example.org", "https://a.org/x", "https://a.org?x"]
)
def test_origins_that_no_web_page_has(origin):
    with pytest.raises(UserError, match="which is not an origin"):
        cors(origin)
