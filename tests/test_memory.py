"""Memory that is free and needed, and the answer where a model does not fit."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_model import SIZES
from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.config import get_model
from minigpt4.engine import decoder as decoder_module
from minigpt4.engine.native import NativeDecoder
from minigpt4.errors import UserError, out_of_memory
from minigpt4.weights import memory
from minigpt4.weights.gguf import BlockLlama
from minigpt4.weights.load import WeightFiles
from tests.running import python

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "parity"
GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A file system of control groups; write(path, text)."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    read = memory._lines
    own = tmp_path / "own"
    own.write_text("")

    def lines(path: Path) -> list[str]:
        return read(own if str(path) == "/proc/self/cgroup" else path)

    monkeypatch.setattr(memory, "_lines", lines)
    monkeypatch.setattr(memory, "_machine", lambda: iter([64 * GB]))

    def write(name: str, text: str) -> None:
        place = own if name == "own" else tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    return write


def test_a_machine_without_limits(groups):
    assert memory.free_memory() == 64 * GB


def test_control_groups_of_version_2(groups):
    """The narrowest of a group and those that it is in; files' pages can be taken back."""
    groups("own", "0::/box/inner\n")
    groups("box/inner/memory.max", "max\n")
    groups("box/inner/memory.current", "5\n")
    groups("box/memory.max", f"{8 * GB}\n")
    groups("box/memory.current", f"{6 * GB}\n")
    groups("box/memory.stat", f"anon 7\ninactive_file {3 * GB}\n")
    assert memory.free_memory() == 5 * GB


def test_control_groups_of_version_1(groups):
    groups("own", "9:cpu,cpuacct:/a\n4:memory:/docker/x\n")
    groups("memory/docker/x/memory.limit_in_bytes", f"{2 * GB}\n")
    groups("memory/docker/x/memory.usage_in_bytes", f"{3 * GB}\n")
    groups("memory/memory.limit_in_bytes", "9223372036854771712\n")  # none
    groups("memory/memory.usage_in_bytes", "0\n")
    assert memory.free_memory() == 0


def test_a_limit_on_the_address_space():
    """In a program of its own; 1 GB of mapped files comes off."""
    code = (
        "import resource; from minigpt4.weights.memory import free_memory;"
        "resource.setrlimit(resource.RLIMIT_AS, (100 * 10**9, 100 * 10**9));"
        "resource.setrlimit(resource.RLIMIT_AS, (20 * 10**9, 20 * 10**9));"
        "from minigpt4.weights import memory; memory._machine = lambda: iter([]);"
        "memory._control_groups = lambda: iter([]);"
        "print(free_memory(), free_memory(10**9))"
    )
    free, beside = map(int, python("-c", code).stdout.split())
    assert 1 * GB < free < 20 * GB and abs(free - beside - GB) < 10**8


def test_what_a_7b_needs(tmp_path):
    """Of the published sizes, without its files: 2.2 GB for vision in 16 bit, 13.5 GB for the
    language model, and half of that in 8 bit, beside the matrix that is at work."""
    config = get_model("vicuna-7b")
    assert memory.vision_bytes(config, 2, 2) == pytest.approx(2.19 * GB, rel=0.02)
    assert memory.vision_bytes(get_model("nano"), 4, 4) < 0.1 * GB
    sizes = SIZES["vicuna-7b"]
    settings = {"model_type": "llama", "hidden_size": sizes["hidden"], "vocab_size": 32_001}
    settings |= {"num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"]}
    settings |= {"intermediate_size": sizes["inner"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for quantize, gigabytes in (("none", 13.5), ("int8", 13.5), ("w8a16", 6.74 + 1.05)):
        found = memory.llm_bytes(tmp_path, quantize, 2)
        assert found == pytest.approx(gigabytes * GB, rel=0.01), quantize


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vicuna-7b", (4096, 32, 11008)),
        ("llama2-7b", (4096, 32, 11008)),
        ("vicuna-13b", (5120, 40, 13824)),
    ],
)
def test_a_whole_cache_is_counted(name, sizes, tmp_path, monkeypatch):
    """All blocks that the engine's cache may have; what the tables say is what is asked for."""
    width, layers, inner = sizes
    written = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": layers}
    written |= {"num_attention_heads": layers, "intermediate_size": inner, "vocab_size": 32001}
    (tmp_path / "config.json").write_text(json.dumps(written | {"rms_norm_eps": 1e-6}))
    llama = SimpleNamespace(layers=layers, kv_heads=layers, head_dim=128)
    block_bytes = NativeDecoder.block_bytes(llama, 8)
    decoder = SimpleNamespace(block_bytes=lambda _, kv_bits: block_bytes if kv_bits == 8 else 0)
    monkeypatch.setattr("minigpt4.engine.native.NativeDecoder", decoder)
    monkeypatch.setattr(
        decoder_module, "_build_within_memory", lambda _, blocks, least: (0, blocks)
    )
    config = get_model(name)
    model = SimpleNamespace(
        config=config, llm=object.__new__(BlockLlama), device=torch.device("cpu")
    )
    blocks = decoder_module.build_decoder(model)[1]
    asked = config, tmp_path, "int4", torch.bfloat16
    assert memory.chat_bytes(*asked) == blocks * block_bytes
    free = int(config.cpu_gigabytes * GB)
    monkeypatch.setattr(memory, "free_memory", lambda mapped=0: free)
    memory.check_memory(*asked, torch.bfloat16)
    free -= 2 * 10**8
    with pytest.raises(UserError, match="of memory, and .* are free: choose “--model"):
        memory.check_memory(*asked, torch.bfloat16)


