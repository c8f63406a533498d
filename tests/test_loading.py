"""Loading a model, at tiny sizes: its progress, quiet libraries, and 16-bit files that are gone."""

import argparse
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4 import config as configs
from minigpt4 import start
from minigpt4.config import ModelConfig, get_model
from minigpt4.conversation import Conversation, ask, read_ahead
from minigpt4.engine import Sampling
from minigpt4.engine.kernels.build import library
from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.native import quantize
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.weights import transfer
from minigpt4.weights.convert import make_blocks
from minigpt4.weights.encoder import make_int8
from minigpt4.weights.gguf import INDEX
from minigpt4.weights.load import find_weights, load_model
from tests.parity_case import ParityCase
from tests.running import python
from tests.test_convert import quiet

ROOT = Path(__file__).parent.parent
CASE = ROOT / "tests" / "parity" / "vicuna_qformer_a"

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")


def tiny_config() -> ModelConfig:
    """vicuna-7b at the case's sizes."""
    published = configs.get_model("vicuna-7b")
    sizes = ParityCase(CASE).config
    return replace(
        published,
        vision=sizes.vision,
        bridge=sizes.bridge,
        llm_hidden_size=sizes.llm_hidden_size,
        llm_vocabulary=0,
    )


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """A weights folder with a tiny vicuna-7b."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"):
        (folder / name).symlink_to(CASE / name)
    (folder / "prerained_minigpt4_7b.pth").symlink_to(CASE / "pretrained_minigpt4.pth")
    shutil.copytree(CASE / "llm", folder / "vicuna-7b-llm")
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(folder))
    monkeypatch.setitem(configs.MODELS, "vicuna-7b", tiny_config())
    return folder


def options(**changes) -> argparse.Namespace:
    values = {"model": "vicuna-7b", "quantize": "auto", "device": "cpu", "llm_url": None}
    values |= {"embeddings_mb": 0}
    return argparse.Namespace(**values | changes)


def answer(said: list[tuple[str, bool]] | None = None, **changes) -> str:
    """Of the model that these options name, to a question about a picture."""

    def report(line: str, passing: bool = False) -> None:
        if said is not None:
            said.append((line, passing))

    engine = start.open_engine(options(**changes), report, 8)
    try:
        conversation = Conversation()
        picture = image.load(ParityCase(CASE).image_paths[0])
        conversation.add_question("What is this?", [picture])
        return "".join(ask(engine, conversation, Sampling(temperature=0, max_new_tokens=8)))
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["none", "int8", "w8a16", "int4"])
def test_progress(weights, monkeypatch, kind):
    """Bytes of bytes from nothing to everything, whoever reads the weights."""
    monkeypatch.setattr(transfer, "LINE_SECONDS", 1e6)  # a busy machine's other lines
    monkeypatch.setattr(transfer, "PASSING_SECONDS", 0.0)
    said: list[tuple[str, bool]] = []
    assert answer(said, quantize=kind)
    assert [line for line, passing in said if not passing][-1] == "Loading vicuna-7b …"
    steps = [line for line, passing in said if passing and line.startswith("Loading vicuna-7b: ")]
    shares = [int(line.split(", ")[1].removesuffix(" %")) for line in steps]
    assert len(shares) > 20 and shares == sorted(shares) and shares[-1] == 100
    assert " MB of " in steps[0]


def test_without_the_16_bit_files(weights, monkeypatch):
    """A converted model works on; “auto” finds it; what needs these files says that they are
    gone."""
    said: list[tuple[str, bool]] = []
    expected = answer(said)
    advice = next(line for line, _ in said if "rm " in line)
    assert subprocess.run("rm " + advice.partition("rm ")[2], shell=True).returncode == 0
    assert not [*weights.glob("vicuna-7b-llm/*.safetensors")]
    said.clear()
    assert answer(said) == expected and not any("Converting" in line for line, _ in said)
    monkeypatch.setattr("minigpt4.weights.memory.free_memory", lambda mapped=0: 8 * 10**9)
    said.clear()
    assert answer(said, model="auto") == expected
    assert said[0][0].startswith("Model: vicuna-7b, because")
    with pytest.raises(UserError, match="its 16-bit files were deleted"):
        answer(quantize="none")


def test_a_users_own_folder_without_its_16_bit_files(weights, tmp_path):
    own = Path(shutil.move(weights / "vicuna-7b-llm", tmp_path / "my [model]"))
    expected = answer(llm=str(own))
    (own / "model.safetensors").touch()  # another version, which is converted anew
    assert answer(llm=str(own)) == expected
    made = {path.parent for path in weights.glob(f"*/{INDEX}")}
    assert len(made) == 2
    (own / "model.safetensors").unlink()
    assert answer(llm=str(own)) == expected
    assert {path.parent for path in weights.glob(f"*/{INDEX}")} == made


RUN = """
import sys
from minigpt4 import config
from minigpt4.__main__ import main
from minigpt4.weights import transfer
from tests.test_loading import CASE, ParityCase, tiny_config
config.MODELS["vicuna-7b"] = tiny_config()
transfer.LINE_SECONDS = 1e6  # on a busy machine there are more lines
for quantize in sys.argv[1:]:
    picture = str(ParityCase(CASE).image_paths[0])
    main(["ask", picture, "What is this?", "--model", "vicuna-7b", "--device", "cpu"]
         + ["--quantize", quantize, "--max-new-tokens", "4", "--temperature", "0"])
