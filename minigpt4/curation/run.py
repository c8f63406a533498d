"""python -m minigpt4 curate STEP: options -> what each step does."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from minigpt4 import start
from minigpt4.curation import agreement, filters
from minigpt4.curation import export as layout
from minigpt4.curation.pictures import find_pictures, is_same
from minigpt4.curation.records import Records, read_records, write_records
from minigpt4.errors import UserError

if TYPE_CHECKING:
    from minigpt4.curation.refiners import Refiner
    from minigpt4.engine import Engine

MOST_TOGETHER = 64  # what the engine lets wait


@contextmanager
def _engine(options: argparse.Namespace) -> Iterator["Engine"]:
    """The model that the options name, closed afterwards."""
    from minigpt4.engine import Engine

    engine = Engine(start.open_model(options))
    try:
        yield engine
    finally:
        engine.close()


def generate(options: argparse.Namespace) -> None:
    """Describe what is not described yet."""
    from minigpt4.curation.generate import Generator

    sources = find_pictures(options.pictures)[: options.limit]
    given = start.given_sampling(options)
    with Records(options.out) as records, _engine(options) as engine:
        sampling = start.default_sampling(engine.model.config, **given)
        together = min(options.together, MOST_TOGETHER)
        generator = Generator(engine, sampling, options.min_tokens, options.continues, together)
        described = {i: r for i, r in records.records.items() if "error" not in r}
        for record in described.values():
            if record.get("model", generator.model) != generator.model:
                raise UserError(
                    f"{options.out} holds descriptions by {record['model']}, and this is "
                    f"{generator.model}: give another file by “--out”."
                )
        for source in sources:
            picture = described.get(source.image_id, {}).get("picture", source.picture)
            if not is_same(picture, source.picture):
                raise UserError(
                    f"“{source.image_id}” in {options.out} is {picture}, and here it is "
                    f"{source.picture}: give the new file another name, or another file by “--out”."
                )
        left = [s for s in sources if s.image_id not in described]
        bar = tqdm(total=len(sources), initial=len(sources) - len(left), unit="picture")
        with bar:
            for record in generator(left):
                records.append(record)
                bar.update()
        done = [records.records[s.image_id] for s in sources]
    unread = [r for r in done if "error" in r]
    texts = [r for r in done if "error" not in r]
    continued = sum(r.get("continued", 0) > 0 for r in texts)
    tokens = sum(r.get("tokens", 0) for r in texts) / max(1, len(texts))
    start.say(
        f"{len(texts)} described in {options.out}, {tokens:.0f} tokens on average; {continued} "
        f"were told to go on; {len(unread)} could not be read."
    )
    for record in unread[:10]:
        start.say(f"  {record['error']}")


def refine(options: argparse.Namespace) -> None:
    """Have the descriptions mended that are not mended yet."""
    from minigpt4.curation.generate import read_prompt
    from minigpt4.curation.refine import estimate
    from minigpt4.curation.refine import refine as refine_all
    from minigpt4.curation.refiners import Failed

    found = read_records(options.file)
    instruction = read_prompt("refine.txt")
    with Records(options.out) as records:
        left = [r for i, r in found.items() if not _is_refined(records.records.get(i), r)]
        texts = [r for r in left if r.get("text")]
        for record in left:
            if not record.get("text"):  # the picture could not be read: `filter` will say so
                records.append(record)
        _say_estimate(estimate([r["text"] for r in texts], instruction), options)
        if options.estimate:
            return
        failures: list[Failed] = []
        together = min(options.together, MOST_TOGETHER)
        with _refiner(options) as refiner:
            for record in records.records.values():
                _check_refiner(record, refiner.name, instruction, options.out)
            outcomes = refine_all(refiner, texts, instruction, together)
            for outcome in tqdm(outcomes, total=len(texts), unit="text"):
                if isinstance(outcome, Failed):
                    failures.append(outcome)
                else:
                    records.append(outcome)
        done = [records.records[i] for i in found if i in records.records]
    _say_refined(done, options.out)
    if failures:
        raise UserError(
            f"{len(failures)} got no answer: {failures[-1]} Run it again to go on with them."
        )


def _is_refined(done: dict | None, record: dict) -> bool:
    return done is not None and done.get("before") == record.get("text")


def _check_refiner(record: dict, name: str, instruction: str, out: str) -> None:
    """UserError where a record was refined by another model, or as another prompt says."""
    if record.get("refiner", name) != name:
        raise UserError(
            f"{out} holds descriptions refined by {record['refiner']}, and this is {name}: give "
            "another file by “--out”."
        )
    if record.get("refine_prompt", instruction) != instruction:
        raise UserError(
            f"{out} holds descriptions refined before prompts/refine.txt was changed: give another "
            "file by “--out”."
        )


def _say_estimate(found, options: argparse.Namespace) -> None:
    line = (
        f"{found.requests} to refine: about {found.prompt_tokens:,} tokens asked and "
        f"{found.answer_tokens:,} answered"
    )
    cost = found.cost(options.price_in, options.price_out)
    if options.price_in or options.price_out:
        line += f", about {cost:.2f} at the prices given"
    start.say(line + ".")
    if options.max_cost is not None and cost > options.max_cost:
        raise UserError(
            f"That is more than “--max-cost {options.max_cost:g}”: raise it, or refine fewer."
        )


@contextmanager
def _refiner(options: argparse.Namespace) -> Iterator["Refiner"]:
    """The endpoint that the options or the environment name, else a model on this machine."""
    from minigpt4.curation.refiners import EndpointRefiner, LocalRefiner

    url = options.url
    if url and not options.local:
        name = options.refiner
        if not name:
            raise UserError("Name the endpoint's model by “--refiner NAME”.")
        if find_spec("openai") is None:
            raise UserError("Install openai first: pip install 'minigpt4[train]'.")
        key = options.api_key or ""
        refiner = EndpointRefiner(url, key, name, options.retries, options.timeout)
        with closing(refiner):
            yield refiner
        return
    if not options.local:
        start.say(f"No endpoint is named (--url): refining with {options.model} on this machine.")
    with _engine(options) as engine:
        yield LocalRefiner(engine)


def _say_refined(done: list[dict], out: str) -> None:
    results = Counter(r["refined"] for r in done if "refined" in r)
    kept = {why: n for why, n in results.items() if why.startswith("kept: ")}
    start.say(
        f"{results.total()} in {out}: {results['changed']} changed, {results['same']} the same, "
        f"{sum(kept.values())} kept as they were because the answer was of no use."
    )
    for why, number in sorted(kept.items(), key=lambda item: -item[1])[:10]:
        start.say(f"  {number} × {why.removeprefix('kept: ')}")


def filter(options: argparse.Namespace) -> None:
    """Mark what breaks a rule, and count."""
    given = {f.name: getattr(options, f.name) for f in fields(filters.Thresholds)}
    if given["language"] == "any":
        given["language"] = ""
    if given["language"]:
        if find_spec("py3langid") is None:
            raise UserError(
                "Install py3langid first (pip install 'minigpt4[train]'), or omit this rule with "
                "“--language any”."
            )
        if given["language"] not in filters.languages():
            raise UserError(
                f"“{given['language']}” is no language that can be told: give its code of two "
                "letters (en, de, zh …)."
            )
    records = filters.apply(read_records(options.file).values(), filters.Thresholds(**given))
    write_records(options.out, records)
    kept = sum(r["kept"] for r in records)
    start.say(
        f"{kept} of {len(records)} kept, in {options.out}. Broken rules (one may break several):"
    )
    for name, number in filters.counts(records).items():
        start.say(f"  {number:6} {name}: {filters.RULES[name]}")


def review(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from minigpt4.curation.review import Review

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    items = layout.chosen(read_records(options.file).values())
    name = options.name or Path(options.out).stem
    with Records(options.out) as records:
        found = Review(items, records, name, options.pictures)
        from minigpt4.curation.review_page import ReviewPage, serve

        page = ReviewPage(found).build()
        print(f"Open {serve(page, options)}", flush=True)
        try:
            page.block_thread()
        finally:
            start.say(
                f"{len(found) - found.counts()['']} of {len(found)} decided in {options.out}."
            )


def merge(options: argparse.Namespace) -> None:
    """Put reviewers' files together and print their agreement as JSON."""
    if Path(options.out).resolve() in {Path(path).resolve() for path in options.reviews}:
        raise UserError(
            f"{options.out} is one of the reviews, which would be lost: give another file by "
            "“--out”."
        )
    reviews = {}
    for path in options.reviews:
        records = read_records(path)
        agreement.check_reviews(path, records)
        name = next((r["reviewer"] for r in records.values() if r.get("reviewer")), path)
        if name in reviews:
            raise UserError(f"Two files are by “{name}”: give each review a name by “--name”.")
        reviews[name] = records
    merged = agreement.merge(reviews)
    write_records(options.out, merged)
    result = json.dumps(agreement.agreement(reviews), indent=1, ensure_ascii=False)
    print(result)
    if options.json:
        Path(options.json).write_text(result + "\n", encoding="utf-8")
    decided = Counter(r["decision"] for r in merged)
    start.say(
        f"{len(merged)} in {options.out}: {decided['keep']} kept, {decided['edit']} edited, "
        f"{decided['drop']} dropped."
    )


def export(options: argparse.Namespace) -> None:
    """Write the layout of the second stage."""
    records = read_records(options.file).values()
    number = layout.export(records, options.out, options.pictures)
    start.say(f"{number} pictures with descriptions in {options.out}.")
