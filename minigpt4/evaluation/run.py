"""python -m minigpt4 evaluate: answer captioned pictures greedily, score the answers."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minigpt4 import start
from minigpt4.evaluation.metrics import caption_scores, failure_rates
from minigpt4.model import MiniGPT4
from minigpt4.prompt import ImageRef, Message, encode_chat, stop_ids, stop_strings
from minigpt4.training.data import read_shards

CAPTION_TOKENS, DETAIL_TOKENS = 40, 200  # longest answers, in tokens


def evaluate(options: argparse.Namespace) -> None:
    """Answer, score, print the scores and write them as JSON."""
    examples = read_shards(options.shard)[: options.limit]
    for path in filter(None, (options.json, options.answers)):
        Path(path).touch()  # a path that cannot be written shows now, not after the work
    model = start.open_model(options)
    config = model.config
    instruction = config.detail_instruction if options.detail else config.short_instruction
    limit = DETAIL_TOKENS if options.detail else CAPTION_TOKENS
    answers, truncated = {}, []
    started = time.perf_counter()
    numbers = range(0, len(examples), options.batch_size)
    for first in tqdm(numbers, desc="answering", unit="batch"):
        batch = examples[first : first + options.batch_size]
        found = answer_batch(model, [e.picture() for e in batch], instruction, limit)
        for example, (answer, cut) in zip(batch, found, strict=True):
            answers[example.key] = answer
            truncated.append(cut)
    seconds = time.perf_counter() - started

    references = {e.key: list(e.captions) for e in examples}
    scores = caption_scores(answers, references) | failure_rates(answers.values(), truncated)
    scores |= {
        "model": config.name,
        "instruction": instruction,
        "words": sum(len(a.split()) for a in answers.values()) / len(answers),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(scores, indent=1, ensure_ascii=False))
    if options.json:
        Path(options.json).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    if options.answers:
        lines = [
            json.dumps({"key": k, "answer": a, "captions": references[k]}, ensure_ascii=False)
            for k, a in answers.items()
        ]
        Path(options.answers).write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.inference_mode()
def answer_batch(
    model: MiniGPT4, pictures: Sequence[Image.Image], instruction: str, max_new_tokens: int
) -> list[tuple[str, bool]]:
    """(greedy answer, was it cut at the limit) to one instruction about each picture."""
    config, tokenizer = model.config, model.tokenizer
    embeds = model.encode_images(pictures)  # [batch, image_tokens, hidden]
    # One prompt serves all: only the picture's embeddings differ.
    message = Message("user", (ImageRef("0"), instruction))
    prompt = encode_chat([message], config.template, tokenizer, config.image_tokens)
    inputs = torch.cat([model.embed(prompt, {"0": one}) for one in embeds])
    ends, texts = stop_ids(config.template, tokenizer), stop_strings(config.template)
    output = model.llm.generate(
        inputs_embeds=inputs,
        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
        **({"stop_strings": list(texts), "tokenizer": tokenizer} if texts else {}),
    )
    answers = []
    for ids in output.tolist():
        ended = any(i in ends for i in ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for stop in texts:
            ended |= stop in text
            text = text.split(stop)[0]
        answers.append((text.strip(), not ended))
    return answers
