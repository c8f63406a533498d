"""The trainer of small models' projection: a mixture of texts, resumable at any step.

AdamW works in the eigenbasis of the encoders' features and starts from a ridge regression onto the
words' embeddings. The language model is frozen, except for adapters, if there are any. The loss is
computed over the tokens that occur in the data.
"""

import hashlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.data.files import replacing
from minigpt4.errors import say
from minigpt4.model.minigpt4 import MiniGPT4, TrainingBatch, at_length
from minigpt4.model.prompt import ImageRef, Message, Prompt, encode_chat, encode_text
from minigpt4.training.adapters import Adapted, finished, tensors_of
from minigpt4.training.batches import batches
from minigpt4.training.features import fingerprint
from minigpt4.training.mixture import Answered, Mixture, TrainingPicture
from minigpt4.training.packing import Learned, learned_tokens, pack
from minigpt4.training.saving import check_finite, read_run, saved_when_stopped, uninterrupted
from minigpt4.training.small_reward import Reward
from minigpt4.weights.adapters import named
from minigpt4.weights.checkpoint import save_projection

PAUSE_SECONDS = 5.0
_TOGETHER = 6  # the most pictures in a group; a step's memory grows with them


@dataclass(frozen=True)
class SmallRecipe:
    """How the projection is trained.

    sizes: for each group of a step, how many pictures of each source it has; the pictures of a
    group are computed together, since their texts have similar lengths. cool_down: the share of the
    steps, at the end, in which the rate falls to 0. average: decay of the running mean of the
    weights, which is written to the file. adapter_lr: the adapters' peak rate. without_words: how
    often a picture is shown without its list of words. sampled: how often texts are sampled for a
    picture that a reward covers; others: the most texts of other kinds that are learned with these.
    """

    steps: int = 4000
    peak_lr: float = 1.5e-4
    adapter_lr: float = 4e-4
    warmup_steps: int = 20
    cool_down: float = 0.45
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    average: float = 0.98
    max_answer_tokens: int = 220  # a recipe
    without_words: float = 0.2
    sampled: float = 0.5
    others: int = 11
    checkpoint_every: int = 5
    validate_every: int = 100
    seed: int = 42
    sizes: tuple[tuple[tuple[str, int], ...], ...] = (
        (("described", 2), ("instructed", 1), ("written", 2)),
        (("flickr", 8), ("captioned", 2), ("named", 1)),
        (("drawn", 2),),
    )


# If only one kind of text is scored: many pictures that have it, and a few other texts, so that
# these are not forgotten. Besides captions: drawings, which were new to the model.
SCORED: dict[str, dict[str, Any]] = {
    "both": {
        "sampled": 0.75,
        "others": 8,
        "sizes": (
            (("described", 1), ("instructed", 1), ("written", 4)),
            (("flickr", 4), ("captioned", 2)),
            (("drawn", 3),),
        ),
    },
    "captions": {
        "sampled": 1.0,
        "others": 2,
        "sizes": ((("described", 1),), (("flickr", 12), ("captioned", 3)), (("drawn", 6),)),
    },
    "descriptions": {
        "sampled": 1.0,
        "others": 2,
        "sizes": ((("described", 7),), (("flickr", 4), ("captioned", 1)), (("drawn", 2),)),
    },
}


@dataclass
class TrainingSource:
    """Pictures of one source, their features, and the words found in them by a head that was not
    trained on them."""

    pictures: Sequence[TrainingPicture]
    features: Callable[[Sequence[int]], Tensor]
    words: Callable[[int, random.Random | None], str]
    rows: Sequence[int] = ()  # in the data sets


