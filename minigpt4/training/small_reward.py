"""Rewards for sampled texts of small models (`selfcritical`): for captions, their CIDEr against
people's; for descriptions, how much of what they name is in the picture."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from minigpt4.evaluation.metrics import is_repetitive, sentences
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.prompt import Prompt
from minigpt4.training.mixture import TrainingPicture
from minigpt4.training.packing import Learned
from minigpt4.training.selfcritical import CiderReward, check_count, compared, sample_answers
from minigpt4.training.vocabulary import Vocabulary

PEOPLES = ("flickr", "captioned")  # sources whose captions several people wrote


class Reward:
    """Samples texts of the kind `kind` and compares each with the others of its picture.

    samples: texts of each picture; weight: of a token whose text scores 1.0 above the others. Texts
    are sampled and learned at `temperature`; limit: their maximum number of tokens.
    """

    kind = ""
    limit = 0
    temperature = 0.6

    def __init__(self, samples: int, weight: float) -> None:
        check_count(samples)
        self.samples, self.weight = samples, weight
        self.scores: list[float] = []  # the mean of each picture's texts, since last taken

    def covers(self, picture: TrainingPicture) -> bool:
        """Can texts about this picture be scored?"""
        raise NotImplementedError

    def score(self, picture: TrainingPicture, text: str, ended: bool) -> float:
        """The score of a text, from 0 up. ended: the model ended the text itself."""
        raise NotImplementedError

    def __call__(
        self,
        model: MiniGPT4,
        asked: Sequence[tuple[TrainingPicture, Prompt]],
        images: Tensor,
        seed: int,
        tokens: Tensor,
    ) -> list[list[Learned]]:
        """The sampled texts to learn for each question.

        images: embeddings of the pictures asked about [questions, image_tokens, hidden].
        tokens: the ids that may be sampled.
        """
        generator = torch.Generator(images.device).manual_seed(seed)
        how = (self.samples, self.limit, self.temperature, generator, tokens)
        drawn = sample_answers(model, [question for _, question in asked], images, *how)
        return [
            self.weighted(model, picture, question, answers)
            for (picture, question), answers in zip(asked, drawn, strict=True)
        ]

    def weighted(
        self,
        model: MiniGPT4,
        picture: TrainingPicture,
        question: Prompt,
        answers: Sequence[Sequence[int]],
    ) -> list[Learned]:
        """Answers (token ids) to learn, weighted by their scores relative to each other."""
        how = (partial(self.score, picture), self.weight, self.temperature, f"sampled {self.kind}")
        learned, mean = compared(model.tokenizer, question, answers, *how)
        self.scores.append(mean)
        return learned

    def taken(self) -> float:
        """The mean score since the last call."""
        scores, self.scores = self.scores, []
        return sum(scores) / max(1, len(scores))


class CaptionReward(Reward):
    """For captions: CIDEr against all of a picture's captions by people."""

    kind = "caption"
    limit = 20

    def __init__(
        self, pictures: Iterable[TrainingPicture], samples: int, weight: float = 2.0
    ) -> None:
        super().__init__(samples, weight)
        references = {p.key: p.captions for p in pictures if p.source in PEOPLES}
        self._cider = CiderReward(references)

    def covers(self, picture: TrainingPicture) -> bool:
        return picture.source in PEOPLES

    def score(self, picture: TrainingPicture, text: str, ended: bool) -> float:
        return self._cider(picture.key, text, ended)


class DescriptionReward(Reward):
    """For descriptions: the terms they name that the picture's texts name, too, and those that
    these do not name."""

    kind = "description"
    limit = 90

    def __init__(
        self,
        pictures: Iterable[TrainingPicture],
        terms: Sequence[str],
        samples: int,
        weight: float = 2.0,
    ) -> None:
        super().__init__(samples, weight)
        self._vocabulary = Vocabulary(terms)
        self._there: Mapping[str, set[int]] = {
            p.key: self._vocabulary.occurring(" . ".join(p.texts))
            for p in pictures
            if p.source == "described"
        }

    def covers(self, picture: TrainingPicture) -> bool:
        return picture.key in self._there

    def score(self, picture: TrainingPicture, text: str, ended: bool) -> float:
        """Near 1 if much is named and all of it is there; half for a single sentence; 0 for a text
        that repeats itself or was cut off."""
        if not ended or is_repetitive(text):
            return 0.0
        named = self._vocabulary.occurring(text)
        right = len(named & self._there[picture.key])
        wrong = len(named) - right
        return right / (right + 2 * wrong + 3) * (0.5 if len(sentences(text)) < 2 else 1.0)
