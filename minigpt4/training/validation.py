"""The validation of a run: held-out loss and caption score, the best projection, dashboards."""

import csv
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minigpt4.data.examples import Example, usable
from minigpt4.errors import UserError, say
from minigpt4.model.prompt import ImageRef
from minigpt4.training.features import Features, fingerprint
from minigpt4.training.packing import Learned, pack
from minigpt4.training.selfcritical import CiderReward, question_of, sample_answers
from minigpt4.training.trainer import Trainer

PICTURES = 100  # the most of the held-out data that are used
CAPTION_TOKENS = 40  # longest caption that is scored
_AT_ONCE = 8  # pictures in a batch


class Validation:
    """Measures a trainer on held-out examples every `every` steps, and after the last one.

    The figures are written to validation.csv. The projection with the lowest held-out loss is kept
    in MODEL-best.safetensors, besides the last one. A resumed run continues both. UserError if it
    would compare its losses with those on other held-out examples.
    """

    def __init__(self, trainer: Trainer, examples: Sequence[Example], every: int) -> None:
        self._trainer, self._every = trainer, every
        self._examples = usable(examples[:PICTURES])
        trained: dict[str, list[Example]] = defaultdict(list)
        for example in trainer.examples:
            trained[example.key].append(example)
        # Other data may have other pictures of the same names.
        same = [e.key for e in self._examples if any(_same(e, t) for t in trained[e.key])]
        if same:
            say(f"Held-out pictures that are also trained on: {len(same)} ({same[0]}).")
        source = Features(trainer.model, self._examples)
        parts = [
            source([(i, 0) for i in range(start, min(start + _AT_ONCE, len(self._examples)))])
            for start in range(0, len(self._examples), _AT_ONCE)
        ]
        self._features = torch.cat(parts)
        references = {e.key: e.captions or [t.answer for t in e.texts] for e in self._examples}
        self._score = CiderReward(references)
        self._path = trainer.out / "validation.csv"
        best, rows = trainer.best_path, self._read()
        self.rows = [row for row in rows if row["step"] <= trainer.step]
        lines = [
            fingerprint(self._examples),
            *(repr((e.texts, e.captions)) for e in self._examples),
        ]
        mark = hashlib.sha256("\n".join(lines).encode("utf-8", "replace"))
        self._mark = mark.hexdigest()
        running = trainer.step < trainer.recipe.schedule.steps
        found = _metadata_of(best)
        # Losses are compared with those from this step on.
        self._since = trainer.step + 1 if found is None else int(found.get("compared_since", 0))
        if running and rows and found and found.get("held_out", self._mark) != self._mark:
            raise UserError(
                f"{best} is the best on other held-out pictures: give “--validate” the same ones "
                "again, or delete that file to start the comparison again."
            )

    def __call__(self) -> None:
        """Measure, if it is time."""
        trainer = self._trainer
        if trainer.step % self._every and trainer.step != trainer.recipe.schedule.steps:
            return
        row = {"step": float(trainer.step)} | self.measure()
        others = [other for other in self.rows if other["step"] >= self._since]
        # A loss that is not finite is never the best.
        best = math.isfinite(row["loss"]) and not any(o["loss"] <= row["loss"] for o in others)
        self.rows.append(row)
        if best:
            more = {"held_out": self._mark, "compared_since": str(self._since)}
            trainer.save_weights(trainer.best_path, **more)
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        self.report(row, ", the best so far" if best else "")

    def report(self, found: dict[str, float], more: str = "") -> None:
        """Print the figures."""
        step = self._trainer.step
        say(f"Step {step}: held-out loss {found['loss']:.4f}, CIDEr {found['cider']:.4f}{more}.")

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The mean loss in nats per token of each picture's first text, and the mean CIDEr of
        greedy captions (1.0 is 100 in papers)."""
        trainer, model = self._trainer, self._trainer.model
        total, count, scores = 0.0, 0, []
        for start in range(0, len(self._examples), _AT_ONCE):
            examples = self._examples[start : start + _AT_ONCE]
            prompts = [
                trainer.prompt(ImageRef(f"{start + i:x}"), example.texts[0], 0.0)
                for i, example in enumerate(examples)
            ]
            features = trainer.in_basis(self._features[start : start + _AT_ONCE])
            batch = pack([[Learned(prompt)] for prompt in prompts]).to(model.device)
            total += model.training_loss(features, batch).item() * len(batch.targets)
            count += len(batch.targets)
            questions, images = map(question_of, prompts), model.project(features.float())
            drawn = sample_answers(model, list(questions), images, 1, CAPTION_TOKENS, 0.0)
            for example, (ids,) in zip(examples, drawn, strict=True):
                scores.append(self._score(example.key, *self._text(ids)))
        return {"loss": total / count, "cider": sum(scores) / len(scores)}

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        """(a caption, cut at its end; whether it has an end)."""
        model = self._trainer.model
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        places = [text.find(stop) for stop in model.config.template.stop if stop in text]
        ended = ids[-1] == model.tokenizer.eos_token_id or bool(places)
        return (text[: min(places)] if places else text), ended

    def _read(self) -> list[dict[str, float]]:
        if not self._path.exists():
            return []
        try:
            with self._path.open(newline="") as file:
                return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._path} is damaged: delete it.") from error


def _metadata_of(best: Path) -> dict[str, str] | None:
    """The metadata of the best projection's file: "held_out", a hash of the examples on which it is
    the best, and "compared_since". None if there is no such file, or a damaged one."""
    try:
        with safe_open(best, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # it will be replaced
        return None


def _same(held_out: Example, trained: Example) -> bool:
    """Are they the same picture?"""
    try:
        return held_out.read() == trained.read()
    except UserError:  # one that cannot be read is not trained on
        return False


Dashboard = Callable[[dict[str, float], int], None]  # name -> value, of a step


def dashboards(out: Path, step: int) -> list[Dashboard]:
    """Logs of a run in the folder `out`, by the packages that are installed: TensorBoard and, if
    $WANDB_API_KEY or $WANDB_MODE is set, Weights & Biases. step: from which the run continues."""
    found: list[Dashboard] = []
    if find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(out), purge_step=step + 1)

        def write(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        found.append(write)
    told = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
    if told and find_spec("wandb") is not None:
        import wandb

        name = out.resolve()
        identity = hashlib.sha256(str(name).encode()).hexdigest()[:16]  # the same for a resumed run
        project = os.environ.get("WANDB_PROJECT", "minigpt4")
        run: Any = wandb.init(project=project, name=name.name, id=identity, resume="allow", dir=out)
        found.append(lambda values, step: run.log(values, step=step))
    return found


def watch(trainer: Trainer, held_out: Sequence[Example], every: int) -> None:
    """Validate every `every` steps if there are held-out examples; log to `dashboards`."""
    validation = Validation(trainer, held_out, every) if held_out else None
    if validation and trainer.step == trainer.recipe.schedule.steps:  # the run has ended before
        validation.report(validation.measure())
    trainer.after_step += [validation] if validation else []
    logs = dashboards(trainer.out, trainer.step)

    def log() -> None:
        row = trainer.rows[-1]
        values = {f"training/{name}": row[name] for name in ("loss", "lr", "samples_per_s")}
        for measured in validation.rows[-1:] if validation else ():
            if measured["step"] == trainer.step:
                values |= {f"held-out/{name}": measured[name] for name in ("loss", "cider")}
        for write in logs:
            write(values, trainer.step)

    trainer.after_step += [log] if logs else []
