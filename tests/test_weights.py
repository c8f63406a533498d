"""Weight files that are missing, cut, of another kind or model end in one clear sentence."""

import errno
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.__main__ import main
from minigpt4.config import MODELS, get_model, model_of_projection
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.bridge import build_bridge
from minigpt4.weights import llm, sources
from minigpt4.weights.checkpoint import (
    check_projection,
    load_strict,
    read_checkpoint,
    read_projection,
    tensors_of,
)
from minigpt4.weights.encoder import load_int8_encoder
from minigpt4.weights.gguf import INDEX
from minigpt4.weights.llm import choose_dtype, load_llm
from minigpt4.weights.load import find_weights, load_model, refuse_unloaded
from tests.parity_case import ParityCase
from tests.running import python

PARITY = Path(__file__).parent / "parity"


@pytest.fixture
def case(tmp_path):
    """A parity case in a folder of its own, to be damaged."""
    folder = tmp_path / "case"
    shutil.copytree(PARITY / "vicuna_qformer_a", folder)
    return ParityCase(folder)


def complaint(case, **options) -> str:
    """The sentence that loading ends in."""
    with pytest.raises(UserError) as caught:
        case.load(**options)
    text = str(caught.value)
    assert "\n" not in text and "0x" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    "name", ["eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4.pth"]
)
@pytest.mark.trust("Faults", "weights that are missing, cut, of the wrong shape or malicious")
def test_missing_and_cut_files(case, name):
    path = case.folder / name
    content = path.read_bytes()
    path.unlink()
    assert name in complaint(case)
    for size in (0, 10, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:size])
        said = complaint(case)
        assert name in said and "delete it, then fetch it again" in said
    path.write_text("<html>404 not found</html>")
    assert name in complaint(case)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_another_user_is_not_called_damaged(tmp_path, monkeypatch, suffix):
    """Every reader opens it by itself, and safetensors calls it missing."""
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"")

    def refuse(name, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))

    monkeypatch.setattr("builtins.open", refuse)
    large = get_model("vicuna-7b")
    for read in (
        read_checkpoint,
        lambda path: [*tensors_of(path, ("",))],
        lambda path: load_int8_encoder(large.vision, path, {}, torch.float32),
        lambda path: load_llm(large, path.parent, torch.device("cpu"), "int4"),
    ):
        with pytest.raises(UserError, match=r"\(Permission denied\): change its permissions"):
            read(path)


@pytest.mark.trust("Faults", "weights that are missing, cut, of the wrong shape or malicious")
def test_a_malicious_pickle_is_not_run(case, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "owned").touch, ())

    path = case.folder / "pretrained_minigpt4.pth"
    path.write_bytes(pickle.dumps({"model": Evil()}))
    assert path.name in complaint(case)
    torch.save({"model": Evil()}, path)
    assert path.name in complaint(case)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("eva_vit_g.pth", "blocks.1.mlp.fc1.weight"),
        ("eva_vit_g.pth", "blocks.0.attn.q_bias"),
        ("eva_vit_g.pth", "pos_embed"),
        ("blip2_pretrained_flant5xxl.pth", "query_tokens"),
        ("blip2_pretrained_flant5xxl.pth", "ln_vision.weight"),
        (
            "blip2_pretrained_flant5xxl.pth",
            "Qformer.bert.encoder.layer.0.crossattention.self.key.weight",
        ),
        ("pretrained_minigpt4.pth", "llama_proj.bias"),
    ],
)
@pytest.mark.trust("Faults", "weights that are missing, cut, of the wrong shape or malicious")
def test_a_tensor_missing_or_of_another_shape(case, name, tensor):
    path = case.folder / name
    state = torch.load(path, weights_only=True)
    tensors = state.get("model", state)
    kept = tensors.pop(tensor)
    torch.save(state, path)
    complaint(case)
    tensors[tensor] = torch.cat([kept, kept])
    torch.save(state, path)
    complaint(case)


def test_a_language_model_that_is_incomplete(case):
    path = case.folder / "llm" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    assert "up_proj" in complaint(case)
    path.write_bytes(path.read_bytes()[:1000])
    complaint(case)
    shutil.rmtree(case.folder / "llm")
    assert "config.json is missing): move it away and fetch" in complaint(case)


@pytest.mark.parametrize("owner", ["vicuna-13b", "llama2-7b", "nano"])
def test_another_models_projection_is_named(owner, tmp_path):
    config = get_model(owner)
    path = tmp_path / "projection.pth"
    weight = torch.ones(config.llm_hidden_size, config.projection_in)
    bias = torch.zeros(config.llm_hidden_size)
    torch.save({"model": {"llama_proj.weight": weight, "llama_proj.bias": bias}}, path)
    with pytest.raises(UserError, match=owner):
        check_projection(read_projection(path), get_model("vicuna-7b"), path)


