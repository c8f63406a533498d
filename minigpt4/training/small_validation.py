"""Validation of small models on held-out pictures: loss, captions, yes/no questions, obedience.

Training may improve one of these and worsen another, so they are measured together.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minigpt4.evaluation.metrics import auc, caption_scores, is_repetitive, sentences
from minigpt4.model.prompt import ImageRef
from minigpt4.training.mixture import Things
from minigpt4.training.packing import Learned, learned_tokens, pack
from minigpt4.training.selfcritical import sample_answers

if TYPE_CHECKING:
    from minigpt4.training.small import SmallTrainer, TrainingSource

_TOGETHER = 20  # pictures answered in one batch
CAPTION = "Describe this image briefly."
DETAIL = "Describe this image in detail."
POEM = "Write a four-line poem about this picture."


class SmallValidation:
    """Measures the averaged projection; `sizes`: figure -> number of pictures."""

    def __init__(
        self,
        kept: dict[str, "TrainingSource"],
        objects: Things,
        out: Path,
        sizes: dict[str, int] | None = None,
        words: bool = True,
    ) -> None:
        self.kept, self.objects, self.out, self.words = kept, objects, out, words
        self.sizes = {"loss": 24, "captions": 60, "yes/no": 60, "detail": 10} | (sizes or {})

    @torch.no_grad()
    def __call__(self, trainer: "SmallTrainer") -> dict:
        """The figures. Answers are written to answers-STEP.txt."""
        lines: list[str] = []
        with trainer.averaged():
            figures: dict = {"loss": self.loss(trainer)}
            for name in ("captioned", "flickr"):
                if name in self.kept:
                    figures[f"captions {name}"] = self.captions(trainer, name, lines)
            for name in ("described", "captioned"):
                if name in self.kept:
                    figures[f"yes/no {name}"] = self.presence(trainer, name)
            if "described" in self.kept:
                figures |= self.obedience(trainer, lines)
        path = self.out / f"answers-{trainer.step:06}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return figures

    def _ref(self, source: "TrainingSource", number: int, place: int) -> ImageRef:
        return ImageRef(f"{place:x}", source.words(number, None) if self.words else "")

    def loss(self, trainer: "SmallTrainer") -> dict[str, float]:
        """The mean loss of the learned tokens of each kind of text."""
        found: dict[str, list[float]] = defaultdict(list)
        for name, source in self.kept.items():
            for number in range(min(self.sizes["loss"], len(source.pictures))):
                draw = random.Random(f"probe {name} {number}")
                texts = trainer.mixture.draw(source.pictures[number], draw)
                ref = self._ref(source, number, 0)
                row = [trainer.learned(ref, text) for text in texts]
                images = trainer.embeddings(source.features([number]))
                losses = trainer.losses(images, pack([row])).tolist()
                for one, loss in zip(learned_tokens([row]), losses, strict=True):
                    found[f"{name} {one.kind}"].append(loss)
        return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(found.items())}

    def captions(self, trainer: "SmallTrainer", name: str, lines: list[str]) -> dict[str, float]:
        """BLEU-4, CIDEr and length in words of greedy short captions."""
        source = self.kept[name]
        numbers = range(min(self.sizes["captions"], len(source.pictures)))
        texts = self.answers(trainer, source, numbers, CAPTION, 40)
        answers = {str(i): text for i, text in zip(numbers, texts, strict=True)}
        references = {str(i): source.pictures[i].captions for i in numbers}
        scores = caption_scores(answers, references)
        for i in list(numbers)[:12]:
            words = self._ref(source, i, 0).words
            lines.append(f"{answers[str(i)]} | {references[str(i)][0]} | {words}")
        return {
            "cider": round(scores["cider"], 3),
            "bleu4": round(scores["bleu4"], 3),
            "words": round(sum(len(t.split()) for t in texts) / len(texts), 1),
        }

    def presence(self, trainer: "SmallTrainer", name: str) -> dict[str, float]:
        """Accuracy (is yes more likely than no? and with the best threshold) and AUC of yes/no
        questions about objects. As many answers are yes as no; half of the latter are about popular
        objects."""
        source, odds, right = self.kept[name], [], []
        tokenizer = trainer.model.tokenizer
        yes, no = (tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Yes", "No"))
        output = trainer.model.torch_llm.get_output_embeddings().weight[[yes, no]]
        for number in range(min(self.sizes["yes/no"], len(source.pictures))):
            picture = source.pictures[number]
            draw = random.Random(f"presence {picture.key}")
            there = draw.sample(sorted(picture.things), min(3, len(picture.things)))
            absent = {self.objects.absent(picture, draw) for _ in there}
            asked = [(self.objects.names[i], True) for i in there]
            asked += [(self.objects.names[i], False) for i in sorted(absent)]
            if not asked:
                continue
            ref, prompts = self._ref(source, number, 0), []
            for thing, _ in asked:
                question = f"Is there {thing} in the image? Answer yes or no."
                prompts.append(trainer.conversation(ref, ((question, ""),)))
                prompts[-1].add_tokens([yes], learn=True)
            batch = pack([list(map(Learned, prompts))])
            images = trainer.embeddings(source.features([number]))
            hidden = trainer.model.hidden_states(images, batch).flatten(0, 1)[batch.sources]
            logits = (hidden @ output.T).float()
            odds += (logits[:, 0] - logits[:, 1]).tolist()
            right += [answer for _, answer in asked]
        return yes_no_scores(odds, right)

    def obedience(self, trainer: "SmallTrainer", lines: list[str]) -> dict[str, dict]:
        """The number of sentences of a detailed answer and of lines of a poem; repetition."""
        source, figures = self.kept["described"], {}
        numbers = range(min(self.sizes["detail"], len(source.pictures)))
        for what, asked in (("detail", DETAIL), ("poem", POEM)):
            texts = self.answers(trainer, source, numbers, asked, 110)
            for i, text in zip(numbers, texts, strict=True):
                lines.append(f"[{what}] {text!r} | {source.pictures[i].description}")
            parts = [_lines(t) if what == "poem" else len(sentences(t)) for t in texts]
            figures[what] = {
                "lines" if what == "poem" else "sentences": round(sum(parts) / len(parts), 2),
                "several": round(sum(n > 1 for n in parts) / len(parts), 2),
                "repetition": round(sum(map(is_repetitive, texts)) / len(texts), 2),
            }
        return figures

    def answers(
        self,
        trainer: "SmallTrainer",
        source: "TrainingSource",
        numbers: Sequence[int],
        asked: str,
        limit: int,
    ) -> list[str]:
        """Greedy answers about several pictures at once."""
        found = []
        for first in range(0, len(numbers), _TOGETHER):
            some = numbers[first : first + _TOGETHER]
            images = trainer.embeddings(source.features(list(some)))
            refs = [self._ref(source, number, place) for place, number in enumerate(some)]
            questions = [trainer.conversation(ref, ((asked, ""),)) for ref in refs]
            for (ids,) in sample_answers(trainer.model, questions, images, 1, limit, 0.0):
                text = trainer.model.tokenizer.decode(ids, skip_special_tokens=True)
                found.append(text.strip())
        return found


def yes_no_scores(odds: Sequence[float], right: Sequence[bool]) -> dict[str, float]:
    """Scores from the log-odds of yes and whether yes is right; without any, only their number."""
    if not odds:
        return {"questions": 0}
    scores, truth = torch.tensor(odds), torch.tensor(right)
    best = max(((scores > t) == truth).float().mean().item() for t in scores)
    accuracy = ((scores > 0) == truth).float().mean().item()
    said_yes = (scores > 0).float().mean().item()
    area = auc(list(zip(right, odds, strict=True)))
    figures = {"accuracy": accuracy, "best": best, "auc": area, "yes": said_yes}
    return {k: round(v, 3) for k, v in figures.items()} | {"questions": len(odds)}


def _lines(text: str) -> int:
    return len([line for line in text.split("\n") if line.strip()])
