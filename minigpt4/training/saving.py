"""What a run does beside its steps: whole steps despite Ctrl-C, and the plot of its losses."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended; only the main thread receives it."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed = []
    signal.signal(signal.SIGINT, lambda *call: pressed.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(*pressed[0])


def plot_losses(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Plot the loss of each step and its mean over 25 steps, as PNG."""
    from matplotlib.figure import Figure

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = min(25, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="each step")
    axes.plot(steps[window - 1 :], smooth, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
