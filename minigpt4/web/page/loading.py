"""The engines and the progress of loading them: the page opens before the models are loaded."""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from minigpt4.errors import UserError

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

log = logging.getLogger(__name__)


class Loading:
    """Loads each model's engine in a thread of its own, one model after another.

    engines: none until all are loaded; step: what is being done, in one English line; error: why
    loading failed, None unless it did.
    """

    def __init__(self, *loads: Callable[[Callable[[str], None]], "AnyEngine"]) -> None:
        self.engines: list[AnyEngine] = []
        self.error: UserError | None = None
        self.step = "…"
        self._loads = loads
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)

    @classmethod
    def done(cls, *engines: "AnyEngine") -> "Loading":
        """For engines that are loaded already."""
        loading = cls(*(lambda report, engine=engine: engine for engine in engines))
        loading.engines = [*engines]
        return loading

    @property
    def several(self) -> bool:
        """Whether visitors may choose among models."""
        return len(self._loads) > 1

    @property
    def engine(self) -> "AnyEngine | None":
        """The first model's engine; None until all are loaded."""
        return self.engines[0] if self.engines else None

    def find(self, model: str) -> "AnyEngine | None":
        """The engine of the model of this name, or else the first; None until all are loaded."""
        named = (engine for engine in self.engines if engine.model.config.name == model)
        return next(named, self.engine)

    def name(self, model: str) -> str:
        """The name of the model that `find` finds; "" until all are loaded."""
        engine = self.find(model)
        return engine.model.config.name if engine else ""

    @property
    def seconds(self) -> int:
        """Time since loading began."""
        return int(time.monotonic() - self._begun)

    def start(self) -> None:
        """Begin loading and return at once."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until all are loaded. Raises the error if loading failed."""
        self._thread.join()
        if self.error is not None:
            raise self.error

    def leave(self, status: int) -> None:
        """If models are still loading, end the program with this status. A normal exit would
        abort, because the loading thread is inside torch."""
        # Not is_alive(): in Python 3.11 it is False after a signal has interrupted join().
        if self._thread.ident and not self.engines and self.error is None:
            atexit._run_exitfuncs()
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)

    def _run(self) -> None:
        engines: list[AnyEngine] = []
        try:
            for load in self._loads:
                engines.append(load(self._report))
        except Exception as error:
            for engine in engines:
                engine.close()
            if not isinstance(error, UserError):
                log.exception("while loading")
                sentence = "The model could not be loaded: the server's log says why."
                error = UserError(sentence, message_id="not_loaded_see_log")
            self.error = error
        else:
            self.engines = engines

    def _report(self, line: str) -> None:
        self.step = line
