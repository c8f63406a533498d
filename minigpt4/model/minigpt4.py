"""MiniGPT-4: frozen visual encoder -> bridge -> one trained linear projection -> frozen LLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import (
    ClassesAndObjects,
    ConcatPatches,
    EfficientNetLite,
    ModelConfig,
    PooledMap,
    QFormer,
)
from minigpt4.model.objects import ObjectsBridge
from minigpt4.model.prompt import Prompt
from minigpt4.model.vision import preprocess
from minigpt4.model.words import WordHead, choose, listed

if TYPE_CHECKING:  # transformers takes seconds to import, and nano answers without it
    from transformers import PreTrainedModel

    from minigpt4.weights.gguf import BlockLlama


class QFormerBridge(nn.Module):
    """Image features [batch, patches, 1408] -> [batch, query_tokens, 768]."""

    def __init__(self, config: QFormer, vision_hidden_size: int) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.intermediate_size,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=vision_hidden_size,
                layer_norm_eps=config.layer_norm_eps,
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(features), -1, -1)
        return self.qformer(
            query_embeds=queries, encoder_hidden_states=features
        ).last_hidden_state.to(features.dtype)


class ConcatPatchesBridge(nn.Module):
    """[batch, 1 + patches, hidden] -> [batch, patches / group, group * hidden], no class token."""

    def __init__(self, config: ConcatPatches) -> None:
        super().__init__()
        self.group = config.group

    def forward(self, features: Tensor) -> Tensor:
        batch, patches, hidden = features[:, 1:].shape
        return features[:, 1:].reshape(batch, patches // self.group, self.group * hidden)


class PooledMapBridge(nn.Module):
    """Feature maps -> [batch, grid * grid + 2, sum of their channels + classes].

    A vector for each cell of the grid and one for the whole picture: every map's mean there,
    layer-normed (the colours as they are), zeros for the classes. Then one of the classes' own:
    zeros, and their probabilities by the encoder's classifier.
    """

    def __init__(self, config: PooledMap, vision: EfficientNetLite) -> None:
        super().__init__()
        self.grid = config.grid
        self.classifier = nn.Linear(vision.hidden_size, vision.classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *features, colours = (self._pool(one) for one in maps)
        whole = maps[0].mean((2, 3))
        vectors = torch.cat([*(F.layer_norm(f, f.shape[-1:]) for f in features), colours], dim=-1)
        classes = self.classifier(whole).softmax(-1)[:, None]
        return torch.cat(
            [
                F.pad(vectors, (0, classes.shape[-1])),
                F.pad(classes, (vectors.shape[-1], 0)),
            ],
            dim=1,
        )

    def _pool(self, feature_map: Tensor) -> Tensor:
        """[batch, channels, side, side] -> [batch, grid * grid + 1, channels], the mean last."""
        cells = F.adaptive_avg_pool2d(feature_map, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([cells, feature_map.mean((2, 3))[:, None]], dim=1)


def at_length(embeds: Tensor, length: float) -> Tensor:
    """Each embedding [..., hidden] scaled to `length`; 0: as they are."""
    return F.normalize(embeds, dim=-1) * length if length else embeds


def build_bridge(config: ModelConfig) -> nn.Module:
    """What turns the encoder's features into the vectors that the projection reads."""
    match config.bridge:
        case QFormer():
            return QFormerBridge(config.bridge, config.vision.hidden_size)
        case ConcatPatches():
            return ConcatPatchesBridge(config.bridge)
        case PooledMap() if isinstance(config.vision, ClassesAndObjects):
            return ObjectsBridge(config.bridge, config.vision)
        case PooledMap():
            return PooledMapBridge(config.bridge, config.vision)


