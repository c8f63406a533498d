"""Trains the projection and nothing else, on one process or many (`accelerate launch`)."""

import csv
import hashlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm import tqdm

from minigpt4.config import ModelConfig, PooledMap, Schedule
from minigpt4.errors import UserError
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.prompt import ImageRef, Prompt, encode_training
from minigpt4.training.data import (
    Example,
    Text,
    mixed_batches,
    published_caption,
    random_resized_crop,
)
from minigpt4.training.packing import pack
from minigpt4.training.selfcritical import CiderReward, advantages, sample
from minigpt4.weights.checkpoint import save_projection
from minigpt4.weights.llm import cpu_dtype
from minigpt4.weights.load import projection_tensors

_ENCODED_AT_ONCE = 8  # pictures: on a CPU more of them fall out of its cache

PUBLISHED_STAGE1_END = "\n"  # `end_sym` where the published configuration sets none


@dataclass(frozen=True)
class Recipe:
    """How examples become training prompts.

    instructions: one is drawn for each picture and step, for texts without their own; empty: the
    published first stage, bare image embeddings and cleaned, lower-cased captions.
    consensus: where above 0, a picture's captions count by how well they agree with its others:
    a softmax of their CIDEr (see `selfcritical`) at this temperature, 1 on average.
    denoise: where above 0, features pass through Wiener's filter against what differs between a
    picture and its mirror image, this many times over; the filter becomes part of the weights.
    eigenbasis: let AdamW work in the eigenbasis of the features' covariance, where its own scaling
    of each weight whitens them (as SOAP does, Vyas et al., 2024, for the inputs alone).
    replay_share: of each batch, pictures out of `Trainer.replay`. samples: where above 1, those of
    them that have several captions are not taught these: as many answers are drawn at
    `sample_temperature`, and made likelier or less by their CIDEr (see `selfcritical`),
    `reward_weight` times as strong as the rest.
    """

    schedule: Schedule
    instructions: tuple[str, ...] = ()
    seed: int = 42
    checkpoint_every: int = 200
    blend: float = 1.0  # of what was learned in the projection written; the rest is the start's
    consensus: float = 0.0
    denoise: float = 0.0
    eigenbasis: bool = False
    replay_share: float = 0.0
    samples: int = 0
    sample_temperature: float = 0.6
    reward_weight: float = 2.0
    mirror: bool = False  # show each picture's mirror image half of the time
    crop: bool = False  # show random parts of the pictures, as the published training does
    metadata: dict[str, str] = field(default_factory=dict)


def learning_rate(schedule: Schedule, step: int) -> float:
    """Of step `step` (from 0): linear warm-up, then a cosine to the floor.

    The cosine counts from step 0, as in the published code (LAVIS's scheduler).
    """
    if step < schedule.warmup_steps:
        share = step / schedule.warmup_steps
        return schedule.warmup_lr + (schedule.peak_lr - schedule.warmup_lr) * share
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / schedule.steps)))
    return schedule.floor_lr + (schedule.peak_lr - schedule.floor_lr) * cosine


