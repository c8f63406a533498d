"""CenterNet on MobileNetV3: a frozen detector of COCO's 80 classes, and the objects that it finds.

The network is that of the repository 610265158/mobilenetv3_centernet, whose TensorFlow graph has
its batch norms folded into the convolutions. `tools/convert_detector.py` renames its tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.model.image import Detection
from minigpt4.model.parts import CenterNet


@dataclass(frozen=True)
class _Block:
    """The sizes and options of an inverted residual block of MobileNetV3."""

    kernel: int
    expanded: int
    channels: int
    stride: int = 1
    squeezed: int = 0  # channels of squeeze-and-excitation; 0: none
    hard_swish: bool = False


_STEM = 16
_BLOCKS = (
    _Block(3, 16, 16),  # the first one does not expand
    _Block(3, 64, 24, stride=2),
    _Block(3, 72, 24),
    _Block(5, 72, 32, stride=2, squeezed=24),
    _Block(5, 96, 32, squeezed=24),
    _Block(5, 96, 32, squeezed=24),
    _Block(3, 192, 64, stride=2, hard_swish=True),
    _Block(3, 160, 64, hard_swish=True),
    _Block(3, 144, 64, hard_swish=True),
    _Block(3, 144, 64, hard_swish=True),
    _Block(3, 384, 88, squeezed=96, hard_swish=True),
    _Block(3, 528, 88, squeezed=136, hard_swish=True),
    _Block(5, 528, 120, stride=2, squeezed=136, hard_swish=True),
    _Block(5, 720, 120, squeezed=184, hard_swish=True),
    _Block(5, 720, 120, squeezed=184, hard_swish=True),
)
# The head goes up from stride 32 to 4. At each stride: (channels that it reads from below, channels
# between, channels of the lateral branch).
_LATERALS = ((72, 18, 64), (96, 24, 96), (88, 22, 128))  # strides 4, 8 and 16
_UPSAMPLED = (64, 96, 128)  # channels of each branch, to strides 4, 8 and 16


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding, which is lopsided at stride 2."""

    def forward(self, hidden: Tensor) -> Tensor:
        padding = []
        for size, kernel, stride in zip(
            hidden.shape[:1:-1], self.kernel_size, self.stride, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(hidden, padding) if any(padding) else hidden)


def _depthwise(channels: int, kernel: int, stride: int = 1, bias: bool = False) -> _SameConv:
    return _SameConv(channels, channels, kernel, stride, groups=channels, bias=bias)


class _Separable(nn.Module):
    """A depthwise convolution, then a pointwise one."""

    def __init__(self, channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = _depthwise(channels, kernel)
        self.pointwise = nn.Conv2d(channels, out_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(hidden))


class _SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: weights for the channels, computed from their means."""

    def __init__(self, channels: int, squeezed: int, gate: Callable, bias: bool = True) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1, bias=bias)
        self.gate = gate

    def forward(self, hidden: Tensor) -> Tensor:
        squeezed = F.relu(self.reduce(hidden.mean((2, 3), keepdim=True)))
        return hidden * self.gate(self.expand(squeezed))


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project. Returns the expanded features, too."""

    def __init__(self, channels: int, block: _Block) -> None:
        super().__init__()
        self.activate = F.hardswish if block.hard_swish else F.relu
        self.residual = block.stride == 1 and channels == block.channels
        expands = channels != block.expanded
        self.expand = nn.Conv2d(channels, block.expanded, 1) if expands else None
        self.depthwise = _depthwise(block.expanded, block.kernel, block.stride, bias=True)
        self.squeeze_excite = (
            _SqueezeExcite(block.expanded, block.squeezed, F.hardsigmoid)
            if block.squeezed
            else None
        )
        self.project = nn.Conv2d(block.expanded, block.channels, 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        expanded = self.activate(self.expand(hidden)) if self.expand else hidden
        filtered = self.activate(self.depthwise(expanded))
        if self.squeeze_excite:
            filtered = self.squeeze_excite(filtered)
        projected = self.project(filtered)
        return (hidden + projected if self.residual else projected), expanded


class _Upsample(nn.Module):
    """The sum of two separable convolutions with different kernels, at twice the resolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.narrow = _Separable(channels, out_channels, 3)
        self.wide = _Separable(channels, out_channels, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.narrow(hidden) + self.wide(hidden)
        return _double(_double(hidden, 2), 3)


def _double(hidden: Tensor, axis: int) -> Tensor:
    """Twice as long: each value, then the mean of it and the next (TensorFlow 1's bilinear)."""
    last = hidden.shape[axis] - 1
    following = torch.cat([hidden.narrow(axis, 1, last), hidden.narrow(axis, last, 1)], axis)
    return torch.stack([hidden, (hidden + following) / 2], axis + 1).flatten(axis, axis + 1)


class _Lateral(nn.Module):
    """The head's branch from the backbone at one resolution."""

    def __init__(self, channels: int, between: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, between, 1)
        self.separable = _Separable(between, out_channels, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.separable(F.relu(self.reduce(hidden)))


class Detector(nn.Module):
    """RGB pixel values 0 to 255 [batch, 3, H, W], H and W multiples of 32 -> objects.

    Returns the last features [batch, hidden_size, H/32, W/32]; the heat map of the classes
    [batch, classes, H/4, W/4], 0 to 1: how likely an object's centre is at that place; and the
    distances in pixels from there to such an object's left, top, right and bottom edges
    [batch, 4, H/4, W/4].
    """

    def __init__(self, config: CenterNet) -> None:
        super().__init__()
        channels = (_STEM, *(block.channels for block in _BLOCKS))
        self.stem = _SameConv(3, _STEM, 3, 2)
        self.blocks = nn.ModuleList(
            _InvertedResidual(c, block) for c, block in zip(channels, _BLOCKS, strict=False)
        )
        self.last = nn.Conv2d(channels[-1], config.hidden_size, 1)
        self.laterals = nn.ModuleList(_Lateral(*sizes) for sizes in _LATERALS)
        below = (*(2 * width for width in _UPSAMPLED[1:]), config.hidden_size)
        self.upsamples = nn.ModuleList(
            _Upsample(c, width) for c, width in zip(below, _UPSAMPLED, strict=True)
        )
        joined = 2 * _UPSAMPLED[0]
        self.attention = _SqueezeExcite(joined, 32, torch.sigmoid, bias=False)
        self.classes = _Separable(joined, config.classes, 3)
        self.edges = _Separable(joined, 4, 3)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.hardswish(self.stem(pixels))
        kept, before = [], hidden
        for number, block in enumerate(self.blocks):
            hidden, expanded = block(before)
            if number in (3, 5):  # the features before this block's stride
                kept.append(expanded)
            elif number == 11:
                kept.append(hidden)
            before = hidden
        features = F.hardswish(self.last(hidden))
        hidden = features
        for lateral, upsample, own in reversed(
            [*zip(self.laterals, self.upsamples, kept, strict=True)]
        ):
            hidden = F.relu(torch.cat([lateral(own), upsample(hidden)], dim=1))
        hidden = self.attention(hidden)
        return features, self.classes(hidden).sigmoid(), self.edges(hidden)


# --- heat map -> objects ------------------------------------------------------------------------

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
# A peak of the heat map of at least this height is an object that the page outlines if an answer
# names it. Of such objects, those between 0.3 and 0.4 are as often right as those up to 0.5
# (docs/mini.md, 2026-11-30).
SURE = 0.3
MOST_DETECTIONS = 20
# If two boxes of one class overlap by more (intersection over union), only the surer one counts.
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
