"""The bridge: image features -> the vectors that the projection reads, one per image token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import ConcatPatches, Maps, ModelConfig, PooledMap, QFormer
from minigpt4.model.objects import ObjectsBridge, means


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
    """Feature maps -> [batch, grid * grid + 2, sum of their channels + classes].

    One vector for each cell of the grid and one for the whole picture: the mean of every map there,
    layer-normed (the colours as they are), and zeros for the classes. Then one vector for the
    classes: zeros, and the probabilities by the encoder's own classifier.
    """

    def __init__(self, config: PooledMap, maps: Maps) -> None:
        super().__init__()
        self.grid = config.grid
        self.classifier = nn.Linear(maps.channels[0], maps.classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *features, colours = (means(one, self.grid) for one in maps)
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


def build_bridge(config: ModelConfig) -> nn.Module:
    """The bridge of `config`, its weights not yet loaded."""
    features = config.features
    match config.bridge:
        case QFormer() as bridge:
            return QFormerBridge(bridge, features.width)
        case ConcatPatches() as bridge:
            return ConcatPatchesBridge(bridge)
        case PooledMap() as bridge:
            return (ObjectsBridge if config.detects else PooledMapBridge)(bridge, features)
    raise TypeError(f"build_bridge has no case for a {type(config.bridge).__name__}")
