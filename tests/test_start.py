"""The model that `auto` chooses, and the start where its weights are missing."""

import argparse
import asyncio
import json
import os
import tempfile
import warnings
import weakref
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFWriter

import minigpt4
from minigpt4 import start
from minigpt4.config import get_model
from minigpt4.engine.kernels import build
from minigpt4.errors import UserError
from minigpt4.options import LOADING
from minigpt4.web.page.texts import translate_step
from minigpt4.web.run import upload_folder
from minigpt4.weights import load
from minigpt4.weights.load import WeightFiles


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [(None, "mini"), (4, "mini"), (12.1, "vicuna-7b"), (23, "vicuna-7b"), (24.5, "vicuna-13b")],
)
def test_auto(gigabytes, name):
    config, why = start.choose(None if gigabytes is None else int(gigabytes * 1e9))
    assert config.name == name and why


def test_auto_goes_on_with_nano_where_weights_are_missing(monkeypatch, capsys):
    """On a machine with a big GPU but no weights: one line says so, and nano is loaded."""
    loaded = []

    def load(config, files, *_, **__):
        loaded.append(config.name)

    def find(config, given=None):
        if config.name != "nano":
            raise UserError(f"Weights of {config.name} are missing.")
        return WeightFiles(Path("nowhere"), Path("nowhere"), None)

    monkeypatch.setattr(start, "choose", lambda *_: (get_model("vicuna-13b"), "it is big"))
    monkeypatch.setattr("minigpt4.weights.load.find_weights", find)
    monkeypatch.setattr("minigpt4.weights.load.download_weights", lambda *_: None)
    monkeypatch.setattr("minigpt4.weights.load.load_model", load)
    options = argparse.Namespace(model="auto", quantize="none", projection=None, device="cpu")
    start.open_model(options)
    assert loaded == ["nano"]
    said = capsys.readouterr().err
    assert "vicuna-13b, because it is big" in said
    assert said.index("Continuing with mini") < said.index("Continuing with nano")


