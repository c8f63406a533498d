"""Perplexity of a language model in several precisions, on texts.

`python -m benchmarks.int8_quality FOLDER TEXT...` reads a Hugging Face folder and text files, and
prints one line for each precision: perplexity, and the share of positions whose likeliest token is
the one of float32.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from minigpt4.config import Quantize
from minigpt4.weights.llm import _from_pretrained, load_tokenizer

WINDOW = 512  # tokens
PRECISIONS: tuple[tuple[str, Quantize, torch.dtype], ...] = (
    ("float32", "none", torch.float32),
    ("w8a16 (float32)", "w8a16", torch.float32),
    ("LLM.int8()", "int8", torch.float32),
    ("nf4", "nf4", torch.float32),
)


@torch.inference_mode()
def measure(llm, windows: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(mean negative log-likelihood of each token after the first, the likeliest tokens)."""
    losses, likeliest = [], []
    for ids in windows:
        logits = llm(ids[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, ids[1:]))
        likeliest.append(logits.argmax(-1))
    return torch.stack(losses).mean().item(), torch.stack(likeliest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.texts)
    ids = torch.tensor(load_tokenizer(options.folder).encode(text)[: options.tokens])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    reference = None
    for name, quantize, dtype in PRECISIONS:
        llm, _ = _from_pretrained(options.folder, torch.device("cpu"), quantize, dtype)
        loss, likeliest = measure(llm.eval(), windows)
        reference = likeliest if reference is None else reference
        same = (likeliest == reference).float().mean().item()
        line = {"precision": name, "tokens": windows.numel(), "same_likeliest": round(same, 4)}
        print(json.dumps(line | {"perplexity": round(math.exp(loss), 3)}), flush=True)


if __name__ == "__main__":
    main()
