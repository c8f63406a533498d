"""The decoder for GPUs on a CPU: in Triton's interpreter, with a stand-in for CUDA graphs."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minigpt4.engine import Engine
from minigpt4.engine.decoder import build_decoder
from minigpt4.engine.sampling import Sampling
from minigpt4.engine.scheduler import Request, Rows
from minigpt4.engine.torch_decoder import TorchDecoder
from minigpt4.model.prompt import Prompt
from minigpt4.weights.int8 import Int8Linear, Int8Module, build_int8, load_int8
from tests.block_llama import VOCABULARY, as_transformers, block_llama, tiny_chat_model

pytest.importorskip("triton", reason="Triton is not installed: it needs Linux on x86-64")
from minigpt4.engine.gpu import choose, kernels, sampling  # noqa: E402
from minigpt4.engine.gpu.decoder import GpuDecoder  # noqa: E402
from tests.running import python

ROOT = Path(__file__).parent.parent
BLOCKS, CONTEXT, CPU = 16, 64, torch.device("cpu")


def small_llama(**options):
    """A tiny model in float32 PyTorch."""
    return as_transformers(block_llama(hidden=64, inner=96, **options))


def in_int8(model):
    """The model with int8 weights, from its tensors."""
    llm, report = build_int8(model.config, iter(model.state_dict().items()), CPU, torch.float32)
    assert not any(report.values())
    return llm.eval()


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes milliseconds for each."""
    blocks = kernels.linear_blocks
    monkeypatch.setattr(kernels, "linear_blocks", lambda *a: blocks(*a) | {"BLOCK_N": 128})
    monkeypatch.setattr(kernels, "SPLITS", 2)


@pytest.fixture(scope="module")
def llm():
    return in_int8(small_llama())


def launched(step: Callable[[], None]) -> Callable[[], None]:
    """No graph: the kernels are launched one by one."""
    return step


class RecordedGraphs:
    """Counts how often each captured step is replayed."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            step()

        return replay


def test_int8_weights_are_near_the_model(tmp_path):
    """Read from its folder; a bias, a head of its own and grouped heads included."""
    for number, qwen in enumerate((False, True)):
        original = small_llama(seed=number, tied=not qwen, qwen=qwen)
        folder = tmp_path / str(number)
        original.save_pretrained(folder, max_shard_size="40KB")
        assert len([*folder.glob("*.safetensors")]) > 1
        llm, report = load_int8(folder, CPU, torch.float32)
        assert not any(report.values())
        attention = llm.model.layers[0].self_attn
        assert isinstance(attention.q_proj, Int8Linear)
        assert attention.qkv.numbers.data_ptr() == attention.q_proj.stored.numbers.data_ptr()
        for name, layer in llm.named_modules():
            if isinstance(layer, Int8Module):
                step = layer.stored.scale[:, None]
                error = (layer.weight - original.get_submodule(name).weight).abs()
                assert (error <= 0.501 * step).all() and (layer.stored.numbers.abs() == 127).any()
        ids = torch.randint(0, VOCABULARY, (1, 30), generator=torch.manual_seed(0))
        with torch.inference_mode():
            expected, found = original(ids).logits, llm(ids).logits
        assert 0 < (found - expected).std() < 0.2 * expected.std()


def test_what_the_files_lack_is_reported():
    model = small_llama()
    tensors = dict(model.state_dict())
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(2, 2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # of old checkpoints
    _, report = build_int8(model.config, iter(tensors.items()), CPU, torch.float32)
    assert report["missing_keys"] == ["model.norm.weight"]
    ((mismatched, _),) = report["mismatched_keys"]
    assert mismatched == "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("dot", "qwen", "kv_bits"),
    [(True, False, 16), (False, True, 16), (True, False, 8)],
    ids=["dot", "fma_qwen2", "8_bit_cache"],
)
def test_logits_are_the_eager_decoders(dot, qwen, kv_bits):
    """As the self-check compares them: over blocks' edges, with a prompt beside the last step."""
    llm = in_int8(small_llama(tied=not qwen, qwen=qwen))
    eager = TorchDecoder(llm, BLOCKS, kv_bits)
    decoder = GpuDecoder(eager, llm, CONTEXT, launched, dot)
    expected, found = (choose._logits_of(one, eager, 3) for one in (eager, decoder))
    if kv_bits == 16:
        np.testing.assert_allclose(found, expected, atol=2e-4 * expected.std())
    else:  # a number at the middle of two integers may become either
        assert np.sqrt(((found - expected) ** 2).mean()) < 0.3 * choose.BOUND * expected.std()
    assert not eager.keys_values.any() and (kv_bits == 16 or not eager.scales.any())


