"""The answer of CenterNet's TensorFlow.js graph for a drawn picture: the test's reference.

    python -m tools.detector_reference models/centernet.json tests/parity/detector.safetensors

Runs the graph operation by operation, in the order and with the attributes that it is written with.
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tools.convert_detector import read_graph

OUTPUTS = {
    "features": "tower_0/extern1/hard_swish/mul_1",
    "heat": "tower_0/keypoints",
    "edges": "tower_0/wh",
}
INPUT = "tower_0/images"


def drawn_picture(side: int = 96) -> Tensor:
    """RGB 0 to 255 [1, 3, side, side]: waves of three colours and a bright square."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [
        127.5 + 127.5 * torch.sin(rows / a + columns / b) for a, b in ((7, 11), (13, 5), (3, 29))
    ]
    picture = torch.stack(waves)[None]
    picture[:, :, side // 4 : side // 2, side // 3 : side // 2] = 255.0
    return picture


class Graph:
    """The graph's nodes, and its tensors as float32."""

    def __init__(self, path: Path) -> None:
        nodes = json.loads(path.read_text())["modelTopology"]["node"]
        self.nodes = {node["name"]: node for node in nodes}
        self.tensors = {
            k: torch.from_numpy(v.astype(np.float32)) for k, v in read_graph(path).items()
        }

    def value(self, name: str, known: dict[str, Tensor]) -> Tensor:
        """The node's output in NHWC; `known` gains what is computed on the way."""
        if name not in known:
            node = self.nodes[name]
            inputs = [i for i in node.get("input", []) if not i.startswith("^")]
            if node["op"] == "Const":
                known[name] = self.tensors.get(name, torch.zeros(0))  # integers are not needed
            else:
                known[name] = _operation(node, [self.value(i, known) for i in inputs])
        return known[name]


def _strings(node: dict, name: str) -> list[str]:
    found = node.get("attr", {}).get(name, {})
    values = found.get("list", {}).get("s", []) if "list" in found else [found.get("s", "")]
    return [base64.b64decode(value).decode() for value in values]


def _operation(node: dict, inputs: list[Tensor]) -> Tensor:
    first, *rest = inputs
    match node["op"]:
        case "_FusedConv2D" | "Conv2D" | "FusedDepthwiseConv2dNative" | "DepthwiseConv2dNative":
            return _convolution(node, first, *rest)
        case "Add":
            return first + rest[0]
        case "Mul":
            return first * rest[0]
        case "Mean":
            return first.mean((1, 2), keepdim=True)
        case "Relu":
            return F.relu(first)
        case "Relu6":
            return F.relu6(first)
        case "Sigmoid":
            return first.sigmoid()
        case "Identity":
            return first
        case "ConcatV2":
            return torch.cat(inputs[:-1], dim=-1)
        case "ResizeBilinear":  # neither half-pixel centres nor aligned corners; always twice
            return _twice(_twice(first, 1), 2)
        case other:
            raise NotImplementedError(other)


def _convolution(node: dict, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides = [int(i) for i in node["attr"]["strides"]["list"]["i"][1:3]]
    hidden = hidden.permute(0, 3, 1, 2)
    groups = hidden.shape[1] if "Depthwise" in node["op"] else 1
    weight = weight.permute(2, 3, 0, 1) if groups > 1 else weight.permute(3, 2, 0, 1)
    if _strings(node, "padding") == ["SAME"]:
        for axis in (2, 3):
            size, kernel, stride = hidden.shape[axis], weight.shape[axis], strides[axis - 2]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            before, after = total // 2, total - total // 2
            hidden = F.pad(hidden, (before, after) if axis == 3 else (0, 0, before, after))
    output = F.conv2d(hidden, weight, bias, strides, groups=groups).permute(0, 2, 3, 1)
    return F.relu(output) if "Relu" in _strings(node, "fused_ops") else output


def _twice(hidden: Tensor, axis: int) -> Tensor:
    size = hidden.shape[axis]
    places = torch.arange(2 * size) / 2
    low = places.floor().long()
    high = (low + 1).clamp_max(size - 1)
    share = (places - low).view([-1 if i == axis else 1 for i in range(4)])
    return torch.lerp(hidden.index_select(axis, low), hidden.index_select(axis, high), share)


def main() -> None:
    """Write the picture's outputs, NCHW, in 16 bit."""
    source, target = map(Path, sys.argv[1:])
    graph, known = Graph(source), {INPUT: drawn_picture().permute(0, 2, 3, 1)}
    with torch.inference_mode():
        outputs = {
            what: graph.value(name, known).permute(0, 3, 1, 2).contiguous().half()
            for what, name in OUTPUTS.items()
        }
    save_file(outputs, target)


if __name__ == "__main__":
    main()
