"""python -m minigpt4 evaluate: answer captioned pictures greedily, score the answers."""

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from minigpt4 import image, start
from minigpt4.chat import Answer, Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.evaluation.metrics import caption_scores, failure_rates
from minigpt4.training.data import Example, read_shards

CAPTION_TOKENS, DETAIL_TOKENS = 40, 200  # longest answers, in tokens


def evaluate(options: argparse.Namespace) -> None:
    """Answer, score, print the scores and write them as JSON."""
    examples = read_shards(options.shard)[: options.limit]
    for path in filter(None, (options.json, options.answers)):
        Path(path).touch()  # a path that cannot be written shows now, not after the work
    engine = Engine(start.open_model(options))
    config = engine.model.config
    instruction = config.detail_instruction if options.detail else config.short_instruction
    limit = DETAIL_TOKENS if options.detail else CAPTION_TOKENS
    answers, truncated = {}, []
    started = time.perf_counter()
    found = answer_all(engine, examples, instruction, limit, options.batch_size)
    for example, (answer, cut) in zip(
        examples, tqdm(found, desc="answering", total=len(examples), unit="picture"), strict=True
    ):
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


def answer_all(
    engine: Engine,
    examples: Sequence[Example],
    instruction: str,
    max_new_tokens: int,
    together: int = 16,
) -> Iterator[tuple[str, bool]]:
    """(greedy answer, was it cut at the limit) to one instruction about each picture, in order.

    together: how many are being answered at once.
    """
    sampling = Sampling(
        temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens
    )
    answers: deque[Answer] = deque()
    for example in examples:
        conversation = Conversation()
        conversation.add_question(instruction, [image.load(example.read())])
        answers.append(ask(engine, conversation, sampling))
        if len(answers) == together:
            yield _finished(answers.popleft())
    while answers:
        yield _finished(answers.popleft())


def _finished(answer: Answer) -> tuple[str, bool]:
    text = "".join(answer).strip()
    return text, answer.stop_reason == "length"
