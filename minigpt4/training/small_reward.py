"""Captions of small models by their score: sampled ones are compared by CIDEr (`selfcritical`)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.prompt import Prompt
from minigpt4.training.mixture import Picture
from minigpt4.training.selfcritical import CiderReward, advantages, answered, check_count, sample

PEOPLES = ("flickr", "captioned")  # sources whose captions several people wrote
SHARE = 0.5  # of these pictures' showings, in which captions are sampled
_LIMIT = 20  # tokens of a sampled caption


class CaptionReward:
    """`samples` captions of each picture; `weight`: of a token whose caption scores 1.0 above the
    others. They are sampled at `temperature`, and learned at it."""

    def __init__(
        self,
        pictures: Iterable[Picture],
        samples: int,
        weight: float = 2.0,
        temperature: float = 0.6,
    ) -> None:
        check_count(samples)
        references = {p.key: p.captions for p in pictures if p.source in PEOPLES}
        self._cider = CiderReward(references)
        self.samples, self.weight, self.temperature = samples, weight, temperature
        self.scores: list[float] = []  # the mean of each picture's captions, since last taken

    def __call__(
        self,
        model: MiniGPT4,
        asked: Sequence[tuple[Picture, Prompt]],
        images: Tensor,
        seed: int,
        tokens: Tensor,
    ) -> list[list[tuple[Prompt, float]]]:
        """(prompt with a sampled caption to learn, weight of its tokens) for each question.

        images: embeddings of the pictures asked about [questions, image_tokens, hidden].
        tokens: the ids that may be sampled.
        """
        with torch.no_grad():
            rows = [
                model.embed(question, {question.images[0][1].key: one})[0]
                for (_, question), one in zip(asked, images, strict=True)
            ]
        inputs, mask = padded(rows)
        generator = torch.Generator(inputs.device).manual_seed(seed)
        drawn = sample(
            model, inputs, self.samples, _LIMIT, self.temperature, generator, mask, tokens
        )
        return [
            self.weighted(model, picture, question, answers)
            for (picture, question), answers in zip(asked, drawn, strict=True)
        ]

    def weighted(
        self,
        model: MiniGPT4,
        picture: Picture,
        question: Prompt,
        answers: Sequence[Sequence[int]],
    ) -> list[tuple[Prompt, float]]:
        """Answers, as token ids, by their score against each other."""
        end, rewards = model.tokenizer.eos_token_id, []
        for ids in answers:
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            rewards.append(self._cider(picture.key, text, ids[-1] == end))
        self.scores.append(sum(rewards) / len(rewards))
        weights = [self.weight * advantage for advantage in advantages(rewards)]
        return [(answered(question, ids), w) for ids, w in zip(answers, weights, strict=True)]

    def taken(self) -> float:
        """The mean score since the last call."""
        scores, self.scores = self.scores, []
        return sum(scores) / max(1, len(scores))


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [length, hidden] of different lengths -> (padded on the left, attention mask)."""
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        embeds[place, longest - len(row) :] = row
        mask[place, longest - len(row) :] = 1
    return embeds, mask