@pytest.mark.parametrize(
    ("widths", "given", "said"),
    [
        ({"a.gguf": 5120}, {"llm": "a.gguf"}, "vicuna-13b"),
        ({"a.gguf": 896}, {"llm": "a.gguf", "vision": "x.pth"}, "mini"),
        ({"a": 4096}, {"llm": "a", "qformer": "q.pth"}, "vicuna-7b"),
        ({"a": 4096}, {"llm": "a"}, "may be for vicuna-7b or llama2-7b: name"),
        ({"a": 64}, {"llm": "a"}, r"No model has the shapes of “--llm .*a” .* of width 64\): give"),
        (
            {"a": 576},
            {"llm": "a", "qformer": "q.pth"},
            "No model has the shapes of “--qf.* and “--llm a”",
        ),
        ({}, {"vision": "x.pth"}, "may be for vicuna-7b, .* or mini: name"),
        ({}, {"projection": "me/mine:p.pth"}, "may be for vicuna-7b, .* or mini: name"),
        ({"a.gguf": 0}, {"llm": "a.gguf"}, "may be for vicuna-7b, .* or mini: name"),  # damaged
    ],
)
def test_auto_keeps_what_is_given(monkeypatch, tmp_path, widths, given, said):
    """It takes the one model that the given weights fit, or asks; it never leaves them out."""
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, width in widths.items():
        if name.endswith(".gguf"):
            writer = GGUFWriter(name, "llama")
            writer.add_embedding_length(width)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            if not width:
                Path(name).write_bytes(b"GGUF")
        else:
            Path(name).mkdir()
            Path(name, "config.json").write_text(json.dumps({"hidden_size": width}))

    def find(config, given=None):
        raise UserError(f"{config.name} got {sorted(given)}.")

    monkeypatch.setattr(load, "find_weights", find)
    monkeypatch.setattr(load, "download_weights", lambda *_: None)
    options = argparse.Namespace(model="auto", quantize="none", device="cpu", **given)
    expected = said if " " in said else f"{said} got {sorted(given)}".replace("[", "\\[")
    with pytest.raises(UserError, match=expected):
        start.open_model(options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_memory_for_a_conversation(monkeypatch, capsys, device):
    """“auto” goes on with a smaller model, once the larger one is gone; the last refusal says what
    is free and what would fit."""
    models = []

    class Model(SimpleNamespace):
        """One that can be referred to weakly."""

    def load_model(config, *_, **__):
        assert all(model() is None for model in models)
        model = Model(config=config, device=torch.device(device))
        models.append(weakref.ref(model))
        return model

    def engine(model, **_):
        if model.config.name == small[0]:
            return model.config.name
        raise UserError("There is not enough memory for a conversation.", "memory")

    def free_memory(*_):
        assert all(model() is None for model in models)
        return 10**9

    files = WeightFiles(Path("nowhere"), Path("nowhere"), None)
    monkeypatch.setattr("minigpt4.weights.memory.free_memory", free_memory)
    monkeypatch.setattr(start, "choose", lambda *_: (get_model("vicuna-13b"), "it is big"))
    monkeypatch.setattr(start, "device_of", lambda _: torch.device(device))
    monkeypatch.setattr(start, "free_gpu_memory", lambda device: None)
    monkeypatch.setattr(start, "_embedding_store", lambda *_: None)
    monkeypatch.setattr("minigpt4.engine.Engine", engine)
    monkeypatch.setattr(load, "find_weights", lambda config, given: files)
    monkeypatch.setattr(load, "download_weights", lambda *_: None)
    monkeypatch.setattr(load, "load_model", load_model)
    options = argparse.Namespace(
        model="auto", quantize="none", device="auto", llm_url=None, embeddings_mb=0
    )
    small = ["mini"]
    assert start.open_engine(options) == "mini" and len(models) == 2
    assert "Continuing with mini." in capsys.readouterr().err
    small = [""]
    refused = {
        "cpu": "nano does not fit into memory, and 1.0 GB are free: ",
        "cuda": "of cuda is too small",
    }
    with pytest.raises(UserError, match=refused[device]) as caught:
        start.open_engine(options)
    assert caught.value.kind == "memory"


def test_a_gpu_that_is_too_small(monkeypatch):
    def load_model(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("minigpt4.weights.load.load_model", load_model)
    monkeypatch.setattr("minigpt4.weights.load.bytes_to_load", lambda *_: (1, 0))
    with pytest.raises(UserError, match="memory of cuda is too small for mini"):
        start._load(get_model("mini"), None, torch.device("cuda"), "none", "auto", print, print)


def test_a_driver_that_is_too_old(monkeypatch, capsys):
    def available() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=2
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    with pytest.raises(UserError, match="driver"):
        start.device_of("cuda")
    assert not capsys.readouterr().err
    assert start.device_of("auto").type == "cpu"
    assert "Continuing without the GPU" in capsys.readouterr().err
    assert start.device_of("cpu").type == "cpu"


@pytest.mark.trust("Uploads", "another user's folder or link in the place of the upload folder")
def test_the_folder_of_uploads_is_this_users_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = Path(upload_folder())
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert upload_folder() == str(folder)  # the next start finds what this one left

    def another() -> bool:
        found = Path(upload_folder())
        return found != folder and found.stat().st_mode & 0o777 == 0o700

    folder.chmod(0o777)
    assert another()
    folder.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "theirs")
    assert another()
    folder.unlink()
    folder.symlink_to(tmp_path / "nowhere")
    assert another() and not (tmp_path / "nowhere").exists()
    folder.unlink()
    folder.write_text("")
    assert another()
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # for whom we are the other user
    folder = tmp_path / "minigpt4-12345"
    folder.mkdir(mode=0o700)
    assert another()


def test_unknown_names():
    options = argparse.Namespace(model="gpt-5", quantize="auto", projection=None, device="cpu")
    with pytest.raises(UserError, match="vicuna-7b"):
        start.open_model(options)
    options.device = "tpu9"
    with pytest.raises(UserError, match="tpu9"):
        start.open_model(options)


def test_compiling_the_kernels_is_a_step_of_loading(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_build_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "_compiler", lambda: ["cc"])
    monkeypatch.setattr(build, "library", lambda: "compiled")
    monkeypatch.setattr(build, "_tried", set())
    auto, lines = ("auto", get_model("nano"), torch.device("cpu")), []
    assert start.quantize_of(*auto, lines.append) == "int4"
    assert lines == ["Compiling the CPU kernels (once) …"]
    german = SimpleNamespace(headers={"accept-language": "de"})
    assert translate_step(lines[0], german).startswith("Die Rechenkerne")
    build._place(tmp_path, "native").touch()
    start.quantize_of(*auto, lines.append)
    assert len(lines) == 1


FULL = "ld: final link failed: No space left on device"


@pytest.mark.parametrize(
    ("named", "found", "said"),
    [
        ("false", "", "“false”, which $CC names, failed (exit status 1), so nano runs"),
        ("", "exit 3", "The C compiler cc failed (exit status 3), so nano runs"),
        ("", f"echo {FULL} >&2; exit 1", f"The C compiler cc failed ({FULL}), so nano runs"),
        ("", "", "No C compiler was found, so nano runs"),
    ],
)
def test_a_compiler_that_fails(named, found, said, monkeypatch, capsys, tmp_path):
    """Or that is not there; what happened is said once."""
    if found:
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{found}\n")
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", named)
    monkeypatch.setenv(
        "PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}" if named else str(tmp_path)
    )
    monkeypatch.setattr(build, "_build_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(build, "must_compile", lambda: False)
    assert start.quantize_of("auto", get_model("nano"), torch.device("cpu")) == "none"
    lines = capsys.readouterr().err
    assert said in lines and lines.count("\n") == 1
    with pytest.raises(UserError, match="needs one"):
        start.quantize_of("int4", get_model("nano"), torch.device("cpu"))


@pytest.mark.skipif(build.library() is None, reason="no C compiler: install gcc")
@pytest.mark.parametrize("home", ["", "none", "closed"])
def test_kernels_without_a_compiler_or_a_folder(home, monkeypatch, tmp_path):
    """A build is used without the compiler; where none can be kept, nothing is left behind. That
    one is compiled is said once; where it cannot be written, a good one is used."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = tmp_path.with_suffix(".c")
    source.write_text("".join(f"void minigpt4_{name}(void) {{}}\n" for name in build._FUNCTIONS))
    monkeypatch.setattr(build, "_SOURCE", source)
    monkeypatch.setattr(build, "_build_folder", lambda: None if home == "none" else tmp_path)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "_tried", set())
    assert build.must_compile() and build.library.__wrapped__()
    assert not build.must_compile()
    assert len([*tmp_path.iterdir()]) == (home != "none")
    if home == "closed":
        monkeypatch.setattr(build, "_build_folder", lambda: None)
    monkeypatch.setattr(build, "_compiler", lambda: None)
    assert bool(build.library.__wrapped__()) == (home != "none")


def test_options_of_loading():
    """Python takes those that the command line has."""
    taken = [*signature(minigpt4.load).parameters]
    assert sorted(taken) == sorted(option.attribute for option in LOADING)


def test_servers_that_hang_are_one_sentence_and_the_engine_is_closed(monkeypatch):
    """A server that takes connections and never answers; the probe's own limit does not help."""
    from minigpt4.remote import engine as remote
    from minigpt4.remote.vllm import VllmServers

    async def hang(*_):
        await asyncio.sleep(60)

    closed = []
    close = remote.RemoteEngine.close
    monkeypatch.setattr(remote.RemoteEngine, "close", lambda self: closed.append(close(self)))
    monkeypatch.setattr(VllmServers, "probe_all", hang)
    monkeypatch.setattr(start, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(start, "PROBE_MARGIN", 0.1)
    model = SimpleNamespace(config=get_model("nano"), tokenizer=None, device=torch.device("cpu"))
    monkeypatch.setattr(start, "open_model", lambda options, report: model)
    options = argparse.Namespace(model="nano", quantize="auto", embeddings_mb=7)
    options.llm_url, options.llm_key = "http://127.0.0.1:9/v1", ""
    kept = []
    monkeypatch.setattr(start, "_embedding_store", lambda *given: kept.append(given))
    with pytest.raises(UserError, match="do not answer"):
        start.open_engine(options)
    assert kept == [(model, 7)] and len(closed) == 1 and options.quantize == "auto"


def test_the_type_reaches_the_loader(monkeypatch):
    given = []
    files = WeightFiles(Path("nowhere"), Path("nowhere"), None)
    monkeypatch.setattr(load, "find_weights", lambda config, given: files)
    monkeypatch.setattr(load, "download_weights", lambda config, report, given: None)
    monkeypatch.setattr(load, "load_model", lambda *arguments, **_: given.append(arguments[-1]))
    options = {"model": "nano", "quantize": "none", "device": "cpu"}
    start.open_model(argparse.Namespace(**options, dtype="float32"))
    assert given == ["float32"]
