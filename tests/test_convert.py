"""Hugging Face folders converted to 4-bit blocks, users' own GGUF files, and their quality."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize as gguf_quantize
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import random_model
from minigpt4.config import get_model
from minigpt4.engine import Engine, Request, Sampling
from minigpt4.engine.kernels.build import library
from minigpt4.engine.native import NativeDecoder, quantize
from minigpt4.errors import UserError
from minigpt4.model.prompt import Prompt
from minigpt4.model.text import JsonTokenizer
from minigpt4.weights import convert
from minigpt4.weights.gguf import INDEX, BlockLlama, BlockTensor
from minigpt4.weights.llm import load_llm
from minigpt4.weights.tokenizer import PROBES
from tests.block_llama import as_transformers
from tests.parity_case import ParityCase
from tests.random_blocks import block_llama
from tests.test_blocks import runs_here
from tests.test_decoder import whole
from tests.test_gguf import write_gguf

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")

CASES = Path(__file__).parent / "parity"
CONFIG = replace(get_model("vicuna-7b"), llm_hidden_size=64)


def quiet(line: str, passing: bool = False) -> None:
    pass


@pytest.fixture
def case() -> ParityCase:
    return ParityCase(CASES / "vicuna_qformer_a")


@pytest.fixture
def folder(weights, case) -> Path:
    """A language model's folder in the weights folder."""
    return Path(shutil.copytree(case.folder / "llm", weights / "tiny-llm"))


# --- quality --------------------------------------------------------------------------------------


def relative_error(kind: str, numbers: np.ndarray, blocks: np.ndarray) -> float:
    found = BlockTensor(kind, numbers.shape, blocks).numbers()
    return float(np.linalg.norm(found - numbers) / np.linalg.norm(numbers))


def normal_numbers() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (64, 1024)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "most"), [("Q4_1", 0.071), ("Q4_K", 0.0712), ("Q6_K", 0.0176), ("Q8_0", 0.0055)]
)
def test_errors_are_below_those_of_llama_cpp(kind, most):
    """Normal numbers; llama.cpp's own quantizer: 0.078, 0.0714, 0.0178, 0.0054."""
    assert relative_error(kind, normal_numbers(), quantize(kind, normal_numbers())) < most


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_never_worse_than_plain_rounding(kind):
    draw = np.random.default_rng(1)
    heavy = draw.standard_t(3, (64, 1024)).astype(np.float32)
    for numbers in (normal_numbers(), heavy, np.abs(heavy), -1 - np.abs(heavy)):
        plain = gguf_quantize(numbers, GGMLQuantizationType[kind])
        found = relative_error(kind, numbers, quantize(kind, numbers))
        assert found < 1.02 * relative_error(kind, numbers, plain)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K", "Q8_0"])
def test_unusual_numbers(kind):
    flat = np.zeros((4, 512), np.float32)
    assert not BlockTensor(kind, flat.shape, quantize(kind, flat)).numbers().any()
    flat[0], flat[1], flat[2, 7], flat[3] = 0.5, -0.25, 3.0, np.linspace(-1, 1, 512)
    found = BlockTensor(kind, flat.shape, quantize(kind, flat)).numbers()
    np.testing.assert_allclose(found, flat, atol=0.06)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("variant", ["avx2", "plain"])
def test_other_processors_write_as_good_blocks(kind, variant):
    if library(variant) is None or not runs_here(variant):
        pytest.skip(f"{variant}: not on this processor")
    expected = relative_error(kind, normal_numbers(), quantize(kind, normal_numbers()))
    found = relative_error(kind, normal_numbers(), quantize(kind, normal_numbers(), variant))
    assert abs(found - expected) < 1e-4


def test_kinds_that_are_not_written():
    with pytest.raises(ValueError, match="Q5_0 is not written"):
        quantize("Q5_0", normal_numbers())
    with pytest.raises(ValueError, match="rows of 96"):
        quantize("Q4_K", np.zeros((1, 96), np.float32))


def test_kinds_of_a_7b():
    def kind(name: str) -> str:
        return convert.kind_of(name, (4096, 4096), 32)

    assert kind("output.weight") == kind("token_embd.weight") == "Q6_K"
    assert kind("blk.0.attn_v.weight") == kind("blk.31.ffn_down.weight") == "Q6_K"
    assert kind("blk.4.attn_v.weight") == kind("blk.0.attn_q.weight") == "Q4_K"
    assert convert.kind_of("blk.0.attn_q.weight", (64, 96), 32) == "Q4_1"
    assert convert.kind_of("blk.0.attn_q.weight", (64, 48), 32) == "F16"
    assert convert.kind_of("output_norm.weight", (4096,), 32) == "F32"


# --- conversion -----------------------------------------------------------------------------------


