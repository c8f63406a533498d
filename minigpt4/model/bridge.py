"""The bridge: image features -> the vectors that the projection reads, one per image token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import ModelConfig
from minigpt4.model.parts import ConcatPatches, Maps, PooledMap, QFormer


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
        # [1, query_tokens, 768] -> [batch, query_tokens, 768]
        queries = self.query_tokens.expand(len(features), -1, -1)
        return self.qformer(
            query_embeds=queries, encoder_hidden_states=features
        ).last_hidden_state.to(features.dtype)


class ConcatPatchesBridge(nn.Module):
    """[batch, 1 + patches, hidden] -> [batch, patches / group, group * hidden].

    The class token, which comes first, is dropped.
    """

    def __init__(self, config: ConcatPatches) -> None:
        super().__init__()
        self.group = config.group

    def forward(self, features: Tensor) -> Tensor:
        batch, patches, hidden = features[:, 1:].shape
        return features[:, 1:].reshape(batch, patches // self.group, self.group * hidden)


class PooledMapBridge(nn.Module):
    """Feature maps -> [batch, tokens, sum of their channels + classes].

    First a vector for each cell of the grid and one for the whole picture: the mean of every map
    there, layer-normed (except the colours), the square roots of the heat map's maxima, if there is
    a heat map, and zeros for the classes. Then a vector with only the classes' probabilities by the
    encoder's own classifier and, if there is a heat map, one with only its maxima over the whole
    picture. The distances to objects' edges, which come last, are not read.
    """

    def __init__(self, config: PooledMap, maps: Maps) -> None:
        super().__init__()
        self.grid, self.objects = config.grid, maps.objects
        # The colours' place among the maps: the last one, or before the detector's two.
        self.colours = len(maps.channels) - (3 if maps.objects else 1)
        self.classifier = nn.Linear(maps.channels[0], maps.classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        pooled = [_means(one, self.grid) for one in (maps[:-2] if self.objects else maps)]
        parts = [p if i == self.colours else _layer_norm(p) for i, p in enumerate(pooled)]
        if self.objects:
            parts.append(self._maxima(maps[-2]))
        vectors = torch.cat(parts, dim=-1)  # [batch, grid * grid + 1, channels]
        classes = self.classifier(maps[0].mean((2, 3))).softmax(-1)[:, None]
        before, after = vectors.shape[-1], classes.shape[-1]
        rows = [F.pad(vectors, (0, after)), F.pad(classes, (before, 0))]
        if self.objects:
            found = vectors[:, -1:, -self.objects :]
            rows.append(F.pad(found, (before - self.objects, after)))
        return torch.cat(rows, dim=1)

    def _maxima(self, heat: Tensor) -> Tensor:
        """As `_means`, but the square roots of maxima: so weak signs of an object count more."""
        cells = F.adaptive_max_pool2d(heat, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([cells, heat.amax((2, 3))[:, None]], dim=1).sqrt()


def build_bridge(config: ModelConfig) -> nn.Module:
    """The bridge of `config`, its weights not yet loaded."""
    features = config.features
    match config.bridge:
        case QFormer() as bridge:
            return QFormerBridge(bridge, features.width)
        case ConcatPatches() as bridge:
            return ConcatPatchesBridge(bridge)
        case PooledMap() as bridge:
            return PooledMapBridge(bridge, features)
    raise TypeError(f"build_bridge has no case for a {type(config.bridge).__name__}")


def _means(feature_map: Tensor, grid: int) -> Tensor:
    """[batch, channels, side, side] -> means [batch, grid * grid + 1, channels], the whole's
    last."""
    cells = F.adaptive_avg_pool2d(feature_map, grid).flatten(2).transpose(1, 2)
    return torch.cat([cells, feature_map.mean((2, 3))[:, None]], dim=1)


def _layer_norm(vectors: Tensor) -> Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:])
