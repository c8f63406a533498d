"""The trainer, which trains only the projection, in one process or many (`accelerate launch`).

This is the published recipe; `extended` adds what a small model needs to learn from few pictures.
"""

import csv
import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from minigpt4.config import Schedule
from minigpt4.data.examples import Example, Text
from minigpt4.data.files import replacing
from minigpt4.errors import UserError, say
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.prompt import ImageRef, Prompt
from minigpt4.training.batches import divide, mixed_batches, training_prompt
from minigpt4.training.features import Features, fingerprint
from minigpt4.training.packing import Learned, pack
from minigpt4.training.saving import (
    check_finite,
    plot_losses,
    read_run,
    saved_when_stopped,
    uninterrupted,
)
from minigpt4.weights.checkpoint import save_projection
from minigpt4.weights.load import projection_tensors


@dataclass(frozen=True)
class Recipe:
    """How examples become training prompts, and how long they are trained on.

    instructions: one is drawn for each step, for texts without their own. If empty, as in the
    published first stage: only image embeddings, and cleaned, lower-case captions. replay_share:
    share of each batch that comes from `Trainer.replay`. blend: share of the trained projection in
    the one that is written; the rest is the initial one. crop: show a random part of each picture,
    as the published training does. accumulate: the number of parts in which a batch goes through
    the language model, to save memory. mixture: (number of examples, weight) of each data set among
    the examples, in order. If empty, all examples are alike.
    """

    schedule: Schedule
    instructions: tuple[str, ...] = ()
    seed: int = 42
    checkpoint_every: int = 200  # steps
    blend: float = 1.0
    replay_share: float = 0.0
    crop: bool = False
    metadata: dict[str, str] = field(default_factory=dict)  # written into the projection's file
    accumulate: int = field(default=1, repr=False)
    mixture: tuple[tuple[int, float], ...] = field(default=(), repr=False)