def test_the_self_check_notices_a_wrong_decoder(llm, monkeypatch):
    eager = TorchDecoder(llm, BLOCKS)
    decoder = GpuDecoder(eager, llm, CONTEXT, launched)
    cosines, sines = decoder._rotation
    decoder._rotation = cosines, -sines
    assert "standard deviations" in choose.difference(decoder, eager)
    decoder._rotation = cosines, sines
    monkeypatch.setattr(choose, "ROWS", (1,))
    assert choose.difference(decoder, eager) == ""
    right = sampling.choose

    def wrong(*inputs: torch.Tensor) -> torch.Tensor:
        tokens = right(*inputs)
        return torch.where(tokens < 0, tokens, tokens ^ 1)

    monkeypatch.setattr(sampling, "choose", wrong)
    assert "other tokens" in choose.difference(decoder, eager)
    monkeypatch.setattr(sampling, "choose", right)
    decoder._rotation = cosines * float("nan"), sines
    assert "not finite" in choose.difference(decoder, eager)


def test_where_it_cannot_run_one_line_says_so(llm, monkeypatch, caplog):
    """No GPU here; then a capture that fails, and a decoder that computes something else."""
    eager = TorchDecoder(llm, BLOCKS)
    assert choose.faster(eager, llm, CONTEXT) is eager
    monkeypatch.setattr(choose, "_why_not", lambda device: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))

    def fails(*_):
        raise RuntimeError("capture failed\nmore")

    monkeypatch.setattr(choose, "build", fails)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert choose.faster(eager, llm, CONTEXT) is eager
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("(RuntimeError: capture failed)")
    decoder = GpuDecoder(eager, llm, CONTEXT, launched, buckets=(1, 4))
    monkeypatch.setattr(choose, "build", lambda *_: decoder)
    assert choose.faster(eager, llm, CONTEXT) is decoder
    decoder._eps = 100.0
    assert choose.faster(eager, llm, CONTEXT) is eager


def test_only_int8_weights_on_a_gpu_get_graphs(llm, monkeypatch):
    """And none of them where the caller wants the eager decoder, as ZeroGPU does."""
    given = []
    monkeypatch.setattr(choose, "faster", lambda eager, llm, context: given.append(eager) or eager)
    gpu = SimpleNamespace(type="cuda")
    for quantize, device, eager in (
        ("none", gpu, False), ("w8a16", CPU, False), ("w8a16", gpu, True), ("w8a16", gpu, False)
    ):  # fmt: skip
        assert not given
        model = SimpleNamespace(
            llm=llm,
            config=SimpleNamespace(context=CONTEXT, kv_bits=0),
            device=device,
            quantize=quantize,
        )
        decoder, _ = build_decoder(model, megabytes=1, eager=eager)
    assert given == [decoder]