"""


def test_libraries_are_quiet(weights):
    """Only this program's own lines reach the terminal, whatever reads and runs the model."""
    kinds = ["none", "int8", "int4"]
    done = python("-c", RUN, *kinds, PYTHONPATH=str(ROOT))
    assert len(done.stdout.splitlines()) == len(kinds)
    own = "Loading vicuna-7b …", "Converting ", "The 4-bit model ", "Compiling "
    assert [line for line in done.stderr.splitlines() if not line.startswith(own)] == []


# --- what damaged files end in --------------------------------------------------------------------


def change(place: Path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(place.read_text()) | changes
    place.write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )


def index_with(**sizes) -> Callable[[Path], None]:
    def damage(blocks: Path) -> None:
        found = json.loads((blocks / INDEX).read_text())["sizes"]
        change(blocks / INDEX, sizes=found | sizes)

    return damage


def tensor_with(place: int, value: object) -> Callable[[Path], None]:
    """Another kind, shape or offset of a tensor in the index."""

    def damage(blocks: Path) -> None:
        tensors = json.loads((blocks / INDEX).read_text())["tensors"]
        tensors["blk.1.ffn_up.weight"][place] = value
        change(blocks / INDEX, tensors=tensors)

    return damage


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob(name)
        os.truncate(file, int(keep * file.stat().st_size))

    return damage


def refusal(**places: str) -> str:
    with pytest.raises(UserError) as raised:
        answer(**places)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        index_with(layers=2**40),
        index_with(layers=2**24),
        index_with(heads=0),
        index_with(head_dim=-2),
        index_with(hidden_size=2**31),
        index_with(vocabulary="many"),
        index_with(norm_eps=float("nan")),
        index_with(color="red"),
        tensor_with(0, "Q3_K"),
        tensor_with(1, [2**20, 2**20]),
        tensor_with(1, [64, -64]),
        tensor_with(1, "64"),
        tensor_with(2, -32),
        tensor_with(2, 2**63),
        tensor_with(2, 1.5),
        lambda blocks: change(blocks / INDEX, file="../../vicuna-7b-llm/config.json"),
        lambda blocks: change(blocks / INDEX, tensors=[]),
        lambda blocks: (blocks / INDEX).write_text("[" * 100_000),
        lambda blocks: (blocks / INDEX).write_bytes(b"\xff\xfe"),
        cut("*.gguf", 0.7),
        cut("*.gguf", 0),
        cut("tokenizer.json", 0.5),
        cut("tokenizer_config.json", 0.5),
    ],
)
def test_damaged_blocks(converted, damage):
    damage(converted / "vicuna-7b-llm" / "int4")
    assert "4-bit" in refusal()


@pytest.fixture
def converted(weights) -> Path:
    config = configs.get_model("vicuna-7b")
    make_blocks(config, weights / "vicuna-7b-llm", quantize, 1, quiet)
    return weights


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**40},
        {"num_hidden_layers": 2**20},
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_attention_heads": 3},
        {"hidden_size": "64"},
        {"vocab_size": 2**40},
        {"vocab_size": None},
        {"intermediate_size": 1.5},
        {"rope_theta": "hot"},
        {"rms_norm_eps": -1},
        {"model_type": ["llama"]},
    ],
)
def test_absurd_configurations(weights, changes):
    change(weights / "vicuna-7b-llm" / "config.json", **changes)
    assert "vicuna-7b-llm" in refusal()


@pytest.mark.parametrize(
    "damage",
    [
        cut("model.safetensors", 0.5),
        cut("model.safetensors", 0),
        cut("config.json", 0.5),
        lambda llm: (llm / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}" * 99),
        lambda llm: save_index(llm, {"weight_map": ["model.safetensors"]}),
        lambda llm: save_index(llm, {"weight_map": {"a": ["model.safetensors"]}}),
        lambda llm: save_index(llm, {"weight_map": {"a": "elsewhere.safetensors"}}),
        lambda llm: save_index(llm, []),
    ],
)
def test_damaged_16_bit_files(weights, damage):
    damage(weights / "vicuna-7b-llm")
    assert "vicuna-7b-llm" in refusal()


def save_index(llm: Path, content: object) -> None:
    (llm / "model.safetensors").unlink()
    (llm / "model.safetensors.index.json").write_text(json.dumps(content))


