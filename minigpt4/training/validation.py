"""Watches a run: held-out loss and caption score, the best projection, logs for dashboards."""

import csv
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt4.data.examples import Example, usable
from minigpt4.errors import UserError, say
from minigpt4.model.prompt import ImageRef, Prompt
from minigpt4.training.extended import question_of
from minigpt4.training.features import Features, fingerprint
from minigpt4.training.packing import pack
from minigpt4.training.selfcritical import CiderReward, sample
from minigpt4.training.trainer import Trainer

PICTURES = 100  # of the held-out data, at most
CAPTION_TOKENS = 40  # longest caption that is scored
_AT_ONCE = 8  # pictures in a batch


class Validation:
    """Measures a trainer on held-out examples every `every` steps, and after the last one.

    The rows go into validation.csv. The projection with the lowest held-out loss is kept in
    MODEL-best.safetensors, beside the last one. A resumed run continues both. UserError where it
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
        # The first step whose loss the next ones are compared with.
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
        # Not a number is no loss.
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
        """Say what was measured."""
        step = self._trainer.step
        say(f"Step {step}: held-out loss {found['loss']:.4f}, CIDEr {found['cider']:.4f}{more}.")

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The mean loss in nats per token of each picture's first text, and the mean CIDEr of
        greedy captions (1.0 is 100 in papers)."""
        prompts = [
            self._trainer.prompt(ImageRef(f"{i:x}"), example.texts[0], 0.0)
            for i, example in enumerate(self._examples)
        ]
        total = count = 0.0
        for start in range(0, len(prompts), _AT_ONCE):
            part = prompts[start : start + _AT_ONCE]
            features = self._embedded(range(start, start + len(part)))
            batch = pack([[prompt] for prompt in part]).to(self._trainer.model.device)
            total += self._trainer.model.training_loss(features, batch).item() * len(batch.targets)
            count += len(batch.targets)
        scores = self._scores([question_of(prompt) for prompt in prompts])
        return {"loss": total / count, "cider": sum(scores) / len(scores)}

    def _embedded(self, places: Sequence[int]) -> Tensor:
        return self._trainer.in_basis(self._features[list(places)])

    def _scores(self, questions: Sequence[Prompt]) -> list[float]:
        """The CIDEr of a greedy caption for each picture. Questions of equal length go together."""
        groups: dict[int, list[int]] = defaultdict(list)
        for place, question in enumerate(questions):
            groups[len(question.ids)].append(place)
        scores = []
        for members in groups.values():
            for start in range(0, len(members), _AT_ONCE):
                part = members[start : start + _AT_ONCE]
                for place, ids in zip(part, self._captions(part, questions), strict=True):
                    scores.append(self._score(self._examples[place].key, *self._text(ids)))
        return scores

    def _captions(self, places: Sequence[int], questions: Sequence[Prompt]) -> list[list[int]]:
        model = self._trainer.model
        embeds = model.project(self._embedded(places).float())
        inputs = [
            model.embed(questions[place], {questions[place].images[0][1].key: one})
            for place, one in zip(places, embeds, strict=True)
        ]
        drawn = sample(model, torch.cat(inputs), 1, CAPTION_TOKENS, 0.0)
        return [answers[0] for answers in drawn]

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        """(a caption without what follows its end, whether it has one)."""
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
    """What is written in the best projection's file: "held_out", the mark of the examples on which
    it is the best, and "compared_since". None if there is no such file, or a damaged one."""
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


def logged(trainer: Trainer, validation: Validation | None) -> dict[str, float]:
    """What is logged of the last step: name -> value."""
    row, step = trainer.rows[-1], trainer.step
    found = {f"training/{name}": row[name] for name in ("loss", "lr", "samples_per_s")}
    measured = validation.rows[-1:] if validation else []
    if measured and measured[0]["step"] == step:
        found |= {f"held-out/{name}": measured[0][name] for name in ("loss", "cider")}
    return found


class TensorBoard:
    """Writes what is logged for `tensorboard --logdir`."""

    def __init__(self, trainer: Trainer, validation: Validation | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._trainer, self._validation = trainer, validation
        self._writer: Any = SummaryWriter(str(trainer.out), purge_step=trainer.step + 1)

    @staticmethod
    def available() -> bool:
        """Whether the package is installed."""
        return find_spec("tensorboard") is not None

    def __call__(self) -> None:
        """Write the last step."""
        for name, value in logged(self._trainer, self._validation).items():
            self._writer.add_scalar(name, value, self._trainer.step)
        self._writer.flush()


class WeightsAndBiases:
    """Sends what is logged to Weights & Biases, or, with $WANDB_MODE=offline, writes it down.

    A run that is resumed goes on as the same run there.
    """

    def __init__(self, trainer: Trainer, validation: Validation | None) -> None:
        import wandb

        self._trainer, self._validation = trainer, validation
        name = trainer.out.resolve()
        identity = hashlib.sha256(str(name).encode()).hexdigest()[:16]
        project = os.environ.get("WANDB_PROJECT", "minigpt4")
        self._run: Any = wandb.init(
            project=project, name=name.name, id=identity, resume="allow", dir=trainer.out
        )

    @staticmethod
    def available() -> bool:
        """Whether the package is installed, and told where to send its logs."""
        chosen = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
        return bool(chosen) and find_spec("wandb") is not None

    def __call__(self) -> None:
        """Log the last step."""
        self._run.log(logged(self._trainer, self._validation), step=self._trainer.step)
