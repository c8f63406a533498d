"""The engine and the progress of loading it: the page opens before the model is loaded."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from minigpt4.errors import UserError

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine


class Loading:
    """Loads an engine in a thread of its own.

    engine: None until it is loaded; step: what is being done, in one line; error: why loading
    failed, None unless it did.
    """

    def __init__(self, load: Callable[[Callable[[str], None]], "AnyEngine"]) -> None:
        self.engine: AnyEngine | None = None
        self.error: UserError | None = None
        self.step = "…"
        self._load = load
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)

    @classmethod
    def done(cls, engine: "AnyEngine") -> "Loading":
        """For an engine that is loaded already."""
        loading = cls(lambda report: engine)
        loading.engine = engine
        return loading

    @property
    def name(self) -> str:
        """The model's; "" until it is loaded."""
        return self.engine.model.config.name if self.engine else ""

    @property
    def seconds(self) -> int:
        """Time since loading began."""
        return int(time.monotonic() - self._begun)

    def start(self) -> None:
        """Begin loading and return at once."""
        self._thread.start()

    def wait(self) -> "AnyEngine":
        """The engine, once it is loaded. Raises the error that loading failed with."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        if self.engine is None:
            raise UserError("The model could not be loaded.")
        return self.engine

    def _run(self) -> None:
        try:
            self.engine = self._load(self._report)
        except UserError as error:
            self.error = error
            self.step = str(error)

    def _report(self, line: str) -> None:
        self.step = line
