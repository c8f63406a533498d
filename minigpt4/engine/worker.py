"""The engine's threads: each repeats a step while there is work, and sleeps while there is none."""

import threading
import time
from collections.abc import Callable


class Worker:
    """Repeats `step` in a thread of its own until `closing` is set.

    begin: is called first in each new thread. has_work: is called with `lock` held, at the
    beginning and whenever the lock is notified.

    started: when the current step began, None between steps. watched, lasted: see `Engine._watch`.
    """

    def __init__(
        self,
        name: str,
        lock: threading.Condition,
        closing: threading.Event,
        begin: Callable[[], None],
        has_work: Callable[[], bool],
        step: Callable[[], None],
    ) -> None:
        self._name, self._lock, self._closing = name, lock, closing
        self._begin, self._has_work, self._step = begin, has_work, step
        self.start()

    def start(self) -> None:
        """Start the first thread, or another in the place of a dead one."""
        self.started: float | None = None
        self.watched: float | None = None
        self.lasted = 0.0
        self.thread = threading.Thread(target=self._repeat, name=self._name, daemon=True)
        self.thread.start()

    def _repeat(self) -> None:
        self._begin()
        while True:
            with self._lock:
                while not (self._closing.is_set() or self._has_work()):
                    self._lock.wait()
            if self._closing.is_set():
                return
            self.started = time.monotonic()
            self._step()
            self.started = None
