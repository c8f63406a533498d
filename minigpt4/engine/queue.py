"""Who waits for an engine and who is being answered, whichever engine it is."""

import time
from collections import deque
from collections.abc import Collection
from contextlib import AbstractContextManager

from minigpt4.engine.faults import FULL, fault
from minigpt4.engine.totals import Totals
from minigpt4.errors import UserError


class Queue:
    """max_running: answers at once; max_waiting: requests that may wait for their turn.

    Its owner fills `_waiting` and `_running`, holding `_lock`.
    """

    _lock: AbstractContextManager
    _waiting: deque
    _running: Collection

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.totals = Totals()

    def refuse_if_full(self) -> None:
        """Raise what `submit` would raise of any request now: it may save work before."""
        try:
            with self._lock:
                self._refuse_any()
        except UserError as error:
            self.totals.errors[error.kind] += 1
            raise

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._running)

    def _refuse_any(self) -> None:
        if len(self._waiting) >= self.max_waiting:
            raise fault(FULL)

    def _drained(self, seconds: float) -> bool:
        """Was everything answered within `seconds`?"""
        end = time.monotonic() + seconds
        while True:
            with self._lock:  # on its way from the one to the other, a request is in neither
                if not (self._waiting or self._running):
                    return True
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
