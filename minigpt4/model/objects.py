"""The bridge for two encoders: what a classifier and a detector see, pooled to the same grid."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import ClassesAndObjects, PooledMap
from minigpt4.model.image import Spot

# COCO's classes, in the detector's order, as they are listed in a prompt.
_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, "
    "wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, "
    "hot dog, pizza, donut, cake, chair, couch, potted plant, bed, table, toilet, television, "
    "laptop, computer mouse, remote control, keyboard, phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair dryer, toothbrush"
)
OBJECTS = tuple(_NAMES.split(", "))


# From this height on, a peak of the heat map is an object that the page points at.
SURE = 0.4
MOST_SPOTS = 20
# An object's half side, in widths (standard deviations) of its peak.
SIDE_OF_PEAK = 4.5


class ObjectsBridge(nn.Module):
    """Feature maps of `TwoEncoders` -> [batch, grid * grid + 3, sum of their channels + classes].

    A vector for each cell of the grid and one for the whole picture: every map's mean there,
    layer-normed (the colours as they are), the square root of the heat map's maximum, and zeros
    for the classes. Then one that holds nothing but the probabilities of the classifier's classes,
    and one that holds nothing but the heat map's maximum over the whole picture.
    """

    def __init__(self, config: PooledMap, vision: ClassesAndObjects) -> None:
        super().__init__()
        self.grid = config.grid
        self.classifier = nn.Linear(vision.classifier.hidden_size, vision.classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *seen, colours, features, heat = maps
        pooled = [_layer_norm(self._means(one)) for one in seen]
        vectors = torch.cat(
            [*pooled, self._means(colours), _layer_norm(self._means(features)), self._maxima(heat)],
            dim=-1,
        )  # [batch, grid * grid + 1, channels]
        classes = self.classifier(maps[0].mean((2, 3))).softmax(-1)[:, None]
        objects = vectors[:, -1:, -heat.shape[1] :]
        before, after = vectors.shape[-1], classes.shape[-1]
        return torch.cat(
            [
                F.pad(vectors, (0, after)),
                F.pad(classes, (before, 0)),
                F.pad(objects, (before - heat.shape[1], after)),
            ],
            dim=1,
        )

    def _means(self, feature_map: Tensor) -> Tensor:
        """[batch, channels, side, side] -> [batch, grid * grid + 1, channels], the whole last."""
        cells = F.adaptive_avg_pool2d(feature_map, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([cells, feature_map.mean((2, 3))[:, None]], dim=1)

    def _maxima(self, heat: Tensor) -> Tensor:
        """The same of maxima. A root, since a weak sign of an object is a sign all the same."""
        cells = F.adaptive_max_pool2d(heat, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([cells, heat.amax((2, 3))[:, None]], dim=1).sqrt()


def _layer_norm(vectors: Tensor) -> Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:])


def find_spots(heat: Tensor) -> tuple[Spot, ...]:
    """The sure objects of a heat map [classes, H, W], the surest first.

    CenterNet's peaks are Gaussians whose width grows with the object: the area above half of a
    peak's height, which is 2 ln 2 * pi * deviation^2, tells its size.
    """
    highest = F.max_pool2d(heat[None], 3, stride=1, padding=1)[0]
    peaks = heat * (heat == highest) * (heat >= SURE)
    values, places = peaks.flatten().topk(MOST_SPOTS)
    height, width = heat.shape[1:]
    spots = []
    for certainty, place in zip(values.tolist(), places.tolist(), strict=True):
        if not certainty:
            break
        number, y, x = place // (height * width), place // width % height, place % width
        area = _area_around(heat[number] > certainty / 2, x, y)
        deviation = (area / (2 * math.log(2) * math.pi)) ** 0.5
        radius = SIDE_OF_PEAK * deviation / max(height, width)
        spots.append(
            Spot(OBJECTS[number], (x + 0.5) / width, (y + 0.5) / height, radius, certainty)
        )
    return tuple(spots)


def _area_around(mask: Tensor, x: int, y: int) -> int:
    """Cells of the connected region of `mask` [H, W] that holds (x, y)."""
    region = torch.zeros_like(mask)
    region[y, x] = True
    while True:
        grown = F.max_pool2d(region[None].float(), 3, stride=1, padding=1)[0].bool() & mask
        if torch.equal(grown, region):
            return int(region.sum())
        region = grown
