"""python -m minigpt4 curate STEP: runs each step with its options."""

import argparse
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
from minigpt4.curation import export as layout
from minigpt4.curation import filters
from minigpt4.curation import merge as merging
from minigpt4.curation.pictures import PictureFile, find_pictures, is_same
from minigpt4.curation.records import Records, read_records, write_records
from minigpt4.data.examples import check_share
from minigpt4.data.files import prompt_text
from minigpt4.data.outputs import check_outputs, print_json
from minigpt4.errors import UserError

if TYPE_CHECKING:
    from minigpt4.curation.generate import Generator
    from minigpt4.curation.refine import Refiner

MOST_TOGETHER = 64  # requests, as many as may wait for the engine


def generate(options: argparse.Namespace) -> None:
    """Describe the pictures that have no description yet."""
    from minigpt4.batch import Batch
    from minigpt4.curation.generate import Generator
    from minigpt4.engine import Engine

    files = find_pictures(options.pictures)[: options.limit]
    given = start.given_sampling(options)
    with (
        Records(options.out) as records,
        Batch(Engine(start.open_model(options)), options.together) as batch,
    ):
        sampling = start.default_sampling(batch.engine.model.config, **given)
        generator = Generator(batch, sampling, options.min_tokens, options.continues)
        described = {i: r for i, r in records.records.items() if "error" not in r}
        _check_described(described, files, generator, options.out)
        missing = [f for f in files if f.image_id not in described]
        if done := len(files) - len(missing):
            start.say(
                f"{done} of {len(files)} are described in {options.out} and stay as they are: to "
                "describe them again, choose another “--out”."
            )
        with tqdm(total=len(files), initial=done, unit="picture") as bar:
            for record in generator(missing):
                records.append(record)
                bar.update()
        _report_generated([records.records[f.image_id] for f in files], options.out)


def _check_described(
    described: dict[str, dict], files: list[PictureFile], generator: "Generator", out: str
) -> None:
    """UserError if descriptions are by another model, with another prompt or other options, or of
    other pictures with the same ids."""
    from minigpt4.curation.generate import PROMPT_FILES

    model = generator.model
    for record in described.values():
        found = record.get("options")
        found = found if isinstance(found, dict) else {}
        changed = [n for n, v in generator.options.items() if found.get(n, v) != v]
        edited = [n for n, text in generator.prompts.items() if record.get(n, text) != text]
        what = ""
        if record.get("model", model) != model:
            what = f"by {record['model']}, but this is {model}"
        elif edited:
            what = f"from before prompts/{PROMPT_FILES[edited[0]]} was changed"
        elif changed:
            flag, value = changed[0].replace("_", "-"), generator.options[changed[0]]
            what = f"with “--{flag}” {found[changed[0]]}, but now it is {value}"
        _refuse_others(what, out)
    for file in files:
        picture = described.get(file.image_id, {}).get("picture", file.picture)
        if not is_same(picture, file.picture):
            raise UserError(
                f"“{file.image_id}” in {out} is {picture}, but here it is {file.picture}: rename "
                "the new file, or choose another file with “--out”."
            )


def _refuse_others(what: str, out: str) -> None:
    if what:
        raise UserError(f"{out} contains descriptions {what}: choose another file with “--out”.")


def _report_generated(records: list[dict], out: str) -> None:
    texts = [r for r in records if "error" not in r]
    failed = [r for r in records if "error" in r]
    continued = sum(r.get("continued", 0) > 0 for r in texts)
    tokens = sum(r.get("tokens", 0) for r in texts) / max(1, len(texts))
    start.say(
        f"{len(texts)} described in {out}, {tokens:.0f} tokens on average; {continued} were "
        f"continued; {len(failed)} could not be read."
    )
    for record in failed[:10]:
        start.say(f"  {record['error']}")
    check_share(len(failed), len(records))


def refine(options: argparse.Namespace) -> None:
    """Refine the descriptions that are not refined yet."""
    from minigpt4.curation.refine import Failed, estimate
    from minigpt4.curation.refine import refine as refine_all

    check_outputs({"out": options.out}, [options.file])
    found = read_records(options.file)
    instruction = prompt_text("refine.txt")
    with Records(options.out) as records:
        before = {i: done.get("before") for i, done in records.records.items()}
        missing = [r for i, r in found.items() if i not in before or before[i] != r.get("text")]
        texts = [r for r in missing if r.get("text")]
        for record in missing:
            if not record.get("text"):  # the picture could not be read; `filter` reports it
                records.append(record)
        _report_estimate(estimate([r["text"] for r in texts], instruction), options)
        if options.estimate:
            return
        failures: list[Failed] = []
        with _refiner(options) as refiner:
            for record in records.records.values():
                _check_refiner(record, refiner.name, instruction, options.out)
            outcomes = refine_all(refiner, texts, instruction, min(options.together, MOST_TOGETHER))
            for outcome in tqdm(outcomes, total=len(texts), unit="text"):
                if isinstance(outcome, Failed):
                    failures.append(outcome)
                else:
                    records.append(outcome)
        done = [records.records[i] for i in found if i in records.records]
    _report_refined(done, options.out)
    if failures:
        raise UserError(f"{len(failures)} got no answer: {failures[-1]} Run it again to resume.")


