"""The objects that a detector finds: their names, and their places in a picture."""

from torch import Tensor
from torch.nn import functional as F

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
