"""A picture -> pixel values -> features of the frozen visual encoder."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.model.detector import Detector
from minigpt4.model.parts import ClassesAndObjects, EfficientNetLite, EvaViT, Vision

# The published BLIP-2 image processor's statistics (CLIP's), per RGB channel.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(rgb: Image.Image, config: Vision) -> Tensor:
    """RGB picture -> pixel values [3, image_size, image_size]: squashed, not cropped; bicubic."""
    pixels = np.asarray(squash(rgb, config.image_size), dtype=np.float32)
    match config:
        case EvaViT():
            pixels = (pixels / 255.0 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
        case EfficientNetLite() | ClassesAndObjects():
            pixels = (pixels - 127.0) / 128.0
        case _:
            raise TypeError(f"preprocess has no case for a {type(config).__name__}")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def squash(rgb: Image.Image, size: int) -> Image.Image:
    """The picture at size x size, bicubic.

    Pillow resamples one axis after the other and rounds in between, so the order of the axes
    changes the result. Pillow 13 starts with the height if that shrinks by more than twice as much
    as the width; Pillow 12 does so only for extreme strips. This function does as Pillow 13 with
    both.
    """
    width, height = rgb.size
    bicubic = Image.Resampling.BICUBIC
    if height > size and height - size > 2 * (width - size):
        rgb = rgb.resize((width, size), bicubic)
    return rgb.resize((size, size), bicubic)


class EvaEncoder(nn.Module):
    """EVA ViT-g: pixel values [batch, 3, H, W] -> [batch, 1 + patches, hidden], class token first.

    The final norm is BLIP-2's `ln_vision`.
    """

    def __init__(self, config: EvaViT) -> None:
        from transformers import Blip2VisionConfig, Blip2VisionModel

        super().__init__()
        self.vit = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                layer_norm_eps=config.layer_norm_eps,
                qkv_bias=True,
            )
        )
        self.vit.post_layernorm.eps = config.ln_vision_eps

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vit(pixel_values=pixel_values).last_hidden_state


class EfficientNetEncoder(nn.Module):
    """EfficientNet-Lite: pixel values [batch, 3, 260, 260] -> feature maps.

    Each is [batch, channels, side, side]: the last one (1280 x 9 x 9), those of `config.blocks`,
    and the pixel values themselves.
    """

    def __init__(self, config: EfficientNetLite) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name(config.name)
        del self.net._fc  # the bridge has the classifier
        self.kept = {number for number, _ in config.blocks}

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        net, maps = self.net, []
        # The same as net.extract_features, which does not return the blocks' outputs.
        hidden = net._swish(net._bn0(net._conv_stem(pixel_values)))
        for number, block in enumerate(net._blocks):
            hidden = block(hidden)
            if number in self.kept:
                maps.append(hidden)
        return [net._swish(net._bn1(net._conv_head(hidden))), *maps, pixel_values]


class TwoEncoders(nn.Module):
    """Pixel values [batch, 3, 320, 320] -> feature maps of a classifier and of a detector.

    Their order is that of `ClassesAndObjects.features`; then the distances to objects' edges.
    """

    def __init__(self, config: ClassesAndObjects) -> None:
        super().__init__()
        self.side = config.classifier.image_size
        self.classifier = EfficientNetEncoder(config.classifier)
        self.detector = Detector(config.detector)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        smaller = F.interpolate(
            pixel_values, (self.side, self.side), mode="bilinear", antialias=True
        )
        # The classifier reads (RGB - 127) / 128, the detector RGB itself.
        return [*self.classifier(smaller), *self.detector(pixel_values * 128.0 + 127.0)]


def build_encoder(config: Vision) -> nn.Module:
    """The visual encoder of `config`, its weights not yet loaded."""
    match config:
        case EvaViT():
            return EvaEncoder(config)
        case EfficientNetLite():
            return EfficientNetEncoder(config)
        case ClassesAndObjects():
            return TwoEncoders(config)
    raise TypeError(f"build_encoder has no case for a {type(config).__name__}")


@contextmanager
def suitable_threads(config: Vision) -> Iterator[None]:
    """Compute small encoders on one thread of the CPU.

    A layer takes less than a millisecond. Two threads save a seventh of the time if nothing else
    runs. Beside other programs, they wait for each other in every layer (docs/log.md, 2026-11-29).
    """
    threads = torch.get_num_threads()
    if config.large or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