@pytest.mark.parametrize(
    ("free", "quantize", "expected"),
    [
        (7.5, "none", "“--quantize int4”, which needs 6.5 GB"),
        (3.0, "int4", "“--model mini”"),
        (0.1, "int4", "close other programs"),
    ],
)
def test_what_would_fit(monkeypatch, free, quantize, expected):
    monkeypatch.setattr(memory, "free_memory", lambda mapped=0: int(free * GB))
    case = CASES / "vicuna_qformer_a" / "llm"
    monkeypatch.setattr(memory, "llm_bytes", lambda *_: 13 * GB)
    config = get_model("vicuna-7b")
    with pytest.raises(UserError) as raised:
        memory.check_memory(config, case, quantize, torch.bfloat16, torch.bfloat16)
    sentence = str(raised.value)
    assert expected in sentence and f"{free:.1f} GB are free" in sentence.replace(
        "100.0 MB", "0.1 GB"
    )
    assert re.search(r"needs about 1[45]\.", sentence) and raised.value.kind == "memory"


def test_enough_memory_is_no_error(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda mapped=0: 8 * GB)
    case = CASES / "vicuna_qformer_a" / "llm"
    memory.check_memory(get_model("vicuna-7b"), case, "none", torch.float32, torch.bfloat16)
    monkeypatch.setattr(memory, "free_memory", lambda mapped=0: None)  # no Linux
    memory.check_memory(get_model("vicuna-7b"), case, "none", torch.float32, None)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory."),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_every_librarys_word_for_it(error, monkeypatch, capsys):
    """While a model loads, each ends in the same sentence; before and after, in a general one."""
    assert out_of_memory(error)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("minigpt4.weights.load.load_model", fail)
    config = get_model("nano")
    files = WeightFiles(Path("nowhere"), Path("nowhere"), None)
    with pytest.raises(UserError, match="nano does not fit into memory, and .* are free: "):
        start._load(config, files, torch.device("cpu"), "none", "auto", start.say, print)
    monkeypatch.setattr("minigpt4.__main__._convert", fail)
    assert main(["convert", "a.pth", "b.safetensors"]) == 2
    assert "\nminigpt4: There is too little memory: close" in f"\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "command",
    [
        ["ask", str(ROOT / "minigpt4/web/page/examples/coffee.jpg"), "What?", "--model", "nano"],
        ["train", "--stage", "1", "--data", "a"],
        ["evaluate", "a"],
        ["convert", "a.pth", "b.safetensors"],
        ["push", "a", "ann/b"],
        ["download", "nano"],
        ["serve"],
    ],
)
def test_a_limit_in_which_nothing_runs(command, monkeypatch, capsys):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (6 * 10**8, -1))
    monkeypatch.setattr("minigpt4.web.run.one_by_one", lambda _: pytest.fail("after imports"))
    assert main(command) == 2
    said = "minigpt4: The limit on memory (ulimit -v) is 600 MB, and no model runs in less than 1 "
    assert capsys.readouterr().err.startswith(said)


def test_other_errors_are_not_about_memory():
    assert not any(
        map(out_of_memory, (ValueError("out of memory"), OSError(2, "x"), RuntimeError()))
    )


# --- auto -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "free", "here", "name"),
    [
        (None, 32, {"vicuna-7b", "vicuna-13b"}, "vicuna-13b"),
        (None, 8, {"vicuna-7b", "vicuna-13b"}, "vicuna-7b"),
        (None, 32, set(), "mini"),  # nothing large is fetched unasked
        (None, 4, {"vicuna-7b"}, "mini"),
        (None, None, {"vicuna-7b"}, "mini"),
        (None, 0.1, set(), "nano"),
        (20, 64, set(), "vicuna-7b"),
        (6, 64, {"vicuna-7b"}, "vicuna-7b"),  # without the GPU
        (6, 64, set(), "mini"),
    ],
)
def test_auto(monkeypatch, gpu, free, here, name):
    monkeypatch.setattr(
        "minigpt4.weights.sources.missing",
        lambda model, given: [] if model.name in here else ["llm"],
    )
    config, why = start.choose(gpu and gpu * GB, None if free is None else int(free * GB))
    assert config.name == name and why


def test_a_small_model_is_chosen_from_its_memory_on():
    assert start.choose(None, int(2.1 * GB))[0].name == "mini"
    assert start.choose(None, int(1.9 * GB))[0].name == "nano"