def logits_of(folder: Path, ids: np.ndarray) -> np.ndarray:
    decoder = NativeDecoder(BlockLlama.open(folder), 64, 4, 1)
    return whole(decoder, ids, [0, 1, 2])


def expected_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.mark.parametrize("name", ["vicuna_qformer_a", "llama2_patch_concat"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_the_same_model(weights, monkeypatch, name, form):
    """With 16-bit floats instead of blocks: order of the rows, names, norms, every form of file."""
    monkeypatch.setattr(
        convert, "kind_of", lambda name, shape, layers: "F32" if len(shape) == 1 else "F16"
    )
    folder = Path(shutil.copytree(CASES / name / "llm", weights / "tiny-llm"))
    ids = np.random.default_rng(0).integers(0, 1000, 40)
    expected = expected_logits(folder, ids)
    if form != "safetensors":
        save_bins(folder, 1 if form == "bin" else 3)
    target = convert.make_blocks(CONFIG, folder, quantize, 2, quiet)
    off = logits_of(target, ids) - expected
    assert np.linalg.norm(off) < 0.01 * np.linalg.norm(expected)


def save_bins(folder: Path, count: int) -> None:
    """The folder's weights as .bin files, in `count` shards."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    (folder / "model.safetensors").unlink()
    if count == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {}
    for i in range(count):
        name = f"pytorch_model-{i + 1:05}-of-{count:05}.bin"
        part = dict(list(state.items())[i::count])
        torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = json.dumps({"weight_map": places})
    (folder / "pytorch_model.bin.index.json").write_text(index)


def test_in_4_bit(folder):
    """Every weight is near the original, the kernels' logits are PyTorch's with these weights, and
    the blocks are kept from then on."""
    said = []
    config = CONFIG
    target = convert.make_blocks(
        config, folder, quantize, 2, lambda s, passing=False: said.append(s)
    )
    assert target == folder / "int4" == convert.blocks_folder(folder)
    assert any("rm " in line and "model*.safetensors" in line for line in said)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    in_blocks = as_transformers(BlockLlama.open(target))
    for name, weight in in_blocks.state_dict().items():
        expected = original.state_dict()[name]
        assert (weight - expected).norm() < 0.08 * expected.norm(), name
    ids = np.random.default_rng(0).integers(0, 1000, 40)
    with torch.inference_mode():
        logits = in_blocks(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.linalg.norm(logits_of(target, ids) - logits) < 0.01 * np.linalg.norm(logits)
    (folder / "model.safetensors").unlink()  # as the message allows
    assert convert.make_blocks(config, folder, quantize, 2, quiet) == target
    assert not (folder.parent / ".parts").exists()


def test_a_users_own_folder_stays_as_it_is(weights, tmp_path, case):
    folder = Path(shutil.copytree(case.folder / "llm", tmp_path / "mine"))
    before = sorted(path.name for path in folder.iterdir())
    config = CONFIG
    target = convert.make_blocks(config, folder, quantize, 1, quiet)
    assert target.parent == weights.resolve() and (target / INDEX).exists()
    assert sorted(path.name for path in folder.iterdir()) == before
    (folder / "model.safetensors").touch()  # another version
    assert convert.blocks_folder(folder) != target


def test_links_into_the_hubs_cache(weights, tmp_path, case):
    """The message names the files that take the space; without them the folder works on."""
    folder = Path(shutil.copytree(case.folder / "llm", tmp_path / "snapshot"))
    blob = tmp_path / "b 1"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    said: list[str] = []
    target = convert.make_blocks(
        CONFIG, folder, quantize, 1, lambda line, passing=False: said.append(line)
    )
    assert said[-1].endswith(f": rm '{blob}'")
    blob.unlink()
    assert convert.blocks_folder(folder) == target


@pytest.mark.parametrize("quantize_to", ["int4", "none", "w8a16", "remote"])
def test_another_vocabulary_is_told_at_every_start(folder, case, caplog, quantize_to):
    config = replace(case.config, llm_vocabulary=32_001)
    place = folder
    if quantize_to == "int4":
        place = convert.make_blocks(config, folder, quantize, 1, quiet)
    for _ in range(2):
        caplog.clear()
        load_llm(config, place, torch.device("cpu"), quantize_to, "float32")
        assert caplog.text.count("has a vocabulary of 1,000 tokens, but vicuna_qformer_a's") == 1


def test_texts_become_the_same_tokens(folder):
    target = convert.make_blocks(CONFIG, folder, quantize, 1, quiet)
    ours, theirs = JsonTokenizer(target), AutoTokenizer.from_pretrained(folder)
    for text in ("###Human: <Img>", "</Img> What is this?###Assistant: ", " a  b\n", "<s>é 猫", ""):
        expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("given", [None, {}, {"tokenizer_class": "LLaMATokenizer"}])
def test_tokenizers_of_2023_become_the_same_tokens(folder, given):
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    if given is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(given))
    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    target = convert.make_blocks(CONFIG, folder, quantize, 1, quiet)
    for text in (*PROBES, "###Human: Describe it.", "###Assistant: Ünïcode"):
        assert JsonTokenizer(target).encode(text) == pieces.encode(text), text


@pytest.mark.parametrize("what", ["nan", "missing", "shape", "delta", "width", "rope", "kind"])
def test_what_cannot_be_converted(folder, what, monkeypatch):
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    settings = json.loads((folder / "config.json").read_text())
    match what:
        case "nan":
            state["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
        case "missing":
            del state["model.layers.1.mlp.up_proj.weight"]
        case "shape":
            settings["intermediate_size"] += 32
        case "delta":
            state["model.embed_tokens.weight"] *= 0.001 / state["model.embed_tokens.weight"].std()
            state["model.norm.weight"].zero_()
        case "rope":
            settings["rope_scaling"] = {"type": "linear", "factor": 2.0}
        case "kind":
            settings["model_type"] = "mistral"
    if what in ("delta", "width"):
        monkeypatch.delattr(convert, "_write")  # it is refused minutes before that
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    words = {"delta": "delta weights", "width": "of width 64, but vicuna-7b needs 4096"}
    config = get_model("vicuna-7b") if what == "width" else CONFIG
    with pytest.raises(UserError, match=words.get(what, "cannot be converted to 4 bit")):
        convert.make_blocks(config, folder, quantize, 1, quiet)
    assert not (folder / "int4").exists() and not (folder.parent / ".parts").exists()


def test_a_full_disk_is_known_before(folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="make room"):
        convert.make_blocks(CONFIG, folder, quantize, 1, quiet)


def test_a_damaged_file_is_never_used(folder):
    target = convert.make_blocks(CONFIG, folder, quantize, 1, quiet)
    index = json.loads((target / INDEX).read_text())
    offset = index["tensors"]["blk.1.ffn_up.weight"][2]
    with (target / index["file"]).open("r+b") as file:
        file.seek(offset + 30)
        old = file.read(1)
        file.seek(offset + 30)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        NativeDecoder(BlockLlama.open(target), 64, 4, 1)


def test_a_folder_that_cannot_be_written(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(UserError, match="MINIGPT4_WEIGHTS"):
        convert.make_blocks(CONFIG, folder, quantize, 1, quiet)


# --- a user's own GGUF file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            lambda content: content[:-100],
            r"own.gguf is cut short or damaged \([\d,]+ bytes\): delete it",
        ),
        (lambda content: content[:20], "is cut short or damaged"),
        (lambda content: b"", "is cut short or damaged"),
        (lambda content: content[:4] + b"\1" + content[5:], "not of version 2 or 3"),
        (lambda content: content[:4] + b"\0\0\0\3" + content[8:], "big-endian"),
        (lambda content: b"\0" + content[1:], "does not begin with “GGUF”.*model's folder"),
        (lambda content: content.replace(b"llama.block_", b"llama.black_"), "count is missing"),
        (lambda content: content.replace(b"llama", b"mamba"), "mamba"),
    ],
)
def test_an_unreadable_gguf_file(weights, tmp_path, changed, words):
    path = tmp_path / "own.gguf"
    write_gguf(path, block_llama(), "llama")
    path.write_bytes(changed(path.read_bytes()))
    with pytest.raises(UserError, match=words) as raised:
        convert.make_blocks(CONFIG, path, quantize, 1, quiet)
    assert ".parts" not in str(raised.value)


def test_a_random_model_of_a_published_size_answers(monkeypatch, tmp_path):
    """What `benchmarks.chat --weights random` measures; the kinds of blocks are those of
    converted weights."""
    small = {"hidden": 512, "layers": 8, "heads": 4, "inner": 768, "vocabulary": 401}
    monkeypatch.setitem(random_model.SIZES, "vicuna-7b", small)
    monkeypatch.setattr(random_model, "POOL", 2**14)
    path = random_model.write("vicuna-7b", 2, tmp_path)
    llama = BlockLlama.open(tmp_path)
    assert (llama.layers, llama.vocabulary, llama.head_dim) == (2, 401, 128)
    for name, tensor in llama.tensors.items():
        assert tensor.kind == convert.kind_of(name, tensor.shape, 2), name
    sampling = Sampling(temperature=0, max_new_tokens=3)
    prompt = Prompt([1, 5, 300], [1, 5, 300], [], [False] * 3)
    with Engine(random_model.open_model("vicuna-7b", path)) as engine:
        assert len(list(engine.submit(Request(prompt, {}, sampling)))) == 3