def learning_rate(schedule: Schedule, step: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then a cosine to the floor.

    The cosine counts from step 0, as in the published code (LAVIS's scheduler).
    """
    if step < schedule.warmup_steps:
        share = step / schedule.warmup_steps
        return schedule.warmup_lr + (schedule.peak_lr - schedule.warmup_lr) * share
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / schedule.steps)))
    return schedule.floor_lr + (schedule.peak_lr - schedule.floor_lr) * cosine


def recompute_activations(llm: Any) -> None:
    """Have the language model compute activations again in the backward pass, to save memory."""
    # transformers 5.0 has only the old name, and version 6 will have only the new one.
    enable = getattr(llm, "activation_checkpointing_enable", None)
    (enable or llm.gradient_checkpointing_enable)({"use_reentrant": False})


class Trainer:
    """One training run in the folder `out`: checkpoint.pt, loss.csv, loss.png, projection.

    A subclass changes the recipe by overriding the methods under "what a recipe may change".
    """

    views = 1  # of each picture; 2 with its mirror image

    def __init__(
        self,
        model: MiniGPT4,
        examples: Sequence[Example],
        recipe: Recipe,
        out: str | Path,
        accelerator: Accelerator | None = None,
        feature_cache: Path | None = None,
        replay: Sequence[Example] = (),
    ) -> None:
        self.accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
        self.main = self.accelerator.is_main_process
        self.model, self.recipe = model, recipe
        self.counts = [len(examples), len(replay)]
        self.examples = [*examples, *replay]
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        name = model.config.name
        self.projection_path = self.out / f"{name}.safetensors"
        self.best_path = self.out / f"{name}-best.safetensors"  # validation writes it
        world = self.accelerator.num_processes
        if recipe.schedule.batch_size % world:
            raise UserError(
                f"A batch of {recipe.schedule.batch_size} pictures cannot be divided evenly among "
                f"{world} processes: set “--batch-size” to a multiple of {world}."
            )
        with self.accelerator.main_process_first():
            self.sources = [
                Features(model, source, self.views, feature_cache, self.main, recipe.crop)
                for source in (examples, replay)
            ]
        if model.device.type == "cpu":  # the backward pass of fused attention is many times slower
            model.torch_llm.set_attn_implementation("eager")
        projection = model.projection.float().requires_grad_(True)
        self.start = {k: v.detach().clone() for k, v in projection.state_dict().items()}
        self.identity = self._identity()
        self._prepare()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [projection.weight], "weight_decay": recipe.schedule.weight_decay},
                {"params": [projection.bias], "weight_decay": 0.0},
            ],
            lr=recipe.schedule.peak_lr,
            betas=recipe.schedule.betas,
        )
        self.step = 0
        self.after_step: list[Callable[[], None]] = []  # called by the main process
        self.rows: list[dict[str, float]] = []  # loss.csv

    def _identity(self) -> str:
        """A hash of the model, data and recipe. A checkpoint with another hash is not resumed."""
        recipe = replace(self.recipe, metadata={}, checkpoint_every=0)
        lines = [self.model.config.name, self.model.quantize, repr(recipe), str(self.counts)]
        lines += [fingerprint(self.examples), *(str(source.crops) for source in self.sources)]
        lines += [repr((example.texts, example.captions)) for example in self.examples]
        lines += [repr(recipe.mixture)] if recipe.mixture else []
        lines += [repr(t.earlier) for e in self.examples for t in e.texts if t.earlier]
        identity = hashlib.sha256("\n".join(lines).encode("utf-8", "replace"))
        for tensor in self.start.values():
            identity.update(tensor.cpu().numpy().tobytes())
        return identity.hexdigest()

    # --- what a recipe may change -----------------------------------------------------------

    def _prepare(self) -> None:
        """Called once, before the optimizer is made."""

    def _view(self, draw: random.Random) -> int:
        """The view of a picture that a step shows."""
        return 0

    def _text_weights(self, example: Example, texts: Sequence[Text]) -> list[float]:
        """The weight of each of a picture's texts in the loss."""
        return [1.0] * len(texts)

    def _sample_answers(
        self,
        step: int,
        rows: list[list[Learned]],
        chosen: Sequence[tuple[int, int]],
        features: Tensor,
    ) -> None:
        """Replace prompts in `rows` by the model's own answers."""

    def in_basis(self, features: Tensor) -> Tensor:
        """Features in the basis that the projection reads while it is trained."""
        return features

    def _weights_to_save(self) -> dict[str, Tensor]:
        """The projection as it is used after training."""
        return projection_tensors(self.model)

    def _state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {
            "projection": self.model.projection.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "identity": self.identity,
            "rows": self.rows,
            "unreadable": [sorted(source.unreadable) for source in self.sources],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """The opposite of `_state`."""
        self.model.projection.load_state_dict(state["projection"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows = state["step"], state["rows"]
        for source, unreadable in zip(self.sources, state.get("unreadable", ()), strict=False):
            source.unreadable.update(unreadable)

    def _progress(self) -> str:
        """A text shown after the loss while training."""
        return ""

    # --- one step ---------------------------------------------------------------------------

    def prompts(
        self, step: int, indices: Sequence[int]
    ) -> tuple[list[list[Learned]], list[tuple[int, int]]]:
        """A step's training prompts, one row per picture; the (example, view) pairs to encode.

        Random draws depend only on the seed, the step and the example, so that a resumed or
        distributed run repeats them.
        """
        schedule = self.recipe.schedule
        rows, chosen = [], []
        # One instruction for all pictures of a step: then the texts of a picture share a prompt,
        # and pictures can be answered together.
        pick = random.Random(f"{self.recipe.seed} {step}").random()
        for place, index in enumerate(indices):
            draw = random.Random(f"{self.recipe.seed} {step} {place} {index}")
            example = self.examples[index]
            texts = draw.sample(example.texts, min(schedule.texts_per_picture, len(example.texts)))
            # A batch may contain a picture twice, so its place is part of the key.
            ref = ImageRef(f"{place:x}")
            weights = self._text_weights(example, texts)
            prompts = [self.prompt(ref, text, pick) for text in texts]
            rows.append(list(map(Learned, prompts, weights)))
            chosen.append((index, self._view(draw)))
        return rows, chosen

    def prompt(self, ref: ImageRef, text: Text, pick: float) -> Prompt:
        """The training prompt of one text. pick: as in `training_prompt`."""
        limit = self.recipe.schedule.max_text_tokens
        return training_prompt(self.model, ref, text, self.recipe.instructions, pick, limit)

    def features(self, chosen: Sequence[tuple[int, int]], seed: str = "") -> Tensor:
        """(example, view) pairs -> features [pictures, image_tokens, projection_in]."""
        examples, replay = self.sources
        count = self.counts[0]
        replayed = [i >= count for i, _ in chosen]
        parts = []
        if not all(replayed):
            parts.append(examples([(i, v) for i, v in chosen if i < count], seed))
        if any(replayed):
            parts.append(replay([(i - count, v) for i, v in chosen if i >= count], seed))
        joined = torch.cat(parts)  # examples, then replay: restore the order of `chosen`
        order = torch.tensor(replayed).argsort(stable=True).argsort()
        return self.in_basis(joined[order.to(joined.device)])

    def _readable(self, indices: Sequence[int]) -> list[int]:
        """The batch, in which pictures that cannot be decoded are replaced by others of the same
        source. Only this process's share is decoded."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        found, offset = list(indices), 0
        for source, count in zip(self.sources, self.counts, strict=True):
            own = [
                place
                for place in range(rank, len(found), world)
                if offset <= indices[place] < offset + count
            ]
            readable = source.readable([indices[place] - offset for place in own])
            for place, index in zip(own, readable, strict=True):
                found[place] = offset + index
            offset += count
        return found

    def loss_and_gradient(self, step: int, indices: Sequence[int]) -> float:
        """The mean loss over the answer tokens of all processes, in nats per token.

        Its gradient is left in the projection. indices: the whole batch; each process takes its
        share.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        indices = self._readable(indices)
        rows, chosen = self.prompts(step, indices)
        rows, chosen = rows[rank::world], chosen[rank::world]
        features = self.features(chosen, f"{self.recipe.seed} {step}")
        self._sample_answers(step, rows, chosen, features)
        parts = min(self.recipe.accumulate, len(rows))
        batches = [pack(rows[part::parts]) for part in range(parts)]
        count = torch.tensor(float(sum(len(b.targets) for b in batches)), device=features.device)
        total = self.accelerator.reduce(count, "sum")
        loss = torch.zeros((), device=features.device)
        llm = self.model.torch_llm
        # transformers recomputes activations only in training mode; there is no dropout.
        llm.train(any(getattr(m, "gradient_checkpointing", False) for m in llm.modules()))
        for part, batch in enumerate(batches):
            mean = self.model.training_loss(features[part::parts], batch.to(self.model.device))
            part_loss = mean * len(batch.targets) / total  # its part of the mean over all tokens
            part_loss.backward()
            loss += part_loss.detach()
        llm.eval()
        for parameter in self.model.projection.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        return self.accelerator.reduce(loss, "sum").item()

    # --- the run ----------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the last step of the schedule. Returns the path of the projection."""
        schedule = self.recipe.schedule
        replayed = round(schedule.batch_size * self.recipe.replay_share)
        sizes, counts = [schedule.batch_size - replayed, replayed], self.counts
        for count, size, name in zip(counts, sizes, ("data", "replay"), strict=True):
            if count and not size:
                raise UserError(
                    f"A batch of {schedule.batch_size} pictures has no place for “--{name}”: raise "
                    "“--batch-size”, or change “--replay-share”."
                )
        if self.recipe.mixture:
            counts = [*(count for count, _ in self.recipe.mixture), self.counts[1]]
            weights = [weight for _, weight in self.recipe.mixture]
            sizes = [*divide(sizes[0], weights), replayed]
        order = mixed_batches(counts, sizes, self.recipe.seed, self.step)
        bar = tqdm(total=schedule.steps, initial=self.step, disable=not self.main, desc="training")
        with bar, saved_when_stopped(self):
            while self.step < schedule.steps:
                self._train_step(next(order), bar)
        count = sum(len(source.unreadable) for source in self.sources)
        if count and self.main:
            say(f"{count} of {len(self.examples)} pictures could not be used and were left out.")
        return self.projection_path

    def _train_step(self, indices: list[int], bar: tqdm) -> None:
        schedule = self.recipe.schedule
        started = time.perf_counter()
        rate = learning_rate(schedule, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.loss_and_gradient(self.step, indices)
        check_finite(torch.tensor(loss), self.step + 1)
        if schedule.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.projection.parameters(), schedule.clip_norm)
        with uninterrupted():
            self.optimizer.step()
            self.step += 1
            speed = schedule.batch_size / (time.perf_counter() - started)
            self.rows.append({"step": self.step, "loss": loss, "lr": rate, "samples_per_s": speed})
        recent = [row["loss"] for row in self.rows[-50:]]
        mean = sum(recent) / len(recent)
        bar.set_postfix_str(
            f"loss {mean:.3f}, lr {rate:.1e}, {speed:.1f} pictures/s{self._progress()}"
        )
        bar.update()
        if self.main:
            for call in self.after_step:
                call()
        if self.step % self.recipe.checkpoint_every == 0 or self.step == schedule.steps:
            self.save()

    def save(self) -> bool:
        """In the main process, after a step: write checkpoint, projection, loss.csv and
        loss.png."""
        if not self.main or not self.rows:
            return False
        with replacing(self.out / "checkpoint.pt") as partial:
            torch.save(self._state(), partial)
        self.save_weights(self.projection_path)
        with (self.out / "loss.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "loss", "lr", "samples_per_s"])
            writer.writeheader()
            writer.writerows(self.rows)
        plot_losses(self.rows, self.out / "loss.png")
        return True

    def save_weights(self, path: Path, **metadata: str) -> None:
        """Write the projection of this step. metadata: added to the recipe's."""
        weights = self._weights_to_save()
        for name, start in self.start.items():  # weight averaging: WiSE-FT, Wortsman et al., 2022
            weights[name] = torch.lerp(start, weights[name].detach(), self.recipe.blend)
        weights = {k: v.half() for k, v in weights.items()}
        for tensor in weights.values():
            check_finite(tensor, self.step)
        metadata = self.recipe.metadata | {"step": str(self.step)} | metadata
        save_projection(weights, path, metadata)

    def resume(self) -> bool:
        """Continue from the checkpoint of this folder; False if there is none.

        UserError if the folder has the best projection of a run without a checkpoint.
        """
        state = read_run(self.out / "checkpoint.pt", self.identity, self.model.device)
        if state is None:
            if self.best_path.exists():
                raise UserError(
                    f"{self.best_path} is an earlier run's, which left no checkpoint: delete it, "
                    "or choose another folder with “--out”."
                )
            return False
        self._restore(state)
        return True