@dataclass
class TrainingBatch:
    """Packed training sequences, as `training.packing.pack` makes them.

    ids [rows, length]; image_rows [pictures in all, 2] (row, first position) beside `image_index`
    [pictures in all] into the batch's features; attention_mask [rows, 1, length, length] (true:
    may see); position_ids [rows, length]; the token at flat position
    `sources[i]` predicts `targets[i]` at temperature `temperatures[i]`, and its loss counts
    `weights[i]` times.
    """

    ids: Tensor
    image_rows: Tensor
    image_index: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    sources: Tensor
    targets: Tensor
    weights: Tensor
    temperatures: Tensor

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on `device`."""
        return TrainingBatch(**{name: t.to(device) for name, t in vars(self).items()})


class MiniGPT4(nn.Module):
    """The assembled model; only `projection` is ever trained.

    llm: a transformers model, which can be trained through, or a GGUF file's blocks, for the
    engine alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: nn.Module,
        bridge: nn.Module,
        projection: nn.Linear,
        llm: Union["PreTrainedModel", "BlockLlama"],
        tokenizer,
        quantize: str = "none",
        word_head: WordHead | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.bridge = bridge
        self.projection = projection
        self.llm = llm
        self.tokenizer = tokenizer
        self.quantize = quantize
        self.word_head = word_head
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    def pixel_values(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> [batch, 3, image_size, image_size] on the model's device."""
        pixels = torch.stack([preprocess(p, self.config.vision) for p in pictures])
        return pixels.to(self.device, next(self.encoder.parameters()).dtype)

    def encode_features(self, pixel_values: Tensor) -> Tensor:
        """Pixel values -> what the projection reads [batch, image_tokens, projection_in]."""
        features = self.encoder(pixel_values)  # [batch, patches, hidden], or feature maps
        return self.bridge(features)  # [batch, image_tokens, projection_in]

    def encode_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> image embeddings [batch, image_tokens, llm_hidden_size]."""
        return self.project(self.encode_features(self.pixel_values(pictures)))

    def project(self, features: Tensor) -> Tensor:
        """What `encode_features` gives -> image embeddings [batch, image_tokens, hidden]."""
        embeds = self.projection(features.to(self.projection.weight.dtype))
        return at_length(embeds, self.config.embedding_length)

    @torch.inference_mode()
    def find_words(self, features: Tensor) -> list[str]:
        """What a prompt lists of each picture, "" where the model has no word head.

        features: [batch, image_tokens, projection_in], from `encode_features`.
        """
        if self.word_head is None:
            return [""] * len(features)
        terms, words = self.word_head.terms, self.config.words
        found = self.word_head(features).tolist()
        return [listed(choose(probabilities, terms, words)) for probabilities in found]

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
        """RGB pictures -> image embeddings, float32 [image_tokens, llm_hidden_size] each."""
        return [*self.encode_images(pictures).float().cpu().numpy()]

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (IMAGE_ID read as 0) -> token embeddings [..., llm_hidden_size]."""
        return self.llm.get_input_embeddings()(ids.clamp_min(0))

    def embed(self, prompt: Prompt, image_embeds: Mapping[str, Tensor]) -> Tensor:
        """The prompt's embeddings [1, length, llm_hidden_size].

        image_embeds: picture key -> [image_tokens, llm_hidden_size].
        """
        embeds = self.embed_tokens(torch.tensor([prompt.ids], device=self.device))
        for position, image in prompt.images:
            vectors = image_embeds[image.key]
            embeds[0, position : position + len(vectors)] = vectors.to(embeds.dtype)
        return embeds

    def training_loss(self, features: Tensor, batch: TrainingBatch) -> Tensor:
        """Mean weighted cross-entropy over the answers' tokens.

        features: [pictures, image_tokens, projection_in], from `encode_features`.
        """
        embeds = self.embed_tokens(batch.ids)  # [rows, length, llm_hidden_size]
        # [n, image_tokens, llm_hidden_size]
        images = self.project(features).to(embeds.dtype)[batch.image_index]
        slots = batch.image_rows[:, 1:] + torch.arange(images.shape[1], device=embeds.device)
        embeds = embeds.index_put((batch.image_rows[:, :1], slots), images)
        # true/false -> what is added to the attention scores
        mask = torch.zeros_like(batch.attention_mask, dtype=embeds.dtype)
        mask = mask.masked_fill(~batch.attention_mask, torch.finfo(embeds.dtype).min)
        hidden_states = self.llm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        # Only positions that predict an answer's token go through the output layer.
        logits = self.llm.get_output_embeddings()(hidden_states.flatten(0, 1)[batch.sources])
        logits = logits.float() / batch.temperatures[:, None]
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        return (losses * batch.weights).mean()
