"""Weight files that are missing, cut, of another kind or model end in one clear sentence."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.__main__ import main
from minigpt4.config import MODELS, get_model
from minigpt4.errors import UserError
from minigpt4.weights import load as weights
from tests.parity_case import ParityCase

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
        assert name in complaint(case)
    path.write_text("<html>404 not found</html>")
    assert name in complaint(case)


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
    assert "config.json" in complaint(case)


@pytest.mark.parametrize("owner", ["vicuna-13b", "llama2-7b", "nano"])
def test_another_models_projection_is_named(owner, tmp_path):
    config = get_model(owner)
    path = tmp_path / "projection.pth"
    weight = torch.zeros(config.llm_hidden_size, config.projection_in)
    bias = torch.zeros(config.llm_hidden_size)
    torch.save({"model": {"llama_proj.weight": weight, "llama_proj.bias": bias}}, path)
    with pytest.raises(UserError, match=owner):
        weights.check_projection(weights.read_projection(path), get_model("vicuna-7b"), path)


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
    after = weights.load_model(case.config, files, llm_dtype=torch.float32).projection.weight
    torch.testing.assert_close(before, after)
    assert "64" in capsys.readouterr().out


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


def test_missing_weights_say_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="download vicuna-7b"):
        weights.find(get_model("vicuna-7b"))


def test_shapes_tell_models_apart():
    shapes = {(m.llm_hidden_size, m.projection_in) for m in MODELS.values()}
    assert len(shapes) == len(MODELS)
    for config in MODELS.values():
        assert weights.model_of_projection(config.llm_hidden_size, config.projection_in)
