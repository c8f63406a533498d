"""python -m benchmarks.gpu --json OUT: every goal for one GPU, in at most nine minutes.

A 7B model of random int8 weights is made on the GPU, so that nothing is downloaded: PyTorch and
transformers are enough. The phases are written to OUT as they end; one that fails is noted, and the
next one runs. `--tiny` proves the script itself, on a CPU.
"""

import argparse
import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from minigpt4.config import get_model
from minigpt4.engine import Engine
from minigpt4.engine.sampling import Sampling
from minigpt4.engine.scheduler import Request, Rows
from minigpt4.errors import UserError
from minigpt4.model.bridge import build_bridge
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.parts import EvaViT, QFormer
from minigpt4.model.prompt import Prompt
from minigpt4.model.vision import build_encoder
from minigpt4.weights.int8 import build_int8

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32001,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}
GOALS = {  # for a 7B in 8 bit on an H200; tokens/s: half of what the memory's bandwidth allows
    "tokens_s_1_chat": 320,
    "tokens_s_32_chats": 4000,
    "first_token_ms": 40,
    "gigabytes": 9.5,
}


class Benchmark:
    """What the phases share: options, results so far, the model and its engine."""

    def __init__(self, out: Path, tiny: bool, seconds: float) -> None:
        self.out, self.tiny, self.seconds = out, tiny, seconds
        self.cuda = torch.cuda.is_available() and not tiny
        self.device = torch.device("cuda:0" if self.cuda else "cpu")
        self.dtype = torch.float16 if self.cuda else torch.float32
        self.started = time.monotonic()
        self.results: dict = {"argv": sys.argv[1:], "goals": GOALS}
        self.model: MiniGPT4
        self.engine: Engine

    def note(self, **results: object) -> None:
        self.results.update(results)
        print(json.dumps(results), flush=True)
        self.out.write_text(json.dumps(self.results, indent=1))

    def run(self, phase: Callable[["Benchmark"], None], seconds: float) -> None:
        """Run a phase that needs about so many seconds, if there are as many."""
        name, begun = phase.__name__, time.monotonic()
        if self.seconds - (begun - self.started) < seconds:
            return self.note(**{name: "skipped: no time left"})
        try:
            phase(self)
        except Exception:
            self.note(**{f"{name}_failed": traceback.format_exc()[-1500:]})
        self.note(**{f"{name}_s": round(time.monotonic() - begun, 1)})

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def used_gigabytes(self) -> float:
        """Of the GPU's memory, whoever uses it."""
        free, total = torch.cuda.mem_get_info() if self.cuda else (0, 0)
        return round((total - free) / 1e9, 2)

    def ask(
        self, chats: int, tokens: int, prompt: int = 100, seed: int = 0, temperature: float = 1.0
    ) -> tuple[float, list[float], list[float]]:
        """(tokens per second of all, seconds to each first token, seconds between tokens)."""
        draw = np.random.default_rng(seed)
        first, gaps = [0.0] * chats, []
        prompts = [draw.integers(3, 900, prompt).tolist() for _ in range(chats)]

        def read(number: int) -> None:
            ids = prompts[number]
            sampling = Sampling(temperature=temperature, max_new_tokens=tokens, seed=number)
            asked = Request(Prompt(ids, ids, [], [False] * prompt), {}, sampling)
            last = begun = time.perf_counter()
            with contextlib.suppress(UserError):  # the engine counts what fails
                for count, _ in enumerate(self.engine.submit(asked)):
                    now = time.perf_counter()
                    if count:
                        gaps.append(now - last)
                    else:
                        first[number] = now - begun
                    last = now

        begun = time.perf_counter()
        threads = [threading.Thread(target=read, args=(number,)) for number in range(chats)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return chats * tokens / (time.perf_counter() - begun), first, gaps


def machine(b: Benchmark) -> None:
    """The card, and the bandwidth that a copy reaches."""
    b.note(torch=torch.__version__, gpu=torch.cuda.get_device_name() if b.cuda else "cpu")
    if b.cuda:
        source = torch.empty(2**32, dtype=torch.int8, device=b.device)
        target, seconds = torch.empty_like(source), []
        for _ in range(12):
            b.synchronize()
            begun = time.perf_counter()
            target.copy_(source)
            b.synchronize()
            seconds.append(time.perf_counter() - begun)
        b.note(copy_terabytes_s=round(2 * 2**32 / median(seconds) / 1e12, 2))


def drawn(b: Benchmark, module: torch.nn.Module) -> torch.nn.Module:
    """A module made on "meta" with weights drawn on the device."""
    module.to_empty(device=b.device)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    return module


def build(b: Benchmark) -> None:
    """The model: vision in 16 bit, the language model in int8, one tensor at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, sizes = get_model("vicuna-7b"), SIZES
    if b.tiny:
        part = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64}
        vision, bridge = EvaViT(**part), QFormer(**part)
        config, sizes = replace(config, llm_hidden_size=64, vision=vision, bridge=bridge), TINY
    llama = LlamaConfig(**sizes, max_position_embeddings=2048, rms_norm_eps=1e-6)
    torch.set_default_dtype(b.dtype)
    with torch.device("meta"):
        projection = torch.nn.Linear(config.projection_in, config.llm_hidden_size)
        parts = [build_encoder(config.vision), build_bridge(config), projection]
        empty = LlamaForCausalLM(llama)
    parts = [drawn(b, part) for part in parts]
    torch.set_default_dtype(torch.float32)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in empty.state_dict().items():
            shape = tensor.shape
            one = len(shape) == 1
            yield (
                name,
                (torch.ones if one else torch.randn)(shape, device=b.device) * (1 if one else 0.02),
            )

    llm, _ = build_int8(llama, tensors(), b.device, b.dtype)
    b.model = MiniGPT4(config, *parts, llm.eval(), None, "w8a16")
    b.synchronize()
    b.note(weights_gigabytes=b.used_gigabytes())


def start(b: Benchmark) -> None:
    """The engine: which decoder runs, and how long its graphs and its check take."""
    begun = time.monotonic()
    b.engine = Engine(b.model)
    b.note(
        decoder=b.engine.decoder_name,
        engine_start_s=round(time.monotonic() - begun, 1),
        gigabytes_with_cache=b.used_gigabytes(),
    )


def correctness(b: Benchmark) -> None:
    """The decoder's logits against transformers' own, of the same weights, for 40 positions."""
    ids = torch.randint(3, 900, (1, 40), device=b.device)
    with torch.inference_mode():
        expected = b.model.llm(ids).logits[0].float().cpu().numpy()
    numbers = np.arange(40, dtype=np.int32)
    tables = np.arange(3, dtype=np.int32)[None]
    none = np.zeros((0, b.model.config.llm_hidden_size), np.float32)
    tokens = ids[0].cpu().numpy().astype(np.int32)
    whole = Rows(tokens, none, numbers, numbers * 0, tables, numbers)
    errors, same = [], []
    for name, parts in (("prompt", [whole]), ("steps", [*whole.split(1)])):
        found = np.concatenate([np.stack(b.engine.decoder.forward(part)) for part in parts])
        errors.append(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
        same.append(float((found.argmax(-1) == expected.argmax(-1)).mean()))
        b.note(**{f"{name}_relative_error": errors[-1], f"{name}_same_likeliest": same[-1]})


def speed(b: Benchmark) -> None:
    """1, 8 and 32 chats, greedy and drawn; medians of three runs."""
    b.ask(32, 8)
    for chats in (1, 8, 32):
        for temperature in (0.0, 1.0):
            runs = [
                b.ask(chats, 4 if b.tiny else 128, seed=run, temperature=temperature)
                for run in range(3)
            ]
            gaps = sorted(gap for run in runs for gap in run[2])
            b.note(
                **{
                    f"chats{chats}_temperature{temperature:g}": {
                        "tokens_s": round(median(run[0] for run in runs), 1),
                        "gap_ms_median": round(1e3 * gaps[len(gaps) // 2], 2),
                        "gap_ms_95": round(1e3 * gaps[int(len(gaps) * 0.95)], 2),
                    }
                }
            )


def first_token(b: Benchmark) -> None:
    """Question to first token, alone, after prompts of 100 and 1,500 tokens."""
    for prompt, count in ((100, 15), (1500, 5)):
        seconds = [b.ask(1, 1, prompt, seed=100 + prompt + run)[1][0] for run in range(count)]
        b.note(**{f"first_token_ms_after_{prompt}": round(1e3 * median(seconds), 1)})


def picture(b: Benchmark) -> None:
    """One picture through the encoder and the projection."""
    from PIL import Image

    seconds, finite = [], True
    for seed in range(10):
        pixels = np.random.default_rng(seed).integers(0, 255, (480, 640, 3)).astype(np.uint8)
        begun = time.perf_counter()
        (encoded,) = b.model.encode_pictures([Image.fromarray(pixels)])
        seconds.append(time.perf_counter() - begun)
        finite = finite and bool(np.isfinite(encoded.embeds).all())
    b.note(picture_ms=round(1e3 * median(seconds[2:]), 1), picture_finite=finite)


def launches(b: Benchmark) -> None:
    """What one step of one chat launches, and how often it waits for the GPU."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * b.cuda]
    none, zero = np.zeros((0, b.model.config.llm_hidden_size), np.float32), np.zeros(1, np.int32)
    rows = Rows(zero + 5, none, zero, zero, zero[None], zero)
    with profile(activities=activities) as profiled:
        b.engine.decoder.forward(rows)  # the engine is idle
    names = [event.name for event in profiled.events()]
    kinds = ("LaunchKernel", "GraphLaunch", "Synchronize")
    b.note(step_of_one_chat={kind: sum(kind in name for name in names) for kind in kinds})


def memory(b: Benchmark) -> None:
    """The peak; then 32 chats with too little memory, and one with enough again."""
    peak = torch.cuda.max_memory_allocated() / 1e9 if b.cuda else 0.0
    b.note(peak_gigabytes=round(peak, 2), used_gigabytes=b.used_gigabytes())
    if b.cuda:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + 100e6
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        before = b.engine.totals.snapshot().errors.copy()
        b.ask(32, 16, prompt=700, seed=9)
        torch.cuda.set_per_process_memory_fraction(1.0)
        after = b.engine.totals.snapshot().errors
        failed = {kind: after[kind] - before[kind] for kind in after if after[kind] > before[kind]}
        b.note(short_of_memory_failures=failed, tokens_s_after=b.ask(1, 16, seed=10)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="OUT")
    parser.add_argument("--tiny", action="store_true", help="prove the script on a CPU")
    parser.add_argument("--seconds", type=float, default=520, help="for all phases together")
    options = parser.parse_args()
    b = Benchmark(options.json, options.tiny, options.seconds)
    phases = (
        (machine, 0), (build, 30), (start, 60), (correctness, 20), (speed, 90), (first_token, 30),
        (picture, 20), (launches, 20), (memory, 40),
    )  # fmt: skip
    for phase, seconds in phases:
        b.run(phase, seconds)
    if hasattr(b, "engine"):
        b.engine.close()
    b.note(seconds=round(time.monotonic() - b.started, 1))


if __name__ == "__main__":
    main()