def test_every_parameter_is_loaded(case):
    """Nothing is left on the meta device or at a random value."""
    one, two = case.load(llm_dtype=torch.float32), case.load(llm_dtype=torch.float32)
    assert not any(p.is_meta for p in one.parameters())
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_convert_keeps_what_loading_needs(case, capsys):
    out = case.folder / "projection.safetensors"
    assert main(["convert", str(case.folder / "pretrained_minigpt4.pth"), str(out)]) == 0
    assert out.stat().st_size < (case.folder / "pretrained_minigpt4.pth").stat().st_size * 2
    before = case.load(llm_dtype=torch.float32).projection.weight
    files = replace(case.files, projection=out)
    after = load_model(case.config, files, llm_dtype=torch.float32).projection.weight
    torch.testing.assert_close(before, after)
    assert "64" in capsys.readouterr().out
    assert main(["convert", "missing.pth", str(out)]) == 2
    assert "There is no weight file" in capsys.readouterr().err


def test_convert_of_the_llama2_file_keeps_ln_vision(tmp_path):
    out = tmp_path / "projection.safetensors"
    source = PARITY / "llama2_patch_concat" / "pretrained_minigpt4.pth"
    assert main(["convert", str(source), str(out)]) == 0
    assert "ln_vision.weight" in load_file(out)


def test_int8_language_model(case):
    """bitsandbytes for real on the CPU: only the language model changes, and only a little.

    (nf4 packs rows of multiples of 64, which these tiny ones are not: tests/test_nano.py has it.)
    """
    plain, small = case.load(llm_dtype=torch.float32), case.load(quantize="int8")
    assert "Linear8bitLt" in {type(m).__name__ for m in small.llm.modules()}
    assert not any("bit" in type(m).__name__ for m in small.encoder.modules())
    torch.testing.assert_close(small.projection.weight, plain.projection.weight)
    ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        exact = plain.llm(input_ids=ids).logits.float()
        rough = small.llm(input_ids=ids).logits.float()
    assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.99


# --- never an answer with weights that were not loaded ------------------------------------------


def test_nano_without_its_projection_is_refused(monkeypatch, tmp_path):
    """It comes with the package, so there is no source to fetch it from."""
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(sources, "WEIGHTS", tmp_path)
    with pytest.raises(UserError, match=r"nano.safetensors\) is missing from this installation"):
        find_weights(get_model("nano"))


def test_a_new_projection_is_for_training_alone(case):
    files = replace(case.files, projection=None)
    with pytest.raises(UserError, match=f"{case.config.name} has no trained projection here"):
        load_model(case.config, files)
    model = load_model(case.config, files, seed=0)
    assert model.projection.weight.abs().max() > 0


def test_a_model_without_its_qformer_is_refused(case):
    with pytest.raises(UserError, match="needs a Q-Former's weights"):
        load_model(case.config, replace(case.files, qformer=None))


def test_a_part_that_no_file_fills_is_refused(case):
    refuse_unloaded(case.load())
    with torch.device("meta"):
        bridge = build_bridge(case.config)
    with pytest.raises(UserError, match="No file holds the weight “query_tokens”"):
        refuse_unloaded(bridge)


@pytest.mark.parametrize("what", ["nan", "inf", "zeros"])
def test_a_projection_without_values_is_refused(case, what):
    path = case.folder / "pretrained_minigpt4.pth"
    state = torch.load(path, weights_only=True)
    weight = state["model"]["llama_proj.weight"]
    weight[0, 0] = {"nan": torch.nan, "inf": torch.inf, "zeros": 0}[what]
    if what == "zeros":
        weight.zero_()
    torch.save(state, path)
    assert "pretrained_minigpt4.pth" in complaint(case)


def test_a_tensor_that_a_gguf_index_lacks(tmp_path):
    folder = find_weights(get_model("nano")).llm
    if not (folder / INDEX).exists():
        pytest.skip("nano is not here: python -m minigpt4 download nano")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    index = json.loads((folder / INDEX).read_text())
    del index["tensors"]["blk.3.ffn_up.weight"]
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="holds no complete 4-bit model"):
        load_llm(get_model("nano"), tmp_path, torch.device("cpu"), "int4")


# --- the type that the language model computes in -----------------------------------------------


def test_the_computing_type_is_forced(monkeypatch):
    monkeypatch.setenv("MINIGPT4_DTYPE", "bfloat16")
    assert choose_dtype() == torch.bfloat16
    assert choose_dtype("float32") == torch.float32  # an option comes before the environment
    monkeypatch.delenv("MINIGPT4_DTYPE")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(llm, "_has_native_bfloat16", lambda native=native: native)
        assert choose_dtype() == choose_dtype("auto") == expected
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    monkeypatch.setenv("MINIGPT4_DTYPE", "half")
    with pytest.raises(UserError, match="DTYPE must be one of auto, float32, bfloat16, not “half”"):
        choose_dtype()
    with pytest.raises(UserError, match="no computing type “half”: choose auto, float32"):
        choose_dtype("half")