class Features:
    """What the frozen encoder and bridge make of the pictures of one source of examples.

    With a cache folder each picture is encoded once and kept as 16-bit floats in one file, named
    by the model, its weights and the pictures' keys: [examples, views, image_tokens,
    projection_in]. View 1 is the mirror image.
    """

    def __init__(
        self,
        model: MiniGPT4,
        examples: Sequence[Example],
        views: int = 1,
        cache: Path | None = None,
        progress: bool = False,
        crop: bool = False,
    ) -> None:
        self._model = model
        self._examples = examples
        self.views = views
        self.crops = crop and cache is None
        self._stored: np.ndarray | None = None
        if cache is not None and examples:
            self._stored = self._fill(cache, progress)

    def __call__(self, chosen: Sequence[tuple[int, int]], seed: str = "") -> Tensor:
        """(example, view) pairs -> features [pictures, image_tokens, projection_in].

        seed: what random crops are drawn from.
        """
        if self._stored is not None:
            rows = np.stack([self._stored[example, view] for example, view in chosen])
            return torch.from_numpy(rows).to(self._model.device)
        return self._encode(chosen, seed)

    def _encode(self, chosen: Sequence[tuple[int, int]], seed: str = "") -> Tensor:
        pictures = [self._examples[example].picture() for example, _ in chosen]
        if self.crops:
            draws = (random.Random(f"{seed} {example}") for example, _ in chosen)
            pictures = [random_resized_crop(p, d) for p, d in zip(pictures, draws, strict=True)]
        device = self._model.device
        # On a GPU the encoder's weights are 16 bit already; on a CPU with native bfloat16 this more
        # than halves the time, on any other it takes twenty times as long.
        native = device.type == "cpu" and cpu_dtype() == torch.bfloat16
        fast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=native)
        with torch.inference_mode(), fast:
            pixels = self._model.pixel_values(pictures)
            flip = torch.tensor([view for _, view in chosen], device=device).bool()
            pixels[flip] = pixels[flip].flip(-1)
            features = self._model.encode_features(pixels)
        return features.clone()

    def _fill(self, cache: Path, progress: bool) -> np.ndarray:
        config = self._model.config
        shape = (len(self._examples), self.views, config.image_tokens, config.projection_in)
        what = [config.name, repr(config.vision), repr(config.bridge), str(shape)]
        what += [_fingerprint_of_weights(self._model), fingerprint(self._examples)]
        name = hashlib.sha256(" ".join(what).encode()).hexdigest()[:16]
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / f"features-{config.name}-{name}.npy"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.part")  # another run may fill it as well
            try:
                stored = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
                self._encode_all(stored, progress)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return np.load(path, mmap_mode="r")

    def _encode_all(self, stored: np.memmap, progress: bool) -> None:
        starts = range(0, len(self._examples), _ENCODED_AT_ONCE)
        for start in tqdm(starts, desc="encoding pictures", disable=not progress):
            numbers = range(start, min(start + _ENCODED_AT_ONCE, len(self._examples)))
            for view in range(self.views):
                encoded = self._encode([(i, view) for i in numbers])
                stored[start : start + len(numbers), view] = encoded.half().cpu().numpy()
        stored.flush()


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of which pictures these are, in order, as their files stood."""
    lines = "\n".join(f"{example.key} {example.version}" for example in examples)
    return hashlib.sha256(lines.encode("utf-8", "replace")).hexdigest()[:16]


def _fingerprint_of_weights(model: MiniGPT4) -> str:
    """A hash of the first numbers of each of the frozen encoder's and bridge's tensors, in 16 bit,
    as which all devices have them."""
    tensors = [*model.encoder.state_dict().values(), *model.bridge.state_dict().values()]
    first = torch.cat([tensor.flatten()[:16].half() for tensor in tensors])
    return hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()[:16]


class Trainer:
    """One training run in the folder `out`: checkpoint.pt, loss.csv, loss.png, projection."""

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
        world = self.accelerator.num_processes
        if recipe.schedule.batch_size % world:
            raise UserError(
                f"A batch of {recipe.schedule.batch_size} pictures cannot be shared evenly by "
                f"{world} processes: choose “--batch-size” as a multiple of {world}."
            )
        with self.accelerator.main_process_first():
            self.views = 2 if recipe.mirror or recipe.denoise else 1
            self.sources = [
                Features(model, source, self.views, feature_cache, self.main, recipe.crop)
                for source in (examples, replay)
            ]
        if model.device.type == "cpu":  # fused attention's backward is many times slower there
            model.llm.set_attn_implementation("eager")
        projection = model.projection.float().requires_grad_(True)
        self.start = {k: v.detach().clone() for k, v in projection.state_dict().items()}
        self.identity = self._identity()
        self.basis: Tensor | None = None  # what features are multiplied with
        if recipe.eigenbasis or recipe.denoise:
            # Another processor's may differ in signs, and gradients are summed.
            eigenvectors, clean = broadcast(self._basis())
            self.basis = clean.T @ eigenvectors
            projection.weight.data = projection.weight.data @ eigenvectors
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [projection.weight], "weight_decay": recipe.schedule.weight_decay},
                {"params": [projection.bias], "weight_decay": 0.0},
            ],
            lr=recipe.schedule.peak_lr,
            betas=recipe.schedule.betas,
        )
        self.reward = None
        if recipe.samples == 1:
            raise UserError("“--samples” compares captions with each other: give 2 or more.")
        stop = model.config.template.stop[0]
        if recipe.samples and stop not in model.config.template.controls:
            raise UserError(
                f"“--samples” needs answers that end in a token of their own, and those of "
                f"{model.config.name} end in “{stop}”: leave it out."
            )
        if recipe.samples or recipe.consensus:
            captioned = [e for e in self.examples if len(e.captions) > 1]
            self.reward = CiderReward({e.key: e.captions for e in captioned})
        self._agreement: dict[str, dict[str, float]] = {}  # picture -> caption -> weight
        self.rewards: list[float] = []  # of the pictures answered since the start
        self.step = 0
        self.rows: list[dict[str, float]] = []  # loss.csv

    def _identity(self) -> str:
        """What makes this run itself: a checkpoint of another is not resumed."""
        recipe = replace(self.recipe, metadata={}, checkpoint_every=0)
        lines = [self.model.config.name, self.model.quantize, repr(recipe), str(self.counts)]
        lines += [fingerprint(self.examples), *(str(source.crops) for source in self.sources)]
        lines += [repr((example.texts, example.captions)) for example in self.examples]
        identity = hashlib.sha256("\n".join(lines).encode("utf-8", "replace"))
        for tensor in self.start.values():
            identity.update(tensor.cpu().numpy().tobytes())
        return identity.hexdigest()

    def _basis(self) -> tuple[Tensor, Tensor]:
        """(eigenvectors of the features' covariance in columns, filter), each [projection_in] * 2.

        Measured on up to 1,024 pictures. One-hot-like features (nano's classes) stay as they are:
        theirs are nearly all alike, and rotating them would mix what is apart.
        """
        config, recipe = self.model.config, self.recipe
        width = config.projection_in
        if isinstance(config.bridge, PooledMap):
            width -= config.vision.classes
        draw = random.Random(recipe.seed)
        chosen = draw.sample(range(len(self.examples)), min(1024, len(self.examples)))
        covariance, noise = torch.zeros(2, width, width, device=self.model.device)
        for start in range(0, len(chosen), 64):
            part = chosen[start : start + 64]
            vectors = self.features([(index, 0) for index in part])[..., :width].float()
            covariance += _products(vectors)
            if recipe.denoise:
                mirrored = self.features([(index, 1) for index in part])[..., :width].float()
                noise += _products(vectors - self._turned_back(mirrored)) / 2
        basis, clean = torch.eye(config.projection_in, device=self.model.device).repeat(2, 1, 1)
        if recipe.eigenbasis:
            basis[:width, :width] = torch.linalg.eigh(covariance / len(chosen)).eigenvectors
        if recipe.denoise:
            floor = torch.eye(width, device=self.model.device) * covariance.trace() / width * 1e-3
            both = covariance + recipe.denoise * noise + floor
            clean[:width, :width] = torch.linalg.solve(both, covariance).T
        return basis, clean

    def _turned_back(self, mirrored: Tensor) -> Tensor:
        """Features of mirror images, their cells where the picture itself has them."""
        if not isinstance(self.model.config.bridge, PooledMap):
            return mirrored
        grid = self.model.config.bridge.grid
        cells = mirrored[:, : grid * grid].unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
        return torch.cat([cells, mirrored[:, grid * grid :]], dim=1)

    # --- one step ---------------------------------------------------------------------------

    def prompts(
        self, step: int, indices: Sequence[int]
    ) -> tuple[list[list[Prompt]], list[tuple[int, int]], list[list[float]]]:
        """A step's training prompts, a row a picture, the (example, view) pairs to encode, and
        how much each prompt counts.

        Draws depend on the seed, the step and the example alone: a resumed or a distributed run
        makes the same ones.
        """
        schedule = self.recipe.schedule
        rows, chosen, weights = [], [], []
        # One draw a step: a picture's texts then share their prompt, and pictures can be answered
        # together.
        pick = random.Random(f"{self.recipe.seed} {step}").random()
        for place, index in enumerate(indices):
            draw = random.Random(f"{self.recipe.seed} {step} {place} {index}")
            example = self.examples[index]
            texts = draw.sample(example.texts, min(schedule.texts_per_picture, len(example.texts)))
            # The same picture may stand twice in a batch, so its place is part of the key.
            ref = ImageRef(f"{place:x}")
            rows.append([self._prompt(ref, text, pick) for text in texts])
            chosen.append((index, draw.randrange(2 if self.recipe.mirror else 1)))
            weights.append(self._consensus(example, texts))
        return rows, chosen, weights

    def _consensus(self, example: Example, texts: Sequence[Text]) -> list[float]:
        """How much each of a picture's texts counts."""
        captions = example.captions
        if not self.recipe.consensus or len(captions) < 2:
            return [1.0] * len(texts)
        if example.key not in self._agreement:
            scores = torch.tensor(self.reward.agreement(example.key))
            shares = (scores / self.recipe.consensus).softmax(0) * len(captions)
            self._agreement[example.key] = dict(zip(captions, shares.tolist(), strict=True))
        return [self._agreement[example.key].get(text.answer, 1.0) for text in texts]

    def features(self, chosen: Sequence[tuple[int, int]], seed: str = "") -> Tensor:
        """(example, view) pairs -> features [pictures, image_tokens, projection_in]."""
        examples, replay = self.sources
        count = self.counts[0]
        old = [i >= count for i, _ in chosen]
        parts = []
        if not all(old):
            parts.append(examples([(i, v) for i, v in chosen if i < count], seed))
        if any(old):
            parts.append(replay([(i - count, v) for i, v in chosen if i >= count], seed))
        joined = torch.cat(parts)  # examples first, then replay: back into the order asked for
        order = sorted(range(len(chosen)), key=lambda place: old[place])
        joined = joined[torch.tensor(order, device=joined.device).argsort()]
        return joined if self.basis is None else joined.float() @ self.basis

    def _prompt(self, ref: ImageRef, text: Text, pick: float) -> Prompt:
        config: ModelConfig = self.model.config
        choices = text.instructions or self.recipe.instructions or ("",)
        instruction = choices[int(pick * len(choices))]
        answer = text.answer.strip() if instruction else published_caption(text.answer)
        return encode_training(
            (ref, instruction) if instruction else (ref,),
            answer,
            config.template,
            self.model.tokenizer,
            config.image_tokens,
            self.recipe.schedule.max_text_tokens,
            wrap=bool(instruction),
            end=None if instruction else PUBLISHED_STAGE1_END,
        )

    def loss_and_gradient(self, step: int, indices: Sequence[int]) -> float:
        """Mean loss over all processes' answer tokens; leaves its gradient in the projection.

        indices: the whole batch; each process takes its share.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows, chosen, weights = (part[rank::world] for part in self.prompts(step, indices))
        index = {row[0].images[0][1].key: i for i, row in enumerate(rows)}
        features = self.features(chosen, f"{self.recipe.seed} {step}")
        temperatures = [[1.0] * len(row) for row in rows]
        if self.recipe.samples:
            self.score_samples(step, rows, chosen, features, weights, temperatures)
        batch = pack(rows, index, weights, temperatures).to(self.model.device)
        mean = self.model.training_loss(features, batch)
        count = torch.tensor(float(len(batch.targets)), device=self.model.device)
        total = self.accelerator.reduce(count, "sum")
        loss = mean * count / total  # this process's share of the mean over all tokens
        loss.backward()
        for parameter in self.model.projection.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        return self.accelerator.reduce(loss.detach(), "sum").item()

    def score_samples(
        self,
        step: int,
        rows: list[list[Prompt]],
        chosen: Sequence[tuple[int, int]],
        features: Tensor,
        weights: list[list[float]],
        temperatures: list[list[float]],
    ) -> None:
        """Put drawn answers in the place of the replayed pictures' captions, in `rows`.

        Their advantages come into `weights`, and the temperature they were drawn at.
        """
        recipe, limit = self.recipe, self.recipe.schedule.max_caption_tokens
        replayed = [
            i
            for i, (example, _) in enumerate(chosen)
            if example >= self.counts[0] and len(self.examples[example].captions) > 1
        ]
        # Draw for pictures with the same instruction together: their prompts are equally long.
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in replayed:
            groups.setdefault(tuple(_question(rows[i][0]).ids), []).append(i)
        generator = torch.Generator(self.model.device).manual_seed(
            hash((recipe.seed, step, self.accelerator.process_index)) % 2**63
        )
        tokenizer = self.model.tokenizer
        for members in groups.values():
            with torch.inference_mode():
                embeds = self.model.projection(features[members].float())
                inputs = torch.cat(
                    [
                        self.model.embed(question, {question.images[0][1].key: one})
                        for question, one in zip(
                            (_question(rows[i][0]) for i in members), embeds, strict=True
                        )
                    ]
                )
            drawn = sample(
                self.model, inputs, recipe.samples, limit, recipe.sample_temperature, generator
            )
            for i, answers in zip(members, drawn, strict=True):
                key = self.examples[chosen[i][0]].key
                rewards = []
                for ids in answers:
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    rewards.append(self.reward(key, text, ids[-1] == tokenizer.eos_token_id))
                self.rewards.append(sum(rewards) / len(rewards))
                rows[i] = [_answered(_question(rows[i][0]), ids) for ids in answers]
                weights[i] = [recipe.reward_weight * a for a in advantages(rewards)]
                temperatures[i] = [recipe.sample_temperature] * len(answers)

    # --- the run ----------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the schedule's last step; the path of the projection that was written."""
        schedule = self.recipe.schedule
        replayed = round(schedule.batch_size * self.recipe.replay_share)
        sizes = [schedule.batch_size - replayed, replayed]
        order = mixed_batches(self.counts, sizes, self.recipe.seed, self.step)
        bar = tqdm(total=schedule.steps, initial=self.step, disable=not self.main, desc="training")
        try:
            self._steps(order, bar)
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
        return self.projection_path

    def _steps(self, order: Iterator[list[int]], bar: tqdm) -> None:
        schedule = self.recipe.schedule
        while self.step < schedule.steps:
            started = time.perf_counter()
            rate = learning_rate(schedule, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            loss = self.loss_and_gradient(self.step, next(order))
            if schedule.clip_norm:
                torch.nn.utils.clip_grad_norm_(
                    self.model.projection.parameters(), schedule.clip_norm
                )
            with _whole():
                self.optimizer.step()
                self.step += 1
                samples = schedule.batch_size / (time.perf_counter() - started)
                self.rows.append(
                    {"step": self.step, "loss": loss, "lr": rate, "samples_per_s": samples}
                )
            recent = [row["loss"] for row in self.rows[-50:]]
            said = f"loss {sum(recent) / len(recent):.3f}, lr {rate:.1e}, {samples:.1f} pictures/s"
            if recent_rewards := self.rewards[-400:]:
                said += f", CIDEr of samples {sum(recent_rewards) / len(recent_rewards):.3f}"
            bar.set_postfix_str(said)
            bar.update()
            if self.step % self.recipe.checkpoint_every == 0 or self.step == schedule.steps:
                self.save()

    @property
    def projection_path(self) -> Path:
        return self.out / f"{self.model.config.name}.safetensors"

    def save(self) -> None:
        """Checkpoint, projection, loss.csv and loss.png, by the main process."""
        if not self.main:
            return
        state = {
            "projection": self.model.projection.state_dict(),
            "basis": self.basis,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "identity": self.identity,
            "rows": self.rows,
        }
        partial = self.out / "checkpoint.part"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")
        weights = projection_tensors(self.model)
        if self.basis is not None:
            weights["weight"] = weights["weight"].detach() @ self.basis.T
        for name, start in self.start.items():  # weight averaging: WiSE-FT, Wortsman et al., 2022
            weights[name] = torch.lerp(start, weights[name].detach(), self.recipe.blend)
        weights = {k: v.half() for k, v in weights.items()}
        save_projection(weights, self.projection_path, self.recipe.metadata)
        with (self.out / "loss.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "loss", "lr", "samples_per_s"])
            writer.writeheader()
            writer.writerows(self.rows)
        plot_losses(self.rows, self.out / "loss.png")

    def resume(self) -> bool:
        """Go on from this folder's checkpoint, if it has one; true where it did."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            identity = state["identity"]
        except Exception as error:
            raise UserError(
                f"{path} is damaged: delete it to start again, or give another folder by “--out”."
            ) from error
        if identity != self.identity:
            raise UserError(
                f"{path} belongs to a run with other data, model or hyperparameters: give the same "
                "options, or another folder by “--out”."
            )
        self.model.projection.load_state_dict(state["projection"])
        self.basis = state["basis"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows = state["step"], state["rows"]
        return True


@contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits until the block has ended (in the main thread, where it is heard)."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed = []
    signal.signal(signal.SIGINT, lambda *call: pressed.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(*pressed[0])


def _products(vectors: Tensor) -> Tensor:
    """[pictures, image_tokens, width] -> the sum of the vectors' outer products."""
    vectors = vectors.flatten(0, 1)
    return vectors.T @ vectors


def _question(prompt: Prompt) -> Prompt:
    """The part of a training prompt before what is learned."""
    length = prompt.loss_mask.index(True)
    return Prompt(
        prompt.ids[:length], prompt.keys[:length], prompt.images, prompt.loss_mask[:length]
    )


def _answered(question: Prompt, ids: Sequence[int]) -> Prompt:
    question.add_tokens(ids, learn=True)
    return question


def plot_losses(rows: Sequence[dict[str, float]], path: Path) -> None:
    """The loss over the steps, raw and averaged over 25 steps, as PNG."""
    from matplotlib.figure import Figure

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = min(25, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="each step")
    axes.plot(steps[window - 1 :], smooth, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    figure.savefig(path, dpi=120)
