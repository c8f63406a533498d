"""Interruptions, checkpoints and the loss plot of a run: signals end it only after a complete step,
and it can be resumed."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minigpt4.data.files import lock
from minigpt4.errors import UserError, say


class Run(Protocol):
    """A trainer; `save` returns whether it wrote the run's files."""

    step: int

    def save(self) -> bool: ...


@contextmanager
def saved_when_stopped(run: Run) -> Iterator[None]:
    """SIGTERM acts as Ctrl-C in the block; either ends it with KeyboardInterrupt, after `save`."""
    main = threading.current_thread() is threading.main_thread()  # only this receives signals
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        with uninterrupted():  # pressed twice
            if run.save():
                say(f"Stopped after step {run.step}: the same command goes on from there.")
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect only after the block."""
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    for number in handlers:
        signal.signal(number, lambda *call: pressed.append(call))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if pressed:
        handlers[pressed[0][0]](*pressed[0])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder in the block. UserError if one is in it.

    Nothing is checked on disks that cannot lock, and on Windows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusal = (
        f"Another run is writing {folder}: wait for it, or choose another folder with “--out”."
    )
    with (folder / ".lock").open("a") as file:
        lock(file, refusal)
        yield


def check_finite(values: Tensor, step: int) -> None:
    """UserError if a run has diverged."""
    if not values.isfinite().all():
        raise UserError(
            f"The run has diverged in step {step}, as its loss or weights are no finite numbers: "
            "start again with a lower “--peak-lr”, in another folder (“--out”)."
        )


def read_run(path: Path, identity: str, device: str | torch.device = "cpu") -> dict | None:
    """The state in a run's checkpoint, None if there is none yet.

    UserError if it is damaged, or if its "identity" is that of another run.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["identity"]
    except Exception as error:
        raise UserError(
            f"{path} is damaged: delete it to start again, or choose another folder with “--out”."
        ) from error
    if found != identity:
        raise UserError(
            f"{path} belongs to a run with other data, another model or other hyperparameters, or "
            "of an earlier version of this program: repeat its options, or choose another folder "
            "with “--out”."
        )
    return state


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
