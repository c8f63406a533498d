"""The bridge for two encoders: what a classifier and a detector see, pooled to the same grid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import Maps, PooledMap
from minigpt4.model.image import Detection

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
MOST_DETECTIONS = 20
# Of two boxes of one class that overlap by more (intersection over union), the surer one counts.
MOST_OVERLAP = 0.5
STRIDE = 4  # pixels between two places of the heat map


class ObjectsBridge(nn.Module):
    """Feature maps of `TwoEncoders` -> [batch, grid * grid + 3, sum of their channels + classes].

    The distances to objects' edges are not read.

    A vector for each cell of the grid and one for the whole picture: every map's mean there,
    layer-normed (the colours as they are), the square root of the heat map's maximum, and zeros
    for the classes. Then one that holds nothing but the probabilities of the classifier's classes,
    and one that holds nothing but the heat map's maximum over the whole picture.
    """

    def __init__(self, config: PooledMap, maps: Maps) -> None:
        super().__init__()
        self.grid = config.grid
        self.classifier = nn.Linear(maps.channels[0], maps.classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *seen, colours, features, heat, _ = maps
        *pooled, found = (_layer_norm(means(one, self.grid)) for one in (*seen, features))
        vectors = torch.cat(
            [*pooled, means(colours, self.grid), found, self._maxima(heat)], dim=-1
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

    def _maxima(self, heat: Tensor) -> Tensor:
        """`means` of maxima. A root, since a weak sign of an object is a sign all the same."""
        cells = F.adaptive_max_pool2d(heat, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([cells, heat.amax((2, 3))[:, None]], dim=1).sqrt()


def means(feature_map: Tensor, grid: int) -> Tensor:
    """[batch, channels, side, side] -> [batch, grid * grid + 1, channels], the whole last."""
    cells = F.adaptive_avg_pool2d(feature_map, grid).flatten(2).transpose(1, 2)
    return torch.cat([cells, feature_map.mean((2, 3))[:, None]], dim=1)


def _layer_norm(vectors: Tensor) -> Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:])


def detections(heat: Tensor, edges: Tensor) -> tuple[Detection, ...]:
    """The sure objects of a heat map [classes, H, W], the surest first.

    edges [4, H, W]: pixels from a place to the left, top, right and bottom edges of its object.
    """
    highest = F.max_pool2d(heat[None], 3, stride=1, padding=1)[0]
    peaks = heat * (heat == highest) * (heat >= SURE)
    values, places = peaks.flatten().topk(MOST_DETECTIONS)
    height, width = heat.shape[1:]
    found: list[Detection] = []
    for certainty, place in zip(values.tolist(), places.tolist(), strict=True):
        if not certainty:
            break
        number, y, x = place // (height * width), place // width % height, place % width
        left, top, right, bottom = (edges[:, y, x] / STRIDE).tolist()
        box = (
            max((x - left) / width, 0.0),
            max((y - top) / height, 0.0),
            min((x + right) / width, 1.0),
            min((y + bottom) / height, 1.0),
        )
        one = Detection(OBJECTS[number], *box, certainty)
        if all(other.name != one.name or _overlap(other, one) < MOST_OVERLAP for other in found):
            found.append(one)
    return tuple(found)


def _overlap(one: Detection, other: Detection) -> float:
    """Intersection over union of two boxes."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (one, other)]
    return shared / (sum(areas) - shared) if shared else 0.0
