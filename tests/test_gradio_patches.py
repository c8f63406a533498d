"""Patches of Gradio: the installed one has the patched parts, and each patch does its work."""

import ast
import asyncio
import logging
import re
import socket
import time
from pathlib import Path

import gradio as gr
import httpx
import huggingface_hub
import pytest
from gradio import component_meta, processing_utils
from gradio.mcp import GradioMCPServer
from gradio.state_holder import SessionState

from minigpt4 import __main__, web
from minigpt4.conversation import Conversation
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.options import HUB_INTEGERS, check_integers
from minigpt4.web import run
from minigpt4.web.guard import gradio_patches
from minigpt4.web.guard.gradio_patches import IDLE_POLL_SECONDS, Prepared
from minigpt4.web.page import render
from minigpt4.web.page import session as session_module
from minigpt4.web.page.session import Session
from tests.api_case import SETTINGS, page_event, page_events
from tests.fake_engine import LONG, FakeAnswer, FakeEngine
from tests.page_case import picture, served
from tests.running import python

ROOT = Path(__file__).parent.parent
# In an interpreter of its own: here the patches may have been applied already.
COMPARE = """
import sys
import uvicorn
import gradio as gr
import httpx
from minigpt4.web.guard import gradio_patches
with gr.Blocks() as page:
    pass
page.queue()
scope = {**vars(gradio_patches), "queue": page._queue}
before = {name: eval(name, scope) for name in NAMES}  # AttributeError: an upgrade has removed it
uvicorn.Config(page).timeout_keep_alive
gradio_patches.apply()
gradio_patches.tune_queue(page)
for name in NAMES:
    if eval(name, scope) == before[name]:
        sys.exit(f"{name} is not replaced")
"""


def test_gradio_still_has_what_is_replaced():
    tree = ast.parse(Path(gradio_patches.__file__).read_text(encoding="utf-8"))
    functions = [f for f in tree.body if getattr(f, "name", "") in ("apply", "tune_queue")]
    assigned = [a.targets[0] for f in functions for a in f.body if isinstance(a, ast.Assign)]
    names = [ast.unparse(target) for target in assigned if isinstance(target, ast.Attribute)]
    assert len(names) > 10
    python("-c", COMPARE.replace("NAMES", repr(names)))


def test_gradio_is_imported_whatever_proxies_and_certificates_there_are():
    code = "import minigpt4.web, gradio, httpx; assert 'partial' not in repr(httpx.Client.__init__)"
    wrong = {
        "ALL_PROXY": "socks5://127.0.0.1:9",  # httpx would need another package
        "http_proxy": "http://a:b",
        "no_proxy": "[::1]",
        "SSL_CERT_FILE": "/nowhere",
    }
    python("-c", code, **wrong)