def test_together_as_alone(case, computing_type):
    """To the type's own rounding, which is coarse in 16 bit."""
    model = case.load()
    assert model.llm.dtype == computing_type and model.projection.weight.dtype == torch.float32
    engine = Engine(model)
    sampling = Sampling(temperature=0, max_new_tokens=4)

    def first(text: str) -> float:
        conversation = Conversation.asking(text, [image.load(case.image_paths[0])])
        answer = ask(engine, conversation, sampling, logprobs=True)
        "".join(answer)
        return answer.logprobs[0]

    texts = [f"What are the {n} things?" for n in range(6)]
    alone = [first(text) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        together = [*pool.map(first, texts)]
    engine.close()
    tolerance = 1e-3 if computing_type == torch.float32 else 0.1
    assert together == pytest.approx(alone, abs=tolerance)


def test_each_tensor_is_converted_once(case, monkeypatch):
    """The encoder is 32 bit on the CPU, or what is asked for; integers are left alone."""
    half = case.load(vision_dtype=torch.bfloat16)
    for module in (half.encoder, half.bridge, half.projection):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    whole = case.load()
    pictures = [image.load(case.image_paths[0]).rgb]
    exact, rough = (model.encode_pictures(pictures)[0].embeds.ravel() for model in (whole, half))
    assert exact @ rough > 0.99 * np.linalg.norm(exact) * np.linalg.norm(rough)
    counter = Counting(torch.int64)
    load_strict(
        counter, {"weight": torch.ones(2), "count": torch.tensor(3)}, Path("x"), "y", torch.half
    )
    assert counter.weight.dtype == torch.half and counter.count.dtype == torch.int64


def test_a_picture_that_overflows_in_16_bit_is_encoded_in_32(case):
    half, whole = case.load(vision_dtype=torch.float16), case.load()
    pictures = [image.load(path).rgb for path in case.image_paths[:2]]
    half.encoder.vit.encoder.layers[0].mlp.fc2.weight.data.fill_(6e4)
    for part in ("encoder", "bridge", "projection"):
        getattr(whole, part).load_state_dict(getattr(half, part).state_dict())
    weights = {name: one.dtype for name, one in half.named_parameters()}
    both = half.encode_pictures(pictures)  # the engine then tries them one by one
    assert not any(np.isfinite(one.embeds).all() for one in both)
    for picture in pictures:
        (found,), (expected,) = (model.encode_pictures([picture]) for model in (half, whole))
        assert np.allclose(found.embeds, expected.embeds)
    assert {name: one.dtype for name, one in half.named_parameters()} == weights
    half.projection.weight.data.fill_(torch.nan)
    assert np.isnan(half.encode_pictures(pictures[:1])[0].embeds).all()


class Counting(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.tensor(0, dtype=dtype))


# --- where they are -----------------------------------------------------------------------------


def test_an_installed_package_brings_its_projections(tmp_path):
    """Laid out as setup.py lays it out: fetched weights go to the user's cache folder."""
    package = Path(sources.__file__).parents[1]
    site = tmp_path / "site"
    shutil.copytree(package, site / "minigpt4", ignore=shutil.ignore_patterns("__pycache__"))
    projections = site / "minigpt4" / "_data" / "weights"
    projections.mkdir()
    for path in sources.WEIGHTS.glob("*.safetensors"):
        shutil.copy(path, projections)
    (projections.parent / "prompts").mkdir()
    code = (
        "from minigpt4.config import get_model; from minigpt4.weights import sources as s;"
        "nano = get_model('nano');"
        "print(s.weights_folder(), s.locate(nano, 'projection'), s.locate(nano, 'llm'),"
        "s.locate(nano, 'projection', 'nano-stage1.safetensors'), s.missing(nano, {}), sep='\\n')"
    )
    variables = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = python("-c", code, cwd=tmp_path, MINIGPT4_WEIGHTS="", **variables)
    assert done.stdout.splitlines() == [
        str(tmp_path / "cache" / "minigpt4" / "weights"),
        str(projections / "nano.safetensors"),
        "None",
        str(projections / "nano-stage1.safetensors"),
        "['vision', 'llm']",
    ]


def test_a_folder_of_ones_own_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    assert sources.weights_folder() == tmp_path
    (tmp_path / "nano.safetensors").write_bytes(b"my own")
    own = tmp_path / "nano.safetensors"
    assert sources.locate(get_model("nano"), "projection") == own


def test_a_part_that_the_model_does_not_have_is_not_ignored():
    with pytest.raises(UserError, match="nano has no such part: leave out “--qformer”"):
        find_weights(get_model("nano"), given={"qformer": "blip2.pth"})


def test_missing_weights_say_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="download vicuna-7b"):
        find_weights(get_model("vicuna-7b"))


def test_shapes_tell_models_apart():
    shapes = {(m.llm_hidden_size, m.projection_in) for m in MODELS.values()}
    assert len(shapes) == len(MODELS)
    for config in MODELS.values():
        assert model_of_projection(config.llm_hidden_size, config.projection_in)