def vision_with(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Other tensors in EVA's file; "." is written "__"."""

    def damage(weights: Path) -> None:
        state = torch.load(weights / "eva_vit_g.pth", weights_only=True)
        (weights / "eva_vit_g.pth").unlink()
        state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        torch.save(state, weights / "eva_vit_g.pth")

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        vision_with(pos_embed=torch.zeros(1, 1, 8)),
        vision_with(pos_embed=torch.zeros(3, 17, 8)),
        vision_with(pos_embed=torch.zeros(())),
        vision_with(blocks__0__attn__q_bias=torch.zeros(())),
        vision_with(blocks__0__attn__q_bias=torch.zeros(1).expand(2**40)),
        vision_with(cls_token=torch.zeros(2, 2).to_sparse()),
        vision_with(cls_token=torch.zeros(1, 1, 8, dtype=torch.complex64)),
    ],
)
def test_damaged_vision(converted, damage):
    damage(converted)
    assert "eva_vit_g.pth" in refusal()


@pytest.mark.parametrize("place", [4, 8, 16, 24, 40, 100, 400])
@pytest.mark.parametrize("value", [0, 0xFF, 2**31, 2**62])
def test_damaged_gguf_files(converted, tmp_path, place, value):
    """Eight bytes of the header replaced: counts, lengths and kinds of whatever lies there."""
    (blocks,) = (converted / "vicuna-7b-llm" / "int4").glob("*.gguf")
    own = Path(shutil.copy(blocks, tmp_path / "own.gguf"))
    with own.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<Q", value))
    assert "own.gguf" in refusal(llm=str(own))


# --- the encoder in int8 --------------------------------------------------------------------------


def test_the_encoder_in_int8(weights, monkeypatch):
    """Near the original's features, in a file of a byte a weight that is made once and again where
    the original changes."""
    config = configs.get_model("vicuna-7b")
    files = find_weights(config)
    small = replace(files, vision=make_int8(config.vision, files.vision, quiet))
    assert small.vision.parent == weights and not [*weights.glob("*.part")]
    before = small.vision.stat().st_mtime_ns
    assert make_int8(config.vision, files.vision, quiet) == small.vision
    assert make_int8(config.vision, small.vision, quiet) == small.vision
    assert small.vision.stat().st_mtime_ns == before
    picture = image.load(ParityCase(CASE).image_paths[0]).rgb
    for dtype in (torch.float32, torch.bfloat16):
        full, ours = (
            load_model(config, chosen, vision_dtype=dtype).encode_pictures([picture])[0].embeds
            for chosen in (files, small)
        )
        assert np.linalg.norm(ours - full) < 0.02 * np.linalg.norm(full)
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(weights / "other"))
    (weights / "other").mkdir()
    changed = Path(shutil.copy(CASE / "eva_vit_g.pth", weights / "other" / "eva_vit_g.pth"))
    assert make_int8(config.vision, changed, quiet).name != small.vision.name


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_damaged_encoder_in_int8(converted, keep):
    expected = answer()
    cut("*-int8.safetensors", keep)(converted)
    with pytest.raises(UserError, match="will be made again at the next start"):
        answer()
    next(converted.glob("*-int8.safetensors")).unlink()
    assert answer() == expected


def test_what_comes_before_the_question_is_read_ahead(converted):
    """Nothing but the question's own text is left to read when it is sent."""
    pictures = [image.load(path) for path in ParityCase(CASE).image_paths[:1]]
    engine = start.open_engine(options(), quiet, 8)
    read_ahead(engine, Conversation(), pictures)
    conversation = Conversation.asking("What is this?", pictures)
    stream = ask(engine, conversation, Sampling(temperature=0, max_new_tokens=8))
    ours = "".join(stream)
    left = stream.stats.prompt_tokens - stream.stats.reused_tokens
    engine.close()
    tokens = engine.model.tokenizer.encode("</Img> What is this?###Assistant:")
    assert left < len(tokens) + BLOCK_SIZE
    assert ours == answer()  # without a head start


VIT = (
    "EvaViT(image_size=224, pretrain_image_size=224, patch_size=14, hidden_size=1408, "
    "layers=39, heads=16, intermediate_size=6144, layer_norm_eps=1e-06, ln_vision_eps=1e-05)"
)
LITE = (
    "EfficientNetLite(name='efficientnet-lite2', image_size=260, hidden_size=1280, "
    "blocks=((6, 48), (14, 120), (20, 352)), classes=1000)"
)
QFORMER = (
    "QFormer(hidden_size=768, layers=12, heads=12, intermediate_size=3072, query_tokens=32, "
    "cross_attention_frequency=2, layer_norm_eps=1e-12)"
)
BOTH = (
    f"ClassesAndObjects(classifier={LITE}, "
    "detector=CenterNet(image_size=320, hidden_size=480, classes=80))"
)


@pytest.mark.parametrize(
    ("name", "vision", "bridge"),
    [
        ("vicuna-7b", VIT, QFORMER),
        ("llama2-7b", VIT, "ConcatPatches(group=4)"),
        ("nano", LITE, "PooledMap(grid=5)"),
        ("mini", BOTH, "PooledMap(grid=5)"),
    ],
)
def test_names_of_kept_files_stay(name, vision, bridge):
    """They are made of the parts' reprs: int8 encoders, stored embeddings, cached features."""
    assert repr(get_model(name).vision) == vision and repr(get_model(name).bridge) == bridge
