"""`--experiment stages`: does the second stage cure what ails the first one's answers?

The paper's claim is that a model aligned on short captions fails in a third of its detailed
descriptions and poems, by repetition, fragments or text beside the point, and that the second stage
all but ends this. Here both stages' projections answer the same two requests about the same
pictures, and an answer fails by rule: `metrics.is_repetitive` or `meaning.stutters`,
`metrics.is_fragment`, or `meaning.is_meaningless`. How well these rules agree with a reader is
measured on tests/labelled_texts.jsonl. They do not ask whether what is said is true, nor whether a
poem is one: the share of answers of a single sentence is reported beside them, for a model that
captions whatever it is asked fails by none of the rules.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minigpt4 import start
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.asking import Question, Reply, answer_all, greedy, usable
from minigpt4.evaluation.meaning import failures
from minigpt4.training.data import Example
from minigpt4.training.run import read_captioned
from minigpt4.weights.sources import WEIGHTS

POEM = "Write a short poem about this image."
TOKENS = 200  # longest answer
SHOWN = 4  # pictures whose answers stand side by side in the report


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(rates by stage and request, their table and examples)."""
    files = {"stage 1": first_stage(options), "stage 2": options.projection}
    examples = usable(read_captioned(options.shard)[: options.limit])
    replies: dict[str, dict[str, list[Reply]]] = {}
    for stage, projection in files.items():
        chosen = argparse.Namespace(**vars(options) | {"projection": projection})
        engine = Engine(start.open_model(chosen))
        config = engine.model.config
        requests = {"description": config.detail_instruction, "poem": POEM}
        replies[stage] = answer_requests(engine, examples, requests, options)
        engine.close()
    result = {
        "model": config.name,
        "n": len(examples),
        "requests": requests,
        "drawn": options.drawn,
        "rates": {s: {k: rates(r) for k, r in found.items()} for s, found in replies.items()},
    }
    report.write_lines(options.answers, records(examples, replies))
    return result, as_text(result, examples, replies)


def first_stage(options: argparse.Namespace) -> str:
    """The file of the first stage's projection; UserError where there is none."""
    path = options.stage1 or WEIGHTS / f"{options.model}-stage1.safetensors"
    if not Path(path).is_file():
        named = options.stage1
        raise UserError(
            f"There is no projection file {named}: check the path."
            if named
            else f"Give the first stage's projection of {options.model} by “--stage1 FILE”."
        )
    return str(path)


def answer_requests(
    engine: Engine,
    examples: Sequence[Example],
    requests: dict[str, str],
    options: argparse.Namespace,
) -> dict[str, list[Reply]]:
    """Each request's replies, a picture each."""
    sampling = greedy(TOKENS)
    if options.drawn:
        drawn = {"max_new_tokens": TOKENS, "seed": options.seed}
        sampling = start.default_sampling(engine.model.config, **drawn)
    questions = [Question(e.key, asked, e.read) for asked in requests.values() for e in examples]
    found = answer_all(engine, questions, sampling, options.batch_size)
    found = list(tqdm(found, desc="answering", total=len(questions), unit="answer"))
    count = len(examples)
    return {kind: found[i * count : (i + 1) * count] for i, kind in enumerate(requests)}


def rates(replies: Sequence[Reply]) -> dict[str, float | int | list[float]]:
    """Fractions of the replies that fail, in which ways, and how long they are."""
    found = [failures(r.text, r.truncated) for r in replies]
    count = len(found)
    failed = sum(f.any for f in found)
    return {
        "failed": failed / count,
        "failed_interval": list(report.interval(failed, count)),
        "repetition": sum(f.repetition for f in found) / count,
        "fragment": sum(f.fragment for f in found) / count,
        "meaningless": sum(f.meaningless for f in found) / count,
        "one_sentence": sum(sentences(r.text) < 2 for r in replies) / count,
        "words": sum(len(r.text.split()) for r in replies) / count,
    }


def sentences(text: str) -> int:
    """How many sentences or lines of verse a text has."""
    return sum(bool(re.search(r"\w", part)) for part in re.split(r"[.!?]+(?=\W|$)|\n", text))


def records(examples: Sequence[Example], replies: dict[str, dict[str, list[Reply]]]) -> list[dict]:
    """Every answer with what fails in it."""
    lines = []
    for stage, kinds in replies.items():
        for kind, found in kinds.items():
            for example, reply in zip(examples, found, strict=True):
                fails = failures(reply.text, reply.truncated)
                lines.append(
                    {"stage": stage, "request": kind, "key": example.key, "answer": reply.text}
                    | {"truncated": reply.truncated, **vars(fails)}
                )
    return lines


def as_text(
    result: dict, examples: Sequence[Example], replies: dict[str, dict[str, list[Reply]]]
) -> str:
    """The table of rates, then answers side by side."""
    rows = []
    for kind in result["requests"]:
        for stage, found in result["rates"].items():
            rate = found[kind]
            failed = report.with_interval(report.percent(rate["failed"]), rate["failed_interval"])
            rows.append(
                [kind, stage, failed]
                + [report.percent(rate[k]) for k in ("repetition", "fragment", "meaningless")]
                + [report.percent(rate["one_sentence"]), f"{rate['words']:.1f}"]
            )
    how = "drawn as in the chat" if result["drawn"] else "greedy"
    header = ["request", "projection", "failed (95 % interval)", "repetition", "fragment"]
    header += ["without meaning", "one sentence", "words"]
    text = f"{result['n']} pictures, {how}, at most {TOKENS} tokens\n\n{report.table(header, rows)}"
    shown = []
    for i, example in enumerate(examples[:SHOWN]):
        for kind in result["requests"]:
            cells = [_marked(replies[stage][kind][i]) for stage in replies]
            shown.append([example.key, kind, *cells])
    header = ["picture", "request", *replies]
    return f"{text}\n\nSide by side, the first pictures:\n\n{report.table(header, shown)}"


def _marked(reply: Reply) -> str:
    """An answer, shortened, with what fails in it."""
    named = [name for name, fails in vars(failures(reply.text, reply.truncated)).items() if fails]
    return report.shortened(reply.text, 300) + (f" ({', '.join(named)})" if named else "")
