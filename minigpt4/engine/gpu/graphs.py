"""CUDA graphs: hundreds of kernel launches recorded once and replayed by one call."""

from collections.abc import Callable
from typing import Protocol

import torch


class Graphs(Protocol):
    """How a step is made repeatable."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A call that repeats `step`, which allocates nothing and reads and writes fixed memory."""


class CudaGraphs:
    """Records the launches on the current GPU."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run the step once, which compiles its kernels, and record it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


class NoGraphs:
    """Launches the kernels one by one: for tests, and for machines without CUDA."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step itself."""
        return step