def test_variables_that_are_no_integers(monkeypatch, capsys):
    """Each that the libraries read without a check, and no other."""
    folders = Path(gr.__file__).parent, Path(huggingface_hub.__file__).parent
    files = [file for folder in folders for file in folder.glob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    read = re.findall(r'int\(\s*os\.(?:getenv|environ\.get)\(\s*"((?:GRADIO|HF)_\w+)"', source)
    others = {"GRADIO_DEFAULT_CONCURRENCY_LIMIT", "GRADIO_NUM_WORKERS", "WEB_CONCURRENCY"}
    names = (*web.INTEGERS, *HUB_INTEGERS)
    assert {*read} | others == {*names, "GRADIO_DEBUG"}
    monkeypatch.setenv("GRADIO_DEFAULT_CONCURRENCY_LIMIT", "None")
    check_integers(names)
    for name in names:
        monkeypatch.setenv(name, "1.5")
        with pytest.raises(UserError, match=f"^Environment variable {name} must be an integer, "):
            check_integers(names)
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("GRADIO_NUM_PORTS", "")
    done = python("app.py", status=2)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("app.py: Environment variable GRADIO_NUM_PORTS must be")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")
    for main in (run.main, __main__.main):
        assert main([] if main is run.main else ["download", "nano"]) == 2
        assert "HF_HUB_ETAG_TIMEOUT must be an integer, not “soon”" in capsys.readouterr().err


def test_a_variable_that_would_keep_the_server_from_starting(monkeypatch):
    monkeypatch.setenv("GRADIO_DEBUG", "1")
    with served(FakeEngine()) as address:
        assert httpx.get(address + "/healthz").status_code == 200


@pytest.mark.parametrize("said", ["Failed to validate request: 2 errors", "Tool '%s' not listed"])
def test_mistakes_of_mcp_clients_are_not_logged(said, caplog, monkeypatch):
    """As tests/test_mcp.py shows on a server, where the package is installed."""
    monkeypatch.setattr(GradioMCPServer, "StreamableHTTPSessionManager", dict, raising=False)
    gradio_patches.tune_mcp(1)
    for name in gradio_patches.MCP_LOGGERS:
        logging.getLogger(name).warning(said)
        logging.getLogger(name).warning("A fault.")
    assert caplog.messages == ["A fault."] * len(gradio_patches.MCP_LOGGERS)


def test_a_log_is_not_filled_while_no_connection_can_be_accepted(caplog):
    log = logging.Logger("asyncio")
    log.addFilter(gradio_patches._SaysOnce())
    log.addHandler(caplog.handler)
    for _ in range(1000):
        log.error("socket.accept() out of system resource\nsocket: …", exc_info=OSError("no"))
    log.error("Something else")
    assert caplog.messages == [gradio_patches.NO_MORE_FILES, "Something else"]
    assert not caplog.records[0].exc_info


def test_connections_on_which_no_request_comes_are_closed(monkeypatch):
    monkeypatch.setattr(gradio_patches, "KEEP_ALIVE_SECONDS", 0.5)
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    with served(FakeEngine()) as address:
        place = ("127.0.0.1", httpx.URL(address).port)
        for sent in (b"", head, head + b"\r\n" + head):
            with socket.create_connection(place, timeout=20) as line:
                line.sendall(sent)
                received = b"".join(iter(lambda line=line: line.recv(4096), b""))  # to its end
                assert received.count(b"200 OK") == sent.count(b"\r\n\r\n")
        with socket.create_connection(place, timeout=20) as line:  # a body has its own time
            line.sendall(b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
            time.sleep(1)
            line.sendall(b"{}")
            assert line.recv(4096).startswith(b"HTTP/1.1 4")


def test_a_page_starts_behind_a_proxy_that_does_not_reach_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with served(FakeEngine()) as address:
        assert httpx.get(address + "/healthz", trust_env=False).status_code == 200


def test_gradio_is_imported_without_its_stubs():
    """In an interpreter of its own: here Gradio has been imported already."""
    code = (
        "import minigpt4.web, gradio; print(gradio.component_meta.create_or_modify_pyi.__module__)"
    )
    assert python("-c", code).stdout.strip() == "minigpt4.web"
    source = Path(component_meta.__file__).read_text(encoding="utf-8")
    assert "def create_or_modify_pyi(" in source and source.count("create_or_modify_pyi(") == 2


def test_no_other_module_replaces_anything_of_gradio():
    """An assignment to an attribute of gradio's modules or of a page's queue stands here alone."""
    for path in (ROOT / "minigpt4").rglob("*.py"):
        if path.name != "gradio_patches.py":
            text = path.read_text(encoding="utf-8")
            assert "_queue." not in text or "page" not in path.parts, path


@pytest.fixture
def session(tmp_path):
    conversation = Conversation()
    photo = image.load(picture(tmp_path / "photo.png"))
    conversation.add_question("What is <this>?", [photo])
    conversation.add_answer("A meadow.\n\n    In code.")
    session = Session(conversation)
    session.remark("One & two")
    render.make_thumbnails(conversation)
    return session


def test_prepared_messages_are_what_gradio_makes_of_them(session):
    shown = render.messages(session, None)
    gradio_patches.apply()
    plain = [{"role": m["role"], "content": [dict(part) for part in m["content"]]} for m in shown]
    with gr.Blocks():
        chatbot = gr.Chatbot()

    async def by_gradio() -> list:
        made = gradio_patches._original_postprocess_chatbot(chatbot, plain)
        moved = await gradio_patches._original_move_files(made, chatbot, postprocess=True)
        return gradio_patches._original_add_root_url([moved], "http://here", None)[0]

    theirs = asyncio.run(by_gradio())
    ours = processing_utils.add_root_url([shown, "other"], "http://here", None)
    assert ours[1] == "other" and chatbot.postprocess(shown) is shown
    assert [m["role"] for m in theirs] == ["user", "user", "assistant", "assistant"]
    for mine, other in zip(ours[0], theirs, strict=True):
        for part, another in zip(mine["content"], other["content"], strict=True):
            if "file" in part:  # theirs is a copy of the file
                for file in (part["file"], another["file"]):
                    # What follows the "#" is for the page's scripts.
                    address = file["url"].partition("#")[0]
                    assert address == f"http://here/gradio_api/file={file.pop('path')}"
                    file.pop("url")
        assert mine == other
    assert shown[0]["content"][0]["file"]["url"].startswith("/")  # shared: it stays as it was


def test_skipped_outputs_cost_nothing(monkeypatch):
    gradio_patches.apply()
    with gr.Blocks() as page:
        outputs = [gr.Textbox(), gr.Textbox(), gr.State(None)]
        event = outputs[0].change(lambda text: None, outputs[0], outputs)
    (function,) = page.fns.values()
    made = []
    monkeypatch.setattr(gr.Textbox, "__init__", lambda *_, **__: made.append(1))

    def result(*values) -> list:
        return asyncio.run(page.postprocess_data(function, list(values), None))

    skip = gr.skip()
    assert result(skip, "b", skip) == [skip, "b", None]
    assert result(skip, skip, skip) == [skip, skip, None]
    assert result("a", skip, 7)[:2] == ["a", skip]
    assert result("a", "b", 7) == ["a", "b", None]
    assert not made and event


def test_no_description_of_the_page_is_kept_for_each_visitor():
    """A full garbage collection, which blocks the event loop, would visit all of them."""
    gradio_patches.apply()
    with gr.Blocks() as page:
        name, chosen = gr.Textbox(), gr.State(None)
    visitor = SessionState(page)
    visitor[chosen._id] = 7
    visitor._update_value_in_config(name._id, "what it shows")
    assert not [*visitor.components]
    assert visitor[chosen._id] == 7 and visitor[name._id] is name
    assert page.default_config.get_config()["components"][0]["props"]  # the page's own is there


def test_the_idle_queue_wakes_for_an_event():
    patched = gradio_patches._QueueAsyncio()

    async def wait() -> None:
        sleeping = asyncio.create_task(patched.sleep(IDLE_POLL_SECONDS))
        other = asyncio.create_task(patched.sleep(3600))
        await asyncio.sleep(0)
        patched.wake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sleeping.done() and not other.done()
        other.cancel()
        await patched.sleep(IDLE_POLL_SECONDS)  # ends by itself
        assert not patched._sleeping and patched.gather is asyncio.gather

    asyncio.run(wait())


def test_an_update_reads_no_files_and_builds_no_components(session, monkeypatch):
    """Through Gradio's whole stack."""
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    counted = {"async_move_resource_to_block_cache": 0, "_update_config": 0}

    def count(owner, name):
        real = getattr(owner, name)

        def counting(*arguments, **options):
            counted[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    from gradio.utils import get_upload_folder

    Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
    path = str(picture(Path(get_upload_folder()) / "patched.png", "#654321"))
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    with served(FakeEngine()) as address:
        events = page_events(address)
        data = [{"text": "Hello?", "files": [file]}, None, *SETTINGS[:3], 300, *SETTINGS[4:]]
        page_event(address, events["ask"], data, "patched")
        count(gr.Chatbot, "async_move_resource_to_block_cache")
        count(SessionState, "_update_config")
        data[0] = {"text": "A long one, please.", "files": []}
        last = page_event(address, events["ask"], data, "patched")
    assert " ".join(LONG.split()[:300]) in str(last) and "http://127.0.0.1" in str(last)
    assert counted["async_move_resource_to_block_cache"] == 0
    assert counted["_update_config"] <= 3  # the box: emptied, and its button at the start and end


def test_prepared_messages_stay_prepared():
    message = {"role": "user", "content": [{"type": "text", "text": "Hello?"}]}
    there = Prepared([message]).at("http://here")
    assert isinstance(there, Prepared) and there[0] is message
