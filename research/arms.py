"""The variants of `research.architecture`: modules between the frozen encoder and the frozen
language model, and a short training of them.

`training.trainer` trains the one linear projection of the published model. Here other modules
replace or precede it, so this is a separate, much smaller loop. Prompts, packing, loss and schedule
are those of training.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from minigpt4.config import ModelConfig, Schedule
from minigpt4.data.examples import Example
from minigpt4.model.bridge import QFormerBridge, build_bridge
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.parts import ConcatPatches, Maps, QFormer
from minigpt4.model.prompt import ImageRef
from minigpt4.training.batches import batches, training_prompt
from minigpt4.training.packing import Learned, pack
from minigpt4.training.trainer import learning_rate


@dataclass(frozen=True)
class TinyQFormer(QFormer):
    hidden_size: int = 256
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 1024


@dataclass(frozen=True)
class TinyMapQFormer(TinyQFormer):
    """On the encoder's last feature map."""

    reads: ClassVar = Maps


ENCODED_AT_ONCE = 8  # pictures
CLIP = 1.0  # norm of the gradient

Encoded = Tensor | list[Tensor]  # [pictures, patches, hidden], or feature maps of pictures


class DeepProjection(nn.Module):
    """Three linear layers instead of one: width -> width -> width -> llm_hidden_size."""

    def __init__(self, width: int, llm_hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.last = nn.Linear(width, llm_hidden_size)

    @property
    def weight(self) -> Tensor:
        """The weight of the last layer; the model reads dtype and device from it."""
        return self.last.weight

    def forward(self, vectors: Tensor) -> Tensor:
        for layer in self.hidden:
            vectors = F.gelu(layer(vectors))
        return self.last(vectors)


class MapQFormer(QFormerBridge):
    """A Q-Former on the encoder's last feature map; each cell is a patch."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return super().forward(maps[0].flatten(2).transpose(1, 2))


def other_bridge(config: ModelConfig) -> tuple[str, ModelConfig]:
    """(name, config): without the Q-Former if the model has one, or else with a tiny Q-Former that
    has as many query tokens as the model's bridge has vectors."""
    if isinstance(config.bridge, QFormer):
        return "without Q-Former", replace(config, bridge=ConcatPatches())
    kind = TinyMapQFormer if isinstance(config.features, Maps) else TinyQFormer
    tiny = kind(query_tokens=config.image_tokens)
    return "tiny Q-Former, trained", replace(config, bridge=tiny)


def variant(model: MiniGPT4, name: str, seed: int) -> tuple[MiniGPT4, list[dict]]:
    """(the model with a new module, the optimizer's parameter groups).

    name: "linear", "deeper" or "bridge". All other modules are those of `model`. The `scale` of a
    group multiplies the schedule's learning rate; none was tuned.
    """
    torch.manual_seed(seed)
    config, bridge, groups = model.config, model.bridge, []
    if name == "bridge":
        _, config = other_bridge(config)
        if isinstance(config.bridge, TinyMapQFormer):
            bridge = MapQFormer(config.bridge, config.features.channels[0])
        else:
            bridge = build_bridge(config)
        bridge = bridge.to(model.device)
        if isinstance(config.bridge, QFormer):
            nn.init.normal_(bridge.query_tokens, std=0.02)
            groups.append({"params": list(bridge.parameters()), "scale": 0.1})
    if name == "deeper":
        projection = DeepProjection(config.projection_in, config.llm_hidden_size)
        last = projection.last
        groups.append({"params": list(projection.hidden.parameters()), "scale": 0.25})
    else:
        projection = last = nn.Linear(config.projection_in, config.llm_hidden_size)
    nn.init.normal_(last.weight, std=0.06 / last.in_features**0.5)  # as `weights` initializes it
    nn.init.zeros_(last.bias)
    groups.append({"params": list(last.parameters()), "scale": 1.0})
    made = MiniGPT4(
        config, model.encoder, bridge, projection.to(model.device), model.llm, model.tokenizer
    )
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return made, groups


@torch.inference_mode()
def encode(model: MiniGPT4, examples: Sequence[Example]) -> Encoded:
    """The output of the frozen encoder for all pictures, in 16 bits."""
    kept: list[Tensor] = []
    for start in tqdm(range(0, len(examples), ENCODED_AT_ONCE), desc="encoding pictures"):
        part = examples[start : start + ENCODED_AT_ONCE]
        found = model.encoder(model.pixel_values([e.picture() for e in part]))
        maps = [found] if isinstance(found, Tensor) else found
        if not kept:  # the maps of a picture have nearly a megabyte: do not keep them twice
            shapes = [(len(examples), *one.shape[1:]) for one in maps]
            kept = [torch.empty(shape, dtype=torch.float16) for shape in shapes]
        for all_of_it, one in zip(kept, maps, strict=True):
            all_of_it[start : start + len(part)] = one
    return kept[0] if isinstance(found, Tensor) else kept


def on_each(encoded: Encoded, change: Callable[[Tensor], Tensor]) -> Encoded:
    """Apply `change` to each tensor."""
    if isinstance(encoded, Tensor):
        return change(encoded)
    return [change(one) for one in encoded]


@dataclass
class Corpus:
    """Pictures with texts, their encodings, and the instructions for texts without their own (none
    in the published first stage)."""

    examples: Sequence[Example]
    encoded: Encoded
    instructions: tuple[str, ...]

    def part(self, start: int | None, end: int | None) -> "Corpus":
        """The examples from `start` to `end`."""
        encoded = on_each(self.encoded, lambda one: one[start:end])
        return replace(self, examples=self.examples[start:end], encoded=encoded)

    def prompts(
        self, model: MiniGPT4, schedule: Schedule, index: int, place: int, draw: random.Random
    ) -> list[Learned]:
        """The training prompts of one picture, for as many texts as the schedule says."""
        texts = self.examples[index].texts
        pick, ref, limit = draw.random(), ImageRef(f"{place:x}"), schedule.max_text_tokens
        return [
            Learned(training_prompt(model, ref, text, self.instructions, pick, limit))
            for text in draw.sample(texts, min(schedule.texts_per_picture, len(texts)))
        ]


def loss_of(
    model: MiniGPT4, corpus: Corpus, schedule: Schedule, indices: Sequence[int], seed: str
) -> Tensor:
    """The mean loss, in nats per token, over texts of these pictures; the seed selects them."""
    rows = [
        corpus.prompts(model, schedule, index, place, random.Random(f"{seed} {place} {index}"))
        for place, index in enumerate(indices)
    ]
    # On a GPU the model's own bridge has 16 bits, a new one 32; some bridges have no weights.
    dtype = next(model.bridge.parameters(), model.projection.weight).dtype
    chosen = list(indices)
    encoded = on_each(corpus.encoded, lambda one: one[chosen].to(model.device, dtype))
    batch = pack(rows).to(model.device)
    return model.training_loss(model.bridge(encoded), batch)


def train(
    model: MiniGPT4,
    groups: list[dict],
    corpus: Corpus,
    schedule: Schedule,
    seed: int,
    note: Callable[[str], None],
) -> float:
    """Train the parameters in `groups`. Returns the mean loss of the last tenth of the steps.

    note: called with the loss after each step.
    """
    optimizer = torch.optim.AdamW(
        groups, lr=schedule.peak_lr, betas=schedule.betas, weight_decay=schedule.weight_decay
    )
    parameters = [p for group in groups for p in group["params"]]
    order = batches(len(corpus.examples), schedule.batch_size, seed)
    losses = []
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step) * group["scale"]
        optimizer.zero_grad()
        loss = loss_of(model, corpus, schedule, next(order), f"{seed} {step}")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
        recent = losses[-max(1, schedule.steps // 10) :]
        note(f"loss {sum(recent) / len(recent):.3f}")
    return sum(recent) / len(recent)


@torch.no_grad()
def held_out_loss(model: MiniGPT4, corpus: Corpus, schedule: Schedule) -> float:
    """The mean loss on pictures that were not trained on; the same texts for every variant."""
    size = schedule.batch_size
    starts = range(0, len(corpus.examples), size)
    parts = [range(s, min(s + size, len(corpus.examples))) for s in starts]
    losses = [loss_of(model, corpus, schedule, part, "held out").item() for part in parts]
    return sum(x * len(p) for x, p in zip(losses, parts, strict=True)) / len(corpus.examples)
