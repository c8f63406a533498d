"""The published recipe extended, so that a small model learns from few pictures."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from minigpt4.data.examples import Example, Text
from minigpt4.data.files import prompt_lines
from minigpt4.errors import UserError
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.parts import PooledMap
from minigpt4.training.packing import Learned
from minigpt4.training.selfcritical import (
    CiderReward,
    check_count,
    compared,
    question_of,
    sample_answers,
)
from minigpt4.training.trainer import Recipe, Trainer

_MEASURED = 1024  # pictures from which the covariance of the features is computed
_MEASURED_AT_ONCE = 64


@dataclass(frozen=True)
class ExtendedRecipe(Recipe):
    """The published recipe, and additions to it.

    mirror: show each picture's mirror image half of the time. eigenbasis: let AdamW work in the
    eigenbasis of the features' covariance, where its scaling of each weight whitens them (as SOAP
    does, Vyas et al., 2024, but only for the inputs). denoise: if above 0, features pass through a
    Wiener filter, whose noise is the difference between a picture and its mirror image, multiplied
    by this number. The filter becomes part of the weights. consensus: if above 0, the weights of a
    picture's captions are a softmax, at this temperature, of their CIDEr against its other
    captions; their mean is 1. samples: if above 1, captions of `Trainer.replay`'s pictures that
    have several are not learned. Instead, so many answers are sampled at `sample_temperature`, and
    their CIDEr makes them more or less likely (see `selfcritical`), with `reward_weight` times the
    weight of other texts.
    """

    mirror: bool = False
    eigenbasis: bool = False
    denoise: float = 0.0
    consensus: float = 0.0
    samples: int = 0
    sample_temperature: float = 0.6
    reward_weight: float = 2.0


class ExtendedTrainer(Trainer):
    """Trains by an `ExtendedRecipe`."""

    recipe: ExtendedRecipe

    def __init__(
        self, model: MiniGPT4, examples: Sequence[Example], recipe: ExtendedRecipe, *others, **more
    ) -> None:
        check_count(recipe.samples)
        template = model.config.template
        if recipe.samples and template.stop[0] not in template.controls:
            raise UserError(
                "“--samples” needs answers that end in a token of their own, but those of "
                f"{model.config.name} end in “{template.stop[0]}”: omit it."
            )
        self.views = 2 if recipe.mirror or recipe.denoise else 1
        self.basis: Tensor | None = None  # features are multiplied by it
        self.reward = CiderReward({})
        self.rewards: list[float] = []  # mean reward of each picture since the start
        self._agreement: dict[Hashable, dict[str, float]] = {}  # picture -> caption -> weight
        super().__init__(model, examples, recipe, *others, **more)

    def _prepare(self) -> None:
        recipe, projection = self.recipe, self.model.projection
        if recipe.eigenbasis or recipe.denoise:
            # Broadcast: eigenvectors may differ in sign between processes, whose gradients are
            # added.
            eigenvectors, clean = broadcast(self._measure())
            self.basis = clean.T @ eigenvectors
            projection.weight.data = projection.weight.data @ eigenvectors
        if recipe.samples or recipe.consensus:
            captioned = [e for e in self.examples if len(e.captions) > 1]
            self.reward = CiderReward({_identity(e): e.captions for e in captioned})

    # --- features ---------------------------------------------------------------------------

    def in_basis(self, features: Tensor) -> Tensor:
        """Features in the basis of this run."""
        return features if self.basis is None else features.float() @ self.basis

    def _measure(self) -> tuple[Tensor, Tensor]:
        """(eigenvectors of the features' covariance as columns, filter), both
        [projection_in, projection_in].

        The one-hot part of the features (the classes of a pooled map) is not rotated: its
        eigenvalues are nearly equal, and a rotation would only mix classes.
        """
        config, recipe = self.model.config, self.recipe
        width = config.projection_in
        if isinstance(config.bridge, PooledMap):
            width -= config.features.classes
        draw = random.Random(recipe.seed)
        chosen = draw.sample(range(len(self.examples)), min(_MEASURED, len(self.examples)))
        covariance, noise = torch.zeros(2, width, width, device=self.model.device)
        for start in range(0, len(chosen), _MEASURED_AT_ONCE):
            part = self._readable(chosen[start : start + _MEASURED_AT_ONCE])
            vectors = self.features([(index, 0) for index in part])[..., :width].float()
            covariance += _outer_products(vectors)
            if recipe.denoise:
                mirrored = self.features([(index, 1) for index in part])[..., :width].float()
                noise += _outer_products(vectors - self._turn_back(mirrored)) / 2
        basis, clean = torch.eye(config.projection_in, device=self.model.device).repeat(2, 1, 1)
        if recipe.eigenbasis:
            basis[:width, :width] = torch.linalg.eigh(covariance / len(chosen)).eigenvectors
        if recipe.denoise:
            floor = torch.eye(width, device=self.model.device) * covariance.trace() / width * 1e-3
            both = covariance + recipe.denoise * noise + floor
            clean[:width, :width] = torch.linalg.solve(both, covariance).T
        return basis, clean

    def _turn_back(self, mirrored: Tensor) -> Tensor:
        """Features of mirror images, with each cell in its place in the original picture."""
        if not isinstance(self.model.config.bridge, PooledMap):
            return mirrored
        grid = self.model.config.bridge.grid
        cells = mirrored[:, : grid * grid].unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
        return torch.cat([cells, mirrored[:, grid * grid :]], dim=1)

    def _weights_to_save(self) -> dict[str, Tensor]:
        weights = super()._weights_to_save()
        if self.basis is not None:
            weights["weight"] = weights["weight"].detach() @ self.basis.T
        return weights

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"basis": self.basis}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.basis = state["basis"]

    # --- one step ---------------------------------------------------------------------------

    def _view(self, draw: random.Random) -> int:
        return draw.randrange(2) if self.recipe.mirror else 0

    def _text_weights(self, example: Example, texts: Sequence[Text]) -> list[float]:
        captions = example.captions
        if not self.recipe.consensus or len(captions) < 2:
            return [1.0] * len(texts)
        if (picture := _identity(example)) not in self._agreement:
            scores = torch.tensor(self.reward.agreement(picture))
            shares = (scores / self.recipe.consensus).softmax(0) * len(captions)
            self._agreement[picture] = dict(zip(captions, shares.tolist(), strict=True))
        return [self._agreement[picture].get(text.answer, 1.0) for text in texts]

    def _sample_answers(
        self,
        step: int,
        rows: list[list[Learned]],
        chosen: Sequence[tuple[int, int]],
        features: Tensor,
    ) -> None:
        """Replace the captions of replayed pictures by sampled answers, weighted by advantage."""
        recipe = self.recipe
        generator = torch.Generator(self.model.device).manual_seed(
            hash((recipe.seed, step, self.accelerator.process_index)) % 2**63
        )
        replayed = [
            place
            for place, (index, _) in enumerate(chosen)
            if index >= self.counts[0] and len(self.examples[index].captions) > 1
        ]
        if not recipe.samples or not replayed:
            return
        questions = [question_of(rows[place][0].prompt) for place in replayed]
        images = self.model.project(features[replayed].float()).detach()
        limit, temperature = recipe.schedule.max_caption_tokens, recipe.sample_temperature
        how = (recipe.samples, limit, temperature, generator)
        drawn = sample_answers(self.model, questions, images, *how)
        for place, question, answers in zip(replayed, questions, drawn, strict=True):
            score = partial(self.reward, _identity(self.examples[chosen[place][0]]))
            compare = (score, recipe.reward_weight, temperature)
            rows[place], mean = compared(self.model.tokenizer, question, answers, *compare)
            self.rewards.append(mean)

    def _progress(self) -> str:
        recent = self.rewards[-400:]
        return f", CIDEr of samples {sum(recent) / len(recent):.3f}" if recent else ""


def _identity(example: Example) -> Hashable:
    """A key that differs for pictures of the same name in different data sets."""
    return example.key, example.captions


def _outer_products(vectors: Tensor) -> Tensor:
    """[pictures, image_tokens, width] -> the sum of the vectors' outer products [width, width]."""
    vectors = vectors.flatten(0, 1)
    return vectors.T @ vectors


def name_classes(model: MiniGPT4) -> None:
    """Initialize a new projection: each class that the encoder recognizes is projected to the mean
    embedding of the words in its name."""
    names = prompt_lines("imagenet-classes.txt")
    if model.config.features.classes != len(names):
        return  # not ImageNet's
    first = model.config.projection_in - len(names)
    for place, name in enumerate(names):
        ids = torch.tensor(model.tokenizer.encode(f" {name}", add_special_tokens=False))
        vector = model.embed_tokens(ids.to(model.device)).float().mean(0)
        model.projection.weight.data[:, first + place] = vector
