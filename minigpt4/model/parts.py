"""Sizes of the frozen parts: encoders, their outputs, and bridges. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Patches:
    """An encoder's output: vectors [batch, 1 + count, width], the class token's first."""

    count: int
    width: int


@dataclass(frozen=True)
class Maps:
    """An encoder's output: feature maps, each [batch, channels, side, side].

    The classifier of its `classes` reads the first. The last is the RGB picture; if the encoder
    finds kinds of `objects`, the detector's features and heat map come after it.
    """

    channels: tuple[int, ...]
    classes: int
    objects: int = 0

    @property
    def objects_column(self) -> int:
        """The first column of the heat map's maxima, one for each kind of object, in a vector."""
        return sum(self.channels) - self.objects


@dataclass(frozen=True)
class EvaViT:
    """EVA ViT-g/14 as BLIP-2 uses it: without its last block and its final norm."""

    image_size: int = 224
    # Of the checkpoint's position embedding. Not read, but part of this class's repr, which enters
    # the names of kept files: if the repr changes, everybody encodes and converts again.
    pretrain_image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1408
    layers: int = 39
    heads: int = 16
    intermediate_size: int = 6144
    layer_norm_eps: float = 1e-6
    ln_vision_eps: float = 1e-5
    large: ClassVar = True

    @property
    def features(self) -> Patches:
        return Patches((self.image_size // self.patch_size) ** 2, self.hidden_size)


@dataclass(frozen=True)
class EfficientNetLite:
    """EfficientNet-Lite: its last feature map [hidden_size, 9, 9] at 260 px, and earlier ones.

    blocks: (number, channels) of each block whose output is also used as a feature map.
    classes: number of classes of its classifier (ImageNet's).
    """

    name: str = "efficientnet-lite2"
    image_size: int = 260
    hidden_size: int = 1280
    blocks: tuple[tuple[int, int], ...] = ((6, 48), (14, 120), (20, 352))
    classes: int = 1000
    large: ClassVar = False

    @property
    def features(self) -> Maps:
        """The last feature map, those of the blocks, and the RGB picture."""
        blocks = (channels for _, channels in self.blocks)
        return Maps((self.hidden_size, *blocks, 3), self.classes)


@dataclass(frozen=True)
class CenterNet:
    """A detector of COCO's classes: features [hidden_size, side / 32, side / 32], and a heat map of
    the objects' centres [classes, side / 4, side / 4]."""

    image_size: int = 320
    hidden_size: int = 480
    classes: int = 80


@dataclass(frozen=True)
class ClassesAndObjects:
    """Two encoders of one picture: a classifier, and a detector of objects."""

    classifier: EfficientNetLite = field(default_factory=EfficientNetLite)
    detector: CenterNet = field(default_factory=CenterNet)
    large: ClassVar = False

    @property
    def image_size(self) -> int:
        """Side of the pixel values, which are those of the detector."""
        return self.detector.image_size

    @property
    def features(self) -> Maps:
        """The classifier's maps, then the detector's features and heat map."""
        seen, found = self.classifier.features, self.detector
        channels = (*seen.channels, found.hidden_size, found.classes)
        return Maps(channels, seen.classes, found.classes)


# Every encoder has `image_size`, the side of its pixel values; `features`, the sizes of its output;
# and `large`: a picture takes seconds on a CPU, so there it computes in the language model's type,
# on all threads, and embeddings are kept on the disk.
Vision = EvaViT | EfficientNetLite | ClassesAndObjects


@dataclass(frozen=True)
class QFormer:
    """BLIP-2's Querying Transformer: `query_tokens` vectors attend to the image features."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    query_tokens: int = 32
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    reads: ClassVar = Patches

    def tokens(self, features: Any) -> int:
        return self.query_tokens

    def width(self, features: Any) -> int:
        return self.hidden_size


@dataclass(frozen=True)
class ConcatPatches:
    """The Llama-2 variant: `group` neighbouring patch features are concatenated; no Q-Former."""

    group: int = 4
    reads: ClassVar = Patches

    def tokens(self, features: Patches) -> int:
        return features.count // self.group

    def width(self, features: Patches) -> int:
        return features.width * self.group


@dataclass(frozen=True)
class PooledMap:
    """Feature maps pooled to grid x grid, their mean, and two vectors of the whole picture: the
    classes' probabilities and, if there is a heat map, its maxima."""

    grid: int = 5
    reads: ClassVar = Maps

    def tokens(self, features: Maps) -> int:
        return self.grid**2 + 2 + (features.objects > 0)

    def width(self, features: Maps) -> int:
        return sum(features.channels) + features.classes


# Every bridge has the kind of features that it `reads`, the number of vectors that it makes from
# one picture (`tokens`), and the `width` of each.
Bridge = QFormer | ConcatPatches | PooledMap