def _check_refiner(record: dict, name: str, instruction: str, out: str) -> None:
    """UserError if a record was refined by another model or with another prompt."""
    what = ""
    if record.get("refiner", name) != name:
        what = f"refined by {record['refiner']}, but this is {name}"
    elif record.get("refine_prompt", instruction) != instruction:
        what = "refined before prompts/refine.txt was changed"
    _refuse_others(what, out)


def _report_estimate(found, options: argparse.Namespace) -> None:
    line = (
        f"{found.requests} to refine: about {found.prompt_tokens:,} input tokens and "
        f"{found.answer_tokens:,} output tokens"
    )
    cost = found.cost(options.price_in, options.price_out)
    if options.price_in or options.price_out:
        line += f", which cost about {cost:.2f}"
    start.say(line + ".")
    if options.max_cost is not None and cost > options.max_cost:
        raise UserError(
            f"That is more than “--max-cost {options.max_cost:g}”: raise it, or refine fewer."
        )


@contextmanager
def _refiner(options: argparse.Namespace) -> Iterator["Refiner"]:
    """The endpoint that the options or the environment name, or else a model on this machine."""
    from minigpt4.curation.refine import EndpointRefiner, LocalRefiner
    from minigpt4.engine import Engine

    url = options.url
    if url and not options.local:
        name = options.refiner
        if not name:
            raise UserError("Name the endpoint's model with “--refiner NAME”.")
        key = options.api_key or ""
        with closing(EndpointRefiner(url, key, name, options.retries, options.timeout)) as refiner:
            yield refiner
        return
    if not options.local:
        start.say(f"No endpoint is named (--url): refining with {options.model} on this machine.")
    with closing(Engine(start.open_model(options))) as engine:
        yield LocalRefiner(engine)


def _report_refined(done: list[dict], out: str) -> None:
    results = Counter(r["refined"] for r in done if "refined" in r)
    kept = {why: n for why, n in results.items() if why.startswith("kept: ")}
    start.say(
        f"{results.total()} in {out}: {results['changed']} changed, {results['same']} the same, "
        f"{sum(kept.values())} kept because the answer could not be used."
    )
    for why, number in sorted(kept.items(), key=lambda item: -item[1])[:10]:
        start.say(f"  {number} × {why.removeprefix('kept: ')}")


def filter(options: argparse.Namespace) -> None:
    """Mark the descriptions that break a rule, and count them."""
    check_outputs({"out": options.out}, [options.file])
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
                f"The language “{given['language']}” cannot be identified: use a code of two "
                "letters (en, de, zh …)."
            )
    records = filters.apply(read_records(options.file).values(), filters.Thresholds(**given))
    write_records(options.out, records)
    kept = sum(r["kept"] for r in records)
    start.say(
        f"{kept} of {len(records)} kept, in {options.out}. Broken rules (a text may break several):"
    )
    for name, number in filters.counts(records).items():
        start.say(f"  {number:6} {name}: {filters.RULES[name]}")


def review(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from minigpt4.curation.review import Review

    check_outputs({"out": options.out}, [options.file])
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
    """Combine reviews, and print the agreement of the reviewers as JSON."""
    check_outputs({"out": options.out, "json": options.json}, options.reviews)
    reviews = {}
    for path in options.reviews:
        records = read_records(path)
        merging.check_reviews(path, records)
        name = next((r["reviewer"] for r in records.values() if r.get("reviewer")), path)
        if name in reviews:
            raise UserError(f"Two reviews are by “{name}”: name each reviewer with “--name”.")
        reviews[name] = records
    merged = merging.merge(reviews)
    write_records(options.out, merged)
    print_json(merging.agreement(reviews), options.json)
    decided = Counter(r["decision"] for r in merged)
    start.say(
        f"{len(merged)} in {options.out}: {decided['keep']} kept, {decided['edit']} edited, "
        f"{decided['drop']} dropped."
    )


def export(options: argparse.Namespace) -> None:
    """Write the set in the layout of the second stage."""
    records = read_records(options.file).values()
    number = layout.export(records, options.out, options.pictures)
    start.say(f"Pictures with descriptions in {options.out}: {number}.")
