"""python -m benchmarks.chat --json OUT: the engine's speed and memory on a model, beside peers.

Everything is measured several times, the contestants taking turns, and given as medians (with the
lowest and highest): what else the machine does then hits all of them. Peers that are not installed
(`pip install llama-cpp-python`), or cannot run the model, are left out, and so are their figures.

With `--weights random` the language model has the published size and random weights: the large
models are measured so, without their encoder, on shorter answers and prompts. `--layers N`: a part
of it, where time is short.
"""

import argparse
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.random_model import SIZES, open_model, write
from minigpt4 import start
from minigpt4.config import get_model
from minigpt4.data.outputs import print_json
from minigpt4.errors import UserError
from minigpt4.evaluation.report import processor
from minigpt4.model.prompt import Prompt
from minigpt4.weights.convert import blocks_folder
from minigpt4.weights.load import find_weights, load_model

PROMPT_TOKENS = 60  # of each answer that is timed


@dataclass(frozen=True)
class Work:
    """How much is measured.

    new_tokens: of each answer that is timed; chats: at the same time; prompt: tokens read at once;
    conversation: tokens before the next turn; random: the file of a random model, None for the
    model's own.
    """

    model: str
    new_tokens: int = 100
    chats: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompt: int = 512
    conversation: int = 1500
    random: Path | None = None

    @property
    def gguf(self) -> Path:
        """The file that llama.cpp opens, too."""
        if self.random:
            return self.random
        return next(blocks_folder(find_weights(get_model(self.model)).llm).glob("*.gguf"))


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.chat")
    parser.add_argument("--json", metavar="OUT", help="write the figures here")
    parser.add_argument("--model", default="nano", help="one that is held as a GGUF file")
    parser.add_argument("--weights", choices=["own", "random"], default="own")
    parser.add_argument("--layers", type=int, help="of the random model; all by default")
    parser.add_argument("--tokens", type=int, help="of each answer: 100, or 16 with random weights")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="the engine alone")
    parser.add_argument("--probe", choices=["startup", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--gguf", type=Path, help=argparse.SUPPRESS)  # a probe's random model
    options = parser.parse_args(arguments)
    if options.layers and options.weights != "random":
        parser.error("--layers needs --weights random")
    work = Work(options.model, options.tokens or 100)
    if options.gguf or options.weights == "random":
        if options.model not in SIZES:
            parser.error(f"random weights: of {', '.join(SIZES)}")
        work = Work(options.model, options.tokens or 16, (1, 8), 128, 256, options.gguf)
    if options.probe:
        return {"startup": probe_startup, "memory": probe_memory}[options.probe](work)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        if options.weights == "random":
            work = replace(work, random=write(options.model, options.layers, Path(folder)))
        figures = measure(work, options.repeat, peers=not options.no_peers)
    figures |= {"weights": options.weights, "layers": options.layers or "all"}
    print_json(figures, options.json)


# --- our engine -------------------------------------------------------------------------------


def open_engine(work: Work):
    """The engine on a model, as `app.py` starts it on a CPU."""
    from minigpt4.engine import Engine

    model = work.model
    if work.random:
        return Engine(open_model(model, work.random), hang_seconds=300)
    options = argparse.Namespace(model=model, quantize="auto", projection=None, device="cpu")
    return Engine(start.open_model(options))


def request(tokens: list[int], new_tokens: int):
    """A greedy request of plain tokens that nothing ends early."""
    from minigpt4.engine import Request, Sampling

    sampling = Sampling(
        temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=new_tokens
    )
    prompt = Prompt(tokens, tokens, [], [False] * len(tokens))
    return Request(prompt, {}, sampling)


def fresh_tokens(seed: int, count: int = PROMPT_TOKENS) -> list[int]:
    """Token ids that no other prompt begins with."""
    import random

    draw = random.Random(seed)
    return [draw.randrange(1000, 30000) for _ in range(count)]  # in every vocabulary


def engine_rate(engine, chats: int, seed: int, new_tokens: int) -> tuple[float, list[float]]:
    """(tokens/s together after everyone's first, seconds between one chat's tokens)."""
    streams = [engine.submit(request(fresh_tokens(seed + i), new_tokens)) for i in range(chats)]
    times: list[list[float]] = [[] for _ in streams]

    def read(number: int) -> None:
        for _ in streams[number]:
            times[number].append(time.perf_counter())

    in_threads(read, chats)
    first, last = max(t[0] for t in times), max(t[-1] for t in times)
    count = sum(1 for row in times for t in row if t > first)
    gaps = [b - a for row in times for a, b in zip(row, row[1:], strict=False)]
    return count / (last - first), gaps


def first_token(engine, tokens: list[int]) -> tuple[float, int]:
    """(seconds to the first token, tokens reused)."""
    stream = engine.submit(request(tokens, 1))
    list(stream)
    return stream.stats.seconds_to_first, stream.stats.reused_tokens


def in_threads(work: Callable[[int], None], count: int) -> None:
    """work(0) … work(count - 1), at the same time."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- peers ------------------------------------------------------------------------------------


class Generate:
    """transformers' `generate`, as the published demo uses it: bf16 or float32, one call a chat."""

    def __init__(self, work: Work) -> None:
        config, self.new_tokens = get_model(work.model), work.new_tokens
        self.model = load_model(config, find_weights(config), quantize="none").llm

    def __call__(self, tokens: list[int]) -> tuple[float, float]:
        """(time of the first token, of the last) of one answer."""
        import torch

        clock = _Clock()
        self.model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
        )
        return clock.times[1], clock.times[-1]  # the first put is the prompt

    def rate(self, chats: int, seed: int) -> float:
        """Tokens/s together, of as many threads."""
        ends: list = [None] * chats

        def run(number: int) -> None:
            ends[number] = self(fresh_tokens(seed + number))

        in_threads(run, chats)
        lasted = max(e[1] for e in ends) - min(e[0] for e in ends)
        return chats * (self.new_tokens - 1) / lasted


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp on the same file with as many threads, through llama-cpp-python."""

    def __init__(self, work: Work, threads: int) -> None:
        import llama_cpp

        self._api, self.new_tokens = llama_cpp, work.new_tokens
        chats = max(work.chats)
        self._owner = llama_cpp.Llama(str(work.gguf), n_ctx=256, verbose=False)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = 256 * chats
        params.n_seq_max = chats
        params.kv_unified = True  # one chat may take the room of several, as the long prompt does
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._owner.model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(work.prompt, 0, chats)
        vocabulary = llama_cpp.llama_model_get_vocab(self._owner.model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, chat, are its logits wanted)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, chat, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, chat
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def _best(self, place: int) -> int:
        import numpy as np

        logits = self._api.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def read(self, tokens: list[int]) -> float:
        """Tokens/s of a prompt that is read at once."""
        self._api.llama_memory_clear(self._memory, True)
        started, last = time.perf_counter(), len(tokens) - 1
        self._decode([(token, i, 0, i == last) for i, token in enumerate(tokens)])
        self._best(last)
        return len(tokens) / (time.perf_counter() - started)

    def rate(self, chats: int, seed: int) -> float:
        """Tokens/s together: greedy, all chats in one batch."""
        self._api.llama_memory_clear(self._memory, True)
        best = []
        for chat in range(chats):
            prompt = fresh_tokens(seed + chat)
            last = len(prompt) - 1
            self._decode([(t, i, chat, i == last) for i, t in enumerate(prompt)])
            best.append(self._best(last))
        started = time.perf_counter()
        for step in range(self.new_tokens - 1):
            position = PROMPT_TOKENS + step
            self._decode([(best[chat], position, chat, True) for chat in range(chats)])
            best = [self._best(chat) for chat in range(chats)]
        return chats * (self.new_tokens - 1) / (time.perf_counter() - started)


# --- separate processes -------------------------------------------------------------------------


def probe(name: str, work: Work) -> float:
    """What a fresh process that runs `name`'s probe prints."""
    command = [sys.executable, "-m", "benchmarks.chat", "--probe", name, "--model", work.model]
    command += ["--gguf", str(work.random)] if work.random else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def probe_startup(work: Work) -> None:
    """Seconds from the start of the process to the first token."""
    import psutil

    engine = open_engine(work)
    if work.random:
        list(engine.submit(request([1], 1)))
    elif not engine.health():
        raise SystemExit("the engine gave no token")
    print(time.time() - psutil.Process().create_time())


def probe_memory(work: Work) -> None:
    """Peak resident MB of eight chats about a picture each, three turns long; with a random model,
    of eight answers."""
    from minigpt4.conversation import Conversation, ask
    from minigpt4.engine import Sampling

    engine = open_engine(work)

    def chat(number: int) -> None:
        conversation = Conversation()
        pictures = [noise(number)]
        for turn in range(3):
            conversation.add_question(f"What is it, in detail? ({turn})", pictures)
            pictures = []
            sampling = Sampling(seed=number, max_new_tokens=120)
            conversation.add_answer("".join(ask(engine, conversation, sampling)))

    if work.random:
        engine_rate(engine, 8, 0, work.new_tokens)
    else:
        in_threads(chat, 8)
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


# --- all of it ----------------------------------------------------------------------------------


def measure(work: Work, repeat: int, peers: bool) -> dict:
    """The figures, with `machine`, `date` and each one's `spread`."""
    engine, tokens = open_engine(work), work.new_tokens
    threads = start_threads()
    contestants: dict[str, Callable[[int, int], float]] = {}
    if peers:
        try:
            if not work.random:  # it would take 16-bit weights
                contestants["generate"] = Generate(work).rate
        except UserError as error:
            print(f"generate is left out: {error}", file=sys.stderr)
        try:
            llamacpp = LlamaCpp(work, threads)
            contestants["llamacpp"] = llamacpp.rate
        except ImportError:
            print("llama-cpp-python is not installed: left out.", file=sys.stderr)
    runs: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        runs.setdefault(name, []).append(value)

    engine_rate(engine, 1, 10**6, tokens)  # warm
    for round_ in range(repeat):
        seed = 1000 * round_
        for chats in work.chats:
            rate, gaps = engine_rate(engine, chats, seed + 100 * chats, tokens)
            note(f"engine {chats}", rate)
            if chats == 8:
                note("p95", statistics.quantiles(gaps, n=20)[-1] * 1000)
            if "llamacpp" in contestants:
                note(f"llamacpp {chats}", contestants["llamacpp"](chats, seed))
            if "generate" in contestants and chats == 1:
                note("generate 1", contestants["generate"](1, seed))
        if "generate" in contestants and round_ < 2:  # a minute each
            note("generate 8", contestants["generate"](8, seed))
        note("first", first_token(engine, fresh_tokens(seed + 7))[0])
        prompt = fresh_tokens(seed + 6, work.prompt)
        note("engine prompt", work.prompt / first_token(engine, prompt)[0])
        if "llamacpp" in contestants:
            note("llamacpp prompt", llamacpp.read(prompt))
        long = fresh_tokens(seed + 8, work.conversation)
        note("again", first_token(engine, long)[0])
        seconds, reused = first_token(engine, [*long, *fresh_tokens(seed + 9, 20)])
        note("next", seconds)
        note("reused", reused)
        if not work.random:
            note("encode", encode_seconds(engine, round_))
    engine.close()  # its memory is needed for the probes
    for _ in range(3):
        note("startup", probe("startup", work))
    note("memory", probe("memory", work))
    return {"model": work.model, "new_tokens": tokens, **report(runs, threads, work.chats)}


def encode_seconds(engine, seed: int) -> float:
    """One photograph-sized picture that was not seen before, decoded already."""
    picture = noise(100 + seed)
    started = time.perf_counter()
    engine.encode(picture)
    return time.perf_counter() - started


def noise(seed: int):
    """A picture of 640 x 480 that no other seed gives."""
    from PIL import Image

    from minigpt4.model import image

    file = io.BytesIO()
    Image.effect_noise((640, 480), 10 + seed).convert("RGB").save(file, "PNG")
    return image.load(file.getvalue())


def start_threads() -> int:
    """Threads that the engine's decoder uses, and its peers get."""
    from minigpt4.engine.decoder import threads

    return threads()


def report(runs: dict[str, list[float]], threads: int, chats: Sequence[int]) -> dict:
    """Medians under the names that the README and the log use."""

    def median(name: str, digits: int = 3) -> float | None:
        return round(statistics.median(runs[name]), digits) if name in runs else None

    def ratio(over: str, under: str) -> float | None:
        """The median of the rounds' own ratios."""
        if over not in runs or under not in runs:
            return None
        pairs = zip(runs[over], runs[under], strict=False)
        return round(statistics.median(a / b for a, b in pairs), 2)

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(threads),
        "single_tokens_per_s": median("engine 1", 1),
        "single_ratio_to_generate": ratio("engine 1", "generate 1"),
        "single_ratio_to_llamacpp": ratio("engine 1", "llamacpp 1"),
        "concurrent_tokens_per_s": {str(n): median(f"engine {n}", 1) for n in chats},
        "concurrent_ratio_to_generate": ratio("engine 8", "generate 8"),
        "concurrent_ratio_to_llamacpp": ratio("engine 8", "llamacpp 8"),
        "prompt_tokens_per_s": median("engine prompt", 1),
        "prompt_ratio_to_llamacpp": ratio("engine prompt", "llamacpp prompt"),
        "ttft_first_turn_s": median("first"),
        "ttft_next_turn_s": median("next"),
        "ttft_all_again_s": median("again"),
        "reused_tokens_next_turn": median("reused", 0),
        "encode_image_s": median("encode"),
        "startup_s": median("startup", 2),
        "peak_rss_mb": median("memory", 0),
        "inter_token_p95_ms_at_8": median("p95", 1),
        "peers_tokens_per_s": {
            name: median(name, 1) for name in runs if name.startswith(("llamacpp", "generate"))
        },
        "spread": {name: [round(min(v), 4), round(max(v), 4)] for name, v in runs.items()},
    }


def machine(threads: int) -> str:
    """Processor, threads used, and versions, in a line."""
    import torch

    instructions = torch.backends.cpu.get_cpu_capability()
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    cores = f"{os.cpu_count()} cores, {threads} threads, {instructions}"
    return f"{processor()}, {cores}, {versions}"


if __name__ == "__main__":
    main()