def learning_rate(recipe: SmallRecipe, step: int) -> float:
    """The rate of a step (from 0), as a share of the peak: linear warm-up, constant, linear to
    0."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    left = (recipe.steps - step) / max(1.0, recipe.cool_down * recipe.steps)
    return min(warm, 1.0, left)


def _group(parameters: list[nn.Parameter], peak: float, decay: float) -> dict:
    return {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}


def occurring_tokens(tokenizer, answers: Iterator[str], end: int) -> Tensor:
    """The ids, in order, of the tokens in the answers that can be learned."""
    found = {end}
    for answer in answers:
        found.update(encode_text(tokenizer, answer))
    return torch.tensor(sorted(found))


class SmallTrainer:
    """One run in the folder `out`: checkpoint.pt, log.jsonl, the projection.

    A file “pause” in the folder makes the run wait. SIGTERM and Ctrl-C save and end it; a
    validation that has begun is finished first.
    """

    def __init__(
        self,
        model: MiniGPT4,
        sources: dict[str, TrainingSource],
        mixture: Mixture,
        recipe: SmallRecipe,
        out: str | Path,
        start: Callable[[], tuple[Tensor, Tensor, Tensor]],
        tokens: Tensor,
        validate: Callable[["SmallTrainer"], dict] | None = None,
        metadata: dict[str, str] | None = None,
        adapters: dict[str, Adapted] | None = None,
        rewards: Sequence[Reward] = (),
    ) -> None:
        self.model, self.sources, self.mixture, self.recipe = model, sources, mixture, recipe
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rewards = rewards
        self.identity = self._identity(adapters or {})
        stored = read_run(self.out / "checkpoint.pt", self.identity)
        # The weight [hidden, projection_in] is relative to the basis.
        if stored:
            weight, bias = (stored["projection"][name] for name in ("weight", "bias"))
            self.basis = stored["basis"]
        else:
            self.basis, weight, bias = start()
        self.projection = nn.Linear(weight.shape[1], weight.shape[0])
        self.projection.weight.data, self.projection.bias.data = weight.clone(), bias.clone()
        self.adapters = tensors_of(adapters or {})
        if stored:
            for name, tensor in stored.get("adapters", {}).items():
                self.adapters[name].data = tensor
        self.average = {k: v.detach().clone() for k, v in self._trained().items()}
        self.optimizer = torch.optim.AdamW(
            [
                _group([self.projection.weight], recipe.peak_lr, recipe.weight_decay),
                _group([self.projection.bias], recipe.peak_lr, 0.0),
                *([_group(list(self.adapters.values()), recipe.adapter_lr, 0.0)] * bool(adapters)),
            ],
            betas=recipe.betas,
        )
        output = model.torch_llm.get_output_embeddings().weight
        self._vocabulary, self._tokens = output[tokens].clone(), tokens
        self._index = torch.full((len(output),), -1)
        self._index[tokens] = torch.arange(len(tokens))
        self._end = model.tokenizer.convert_tokens_to_ids(model.config.template.stop[0])
        self._validate, self._metadata = validate, metadata or {}
        self.step = 0
        if stored:  # go on from this folder's checkpoint
            self.average, self.step = stored["average"], stored["step"]
            self.optimizer.load_state_dict(stored["optimizer"])

    def _identity(self, adapters: dict[str, Adapted]) -> str:
        """A hash of the model, data and recipe. A checkpoint with another hash is not resumed. The
        number of steps is not part of it: a run may be made longer or shorter."""
        recipe = replace(self.recipe, steps=0, checkpoint_every=0, validate_every=0)
        samples = [f"{reward.samples} of {reward.kind}" for reward in self.rewards]
        lines = [self.model.config.name, repr(recipe), *samples, *sorted(adapters)]
        for name, source in sorted(self.sources.items()):
            lines += [name, fingerprint([picture.example for picture in source.pictures])]
            lines += [repr(picture.texts) for picture in source.pictures]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()

    def _trained(self) -> dict[str, Tensor]:
        """Everything that is trained: the projection's "weight" and "bias", and the adapters."""
        return {**dict(self.projection.named_parameters()), **self.adapters}

    # --- prompts --------------------------------------------------------------------------------

    def conversation(self, ref: ImageRef | None, turns: Sequence[tuple[str, str]]) -> Prompt:
        """The prompt of a conversation about a picture, or about none, up to the answer to its last
        question."""
        messages = []
        for number, (asked, answer) in enumerate(turns):
            messages.append(Message("user", (ref, asked) if ref and not number else (asked,)))
            if number < len(turns) - 1:
                messages.append(Message("assistant", (answer,)))
        config = self.model.config
        return encode_chat(messages, config.template, self.model.tokenizer, config.image_tokens)

    def learned(self, ref: ImageRef, answered: Answered) -> Learned:
        """The prompt of a conversation with its last answer, which is to be learned."""
        prompt = self.conversation(ref if answered.pictured else None, answered.turns)
        ids = encode_text(self.model.tokenizer, answered.turns[-1][1])
        limit = self.recipe.max_answer_tokens
        prompt.add_tokens(ids if len(ids) > limit else [*ids, self._end], learn=True)
        if len(ids) > limit:
            cut = len(prompt) - len(ids) + limit
            prompt.ids, prompt.keys = prompt.ids[:cut], prompt.keys[:cut]
            prompt.loss_mask = prompt.loss_mask[:cut]
        return Learned(prompt, answered.weight, kind=answered.kind)

    def chosen(self, step: int) -> list[list[tuple[str, int]]]:
        """The groups of a step: (source, picture) each. Depends only on the seed and the step."""
        groups = []
        for sizes in self.recipe.sizes:
            group = []
            for name, size in sizes:
                count = len(self.sources[name].pictures) if name in self.sources else 0
                if count:
                    stream = batches(count, size, self.recipe.seed, step)
                    group += [(name, index) for index in next(stream)]
            groups += [group[i : i + _TOGETHER] for i in range(0, len(group), _TOGETHER)]
        return groups

    def batch(
        self, group: Sequence[tuple[str, int]], draw: random.Random
    ) -> tuple[Tensor, TrainingBatch, list[str]]:
        """(features, packed prompts, the kind of each learned token's text) of a group."""
        showings = [self._showing(place, one, draw) for place, one in enumerate(group)]
        features = torch.cat([self.sources[name].features([index]) for name, index in group])
        rewarded = self._rewarded(showings, features, draw)
        rows = [
            [self.learned(ref, text) for text in texts] + rewarded.get(place, [])
            for place, (_, ref, texts) in enumerate(showings)
        ]
        return features, pack(rows), [one.kind for one in learned_tokens(rows)]

    def _showing(
        self, place: int, one: tuple[str, int], draw: random.Random
    ) -> tuple[TrainingPicture, ImageRef, list[Answered]]:
        name, index = one
        source = self.sources[name]
        words = "" if draw.random() < self.recipe.without_words else source.words(index, draw)
        picture = source.pictures[index]
        return picture, ImageRef(f"{place:x}", words), self.mixture.draw(picture, draw)

    def _rewarded(
        self,
        showings: Sequence[tuple[TrainingPicture, ImageRef, list[Answered]]],
        features: Tensor,
        draw: random.Random,
    ) -> dict[int, list[Learned]]:
        """With rewards: place -> the sampled texts.

        They replace the texts of their kind, except one.
        """
        rewarded: dict[int, list[Learned]] = {}
        for reward in self.rewards:
            asked = {}
            for place, (picture, ref, texts) in enumerate(showings):
                own = [text for text in texts if text.kind == reward.kind]
                if own and reward.covers(picture) and draw.random() < self.recipe.sampled:
                    others = [text for text in texts if text not in own]
                    if len(others) > self.recipe.others:
                        others = draw.sample(others, self.recipe.others)
                    texts[:] = [own[0], *others]
                    asked[place] = (picture, self.conversation(ref, own[0].turns))
            if not asked:
                continue
            images = self.embeddings(features[list(asked)]).detach()
            seed = draw.getrandbits(62)
            found = reward(self.model, list(asked.values()), images, seed, self._tokens)
            rewarded.update(zip(asked, found, strict=True))
        return rewarded

    # --- the loss -------------------------------------------------------------------------------

    def embeddings(self, features: Tensor) -> Tensor:
        """The encoders' features -> image embeddings."""
        projected = self.projection(features.float() @ self.basis)
        return at_length(projected, self.model.config.embedding_length)

    def losses(self, images: Tensor, batch: TrainingBatch) -> Tensor:
        """The cross-entropy of each learned token."""
        hidden = self.model.hidden_states(images, batch).flatten(0, 1)[batch.sources]
        logits = F.linear(hidden, self._vocabulary).float() / batch.temperatures[:, None]
        wanted = self._index[batch.targets]  # -1: not in the vocabulary of the loss, not learned
        return F.cross_entropy(logits, wanted, reduction="none", ignore_index=-1)

    # --- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the recipe's last step."""
        with saved_when_stopped(self):
            while self.step < self.recipe.steps:
                while (self.out / "pause").exists():
                    time.sleep(PAUSE_SECONDS)
                self.one_step()
                if self.step % self.recipe.checkpoint_every == 0:
                    self.save()
        self.save()

    def one_step(self) -> dict:
        """Learn from the next pictures, log the figures, and validate if it is time. Returns the
        figures."""
        started, cpu = time.perf_counter(), time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(self.recipe, self.step)
        draw = random.Random(f"{self.recipe.seed} {self.step}")
        groups = [self.batch(group, draw) for group in self.chosen(self.step)]
        total = sum(batch.weights.clamp_min(0).sum() for _, batch, _ in groups)
        by_kind, lengths = defaultdict(list), []
        self.optimizer.zero_grad()
        for features, batch, kinds in groups:
            images = self.embeddings(features)
            losses = self.losses(images, batch)
            ((losses * batch.weights).sum() / total).backward()
            for kind, loss in zip(kinds, losses.tolist(), strict=True):
                by_kind[kind].append(loss)
            lengths.append(images.detach().norm(dim=-1).mean().item())
        norm = nn.utils.clip_grad_norm_(self.projection.parameters(), self.recipe.clip_norm)
        nn.utils.clip_grad_norm_(self.adapters.values(), self.recipe.clip_norm)
        every = [loss for of_kind in by_kind.values() for loss in of_kind]
        check_finite(torch.tensor(every), self.step + 1)
        with uninterrupted():
            self.optimizer.step()
            for name, value in self._trained().items():
                decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
                self.average[name].lerp_(value.detach(), 1 - decay)
            self.step += 1
            record = {
                "step": self.step,
                "loss": round(sum(every) / len(every), 4),
                **{f"sampled {r.kind}": round(r.taken(), 3) for r in self.rewards if r.scores},
                "kinds": {k: round(sum(v) / len(v), 3) for k, v in sorted(by_kind.items())},
                "gradient": round(norm.item(), 4),
                "length": round(sum(lengths) / len(lengths), 3),
                "tokens": sum(batch.ids.numel() for _, batch, _ in groups),
                "seconds": round(time.perf_counter() - started, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            self.log(record)
            if self._validate and self.step % self.recipe.validate_every == 0:
                self.save()
                self.log({"step": self.step, "validation": self._validate(self)})
        return record

    def log(self, record: dict) -> None:
        """Print a record, and add it to the run's log."""
        line = json.dumps(record)
        say(line)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    # --- files ----------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context, the trained parameters have their averaged values."""
        trained = self._trained()
        latest = {name: parameter.data for name, parameter in trained.items()}
        for name, parameter in trained.items():
            parameter.data = self.average[name]
        try:
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = latest[name]

    def save(self) -> bool:
        """Write checkpoint and projection, each completely or not at all."""
        state = {
            "identity": self.identity,
            "projection": self.projection.state_dict(),
            "adapters": {name: p.detach() for name, p in self.adapters.items()},
            "average": self.average,
            "basis": self.basis,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with replacing(self.out / "checkpoint.pt") as partial:
            torch.save(state, partial)
        weights = {
            "weight": (self.average["weight"] @ self.basis.T).half(),
            "bias": self.average["bias"].half(),
            **named(finished({name: self.average[name] for name in self.adapters})),
        }
        path = self.out / self.model.config.projection_file
        save_projection(weights, path, self._metadata | {"steps": str(self.step)})
        return True
