"""The server's options, and what a person sees who starts it."""

import socket
from types import SimpleNamespace

import pytest

import app
from minigpt4.web import run


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])  # the second by uvicorn alone
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.trust("Faults", "a port in use")
def test_a_port_in_use(monkeypatch, capsys, host):
    with socket.socket() as taken:
        taken.bind((host, 0))
        taken.listen()
        monkeypatch.setenv("MINIGPT4_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr("minigpt4.web.run.load", lambda *_: SimpleNamespace())
        assert app.main(["--host", host]) == 2
    error = capsys.readouterr().err
    assert "is in use" in error and error.count("\n") == 1


def test_an_address_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("minigpt4.web.run.load", lambda *_: SimpleNamespace())
    assert app.main(["--host", "999.1.1.1"]) == 2
    assert capsys.readouterr().err == "app.py: There is no address “999.1.1.1”: check --host.\n"


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("--root-path is “/a b”: it must be a path", ["--root-path", "/a b"]),
        ("--root-path is “/a?b”: it must be a path", ["--root-path", "/a?b"]),
        ("--auth must be a name and a password", ["--auth", "ann:\n"]),
    ],
)
def test_values_that_cannot_be_meant(capsys, says, arguments):
    assert app.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_key_without_servers_is_left_over(monkeypatch):
    monkeypatch.setenv("MINIGPT4_LLM_KEY", "sk")
    assert len(run.one_by_one(run.options([]))) == 1


def test_a_model_that_cannot_be_loaded(monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MINIGPT4_PORT", str(free.getsockname()[1]))
    assert app.main(["--model", "nano", "--device", "tpu"]) == 2
    error = capsys.readouterr().err
    assert "“tpu”" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("no model called “tiny”", ["--model", "nano,tiny"]),
        ("no model called “auto”", ["--model", "auto,nano"]),
        ("a model twice", ["--model", "nano, nano"]),
        ("name one model", ["--model", "nano,mini", "--projection", "my.safetensors"]),
        ("name one model", ["--model", "nano,mini", "--llm-url", "http://127.0.0.1:9/v1"]),
    ],
)
def test_models_that_cannot_be_offered_together(capsys, says, arguments):
    assert app.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_each_model_has_its_own_options():
    assert app.options(["--model", " nano "]).model == "nano"
    chosen = app.options(["--model", "nano, mini", "--device", "cpu"])
    assert [one.model for one in run.one_by_one(chosen)] == ["nano", "mini"]
    assert {one.device for one in run.one_by_one(chosen)} == {"cpu"}


def test_a_feedback_folder_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert app.main(["--feedback", str(tmp_path / "file" / "folder")]) == 2
    assert "Cannot write feedback to" in capsys.readouterr().err


def test_options_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("MINIGPT4_HOST", "0.0.0.0")
    monkeypatch.setenv("MINIGPT4_SHARE", "no")
    monkeypatch.setenv("MINIGPT4_MAX_QUEUE", "8")
    chosen = app.options(["--max-queue", "4"])
    assert (chosen.host, chosen.share, chosen.max_queue) == ("0.0.0.0", False, 4)
    monkeypatch.setenv("MINIGPT4_QUANTIZE", "int3")
    with pytest.raises(SystemExit):
        app.options([])
    assert "MINIGPT4_QUANTIZE" in (said := capsys.readouterr().err) and "int3" in said


def test_where_a_space_looks_for_the_page(monkeypatch):
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.2")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7777")
    chosen = app.options([])
    assert (chosen.host, chosen.port) == ("127.0.0.2", 7777)
    monkeypatch.setenv("MINIGPT4_PORT", "8888")
    assert app.options([]).port == 8888
