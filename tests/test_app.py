"""The server's options, and what a person sees who starts it."""

import socket
from types import SimpleNamespace

import pytest

import app


@pytest.mark.trust("Faults", "a port in use")
def test_a_port_in_use(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MINIGPT4_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr("app.load", lambda *_: SimpleNamespace())
        assert app.main([]) == 2
    error = capsys.readouterr().err
    assert "is in use" in error and error.count("\n") == 1


def test_a_model_that_cannot_be_loaded(monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MINIGPT4_PORT", str(free.getsockname()[1]))
    assert app.main(["--model", "nano", "--device", "tpu"]) == 2
    error = capsys.readouterr().err
    assert "“tpu”" in error and "Traceback" not in error


def test_a_feedback_folder_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert app.main(["--feedback", str(tmp_path / "file" / "folder")]) == 2
    assert "Feedback cannot be written" in capsys.readouterr().err


def test_options_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("MINIGPT4_HOST", "0.0.0.0")
    monkeypatch.setenv("MINIGPT4_SHARE", "no")
    monkeypatch.setenv("MINIGPT4_MAX_QUEUE", "8")
    chosen = app.options(["--max-queue", "4"])
    assert (chosen.host, chosen.share, chosen.max_queue) == ("0.0.0.0", False, 4)
    monkeypatch.setenv("MINIGPT4_QUANTIZE", "int3")
    with pytest.raises(SystemExit):
        app.options([])
    assert "int3" in capsys.readouterr().err