def test_a_step_uses_the_next_bucket(llm):
    """Padding changes no block. More rows than the largest bucket take several steps, or, without
    tensor cores, go to the eager decoder."""
    eager, graphs = TorchDecoder(llm, BLOCKS), RecordedGraphs()
    decoder = GpuDecoder(eager, llm, CONTEXT, graphs.capture, buckets=(1, 2, 4))
    for count, expected, dot in (
        (1, [1, 0, 0], True),
        (2, [1, 1, 0], True),
        (3, [1, 1, 1], True),
        (5, [2, 1, 2], True),
        (5, [2, 1, 2], False),
    ):
        decoder._dot = dot
        numbers = np.arange(count, dtype=np.int32)
        tables = 1 + numbers[:, None]
        rows = Rows(numbers + 5, np.zeros((0, 64)), numbers * 0, numbers, tables, numbers)
        found = np.stack(decoder.forward(rows))
        assert graphs.replays == expected
        assert not eager.keys_values[:, :, :16].any()
        np.testing.assert_allclose(found, eager.forward(rows), atol=1e-3)


def test_pictures_and_prompts_go_to_the_eager_decoder(llm):
    """Rows of both kinds in one step keep their order; unwanted rows have no logits."""
    eager, graphs = TorchDecoder(llm, BLOCKS), RecordedGraphs()
    decoder = GpuDecoder(eager, llm, CONTEXT, graphs.capture, buckets=(2,))
    embeds = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    tokens, positions = np.array([7, -1, 8, 9, 6], np.int32), np.array([0, 0, 0, 1, 0], np.int32)
    table_rows = np.array([0, 1, 2, 2, 3], np.int32)
    tables = np.arange(4, dtype=np.int32)[:, None]
    rows = Rows(tokens, embeds, positions, table_rows, tables, np.array([0, 1, 3], np.int32))
    found = np.stack(decoder.forward(rows))
    assert graphs.replays == [1]
    stored = eager.keys_values.clone()
    np.testing.assert_allclose(found, eager.forward(rows), atol=1e-3)
    torch.testing.assert_close(stored, eager.keys_values)


def count_choices(engine: Engine) -> list[bool]:
    """For each output of the engine's decoder from now on: is it a token?"""
    found: list[bool] = []
    forward = engine.decoder.forward

    def counted(rows: Rows):
        outputs = forward(rows)
        found.extend(isinstance(output, int) for output in outputs)
        return outputs

    engine.decoder.forward = counted
    return found


def requests() -> list[Request]:
    draw = np.random.default_rng(1)
    kinds = [
        Sampling(temperature=0.0, max_new_tokens=6),
        Sampling(temperature=1.0, seed=3, max_new_tokens=6),
        Sampling(temperature=2.0, seed=4, top_k=20, min_p=0.01, max_new_tokens=6),
        Sampling(num_beams=3, max_new_tokens=6),
    ]
    found = []
    for kind in kinds:
        ids = draw.integers(3, VOCABULARY, 14).tolist()
        found.append(Request(Prompt(ids, ids, [], [False] * len(ids)), {}, kind))
    return found


def test_conversations_are_the_eager_decoders(llm):
    """Greedy, drawn with a seed, and beams, together: the same tokens, most of which are chosen by
    the decoder."""
    model = tiny_chat_model(llm, context=CONTEXT)
    answers = []
    for new in (False, True):
        with Engine(model, kv_megabytes=1) as engine:
            if new:
                engine.decoder = GpuDecoder(engine.decoder, llm, CONTEXT, launched)
                choices = count_choices(engine)
            streams = [engine.submit(one) for one in requests()]
            answers.append([list(stream) for stream in streams])
            assert engine.decoder_name == ("CUDA graphs" if new else "PyTorch")
    assert answers[0] == answers[1]
    assert sum(choices) == 3 * 5  # of 3 requests; the first token of each comes from its prompt


def test_the_benchmark_runs(tmp_path):
    """Every phase, tiny and on the CPU; the results are complete, and none failed."""
    out = tmp_path / "gpu.json"
    python("-m", "benchmarks.gpu", "--tiny", "--json", str(out))
    results = json.loads(out.read_text())
    assert not [name for name in results if name.endswith("_failed")], results
    assert results["decoder"] == "PyTorch" and results["steps_relative_error"] < 1e-4
    assert results["chats32_temperature1"]["tokens_s"] > 0 and results["picture_finite"]
    assert results["step_of_one_chat"]["GraphLaunch"] == 0 and "memory_s" in results
