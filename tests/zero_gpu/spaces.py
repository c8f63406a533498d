"""Stands in for the package `spaces` of ZeroGPU: what is documented of its decorator, no GPU.

A generator function becomes one that runs in a forked process: its argument goes there pickled,
what it yields comes back pickled, closing it stops the process's work. Coroutines are refused.
"""

import inspect
import multiprocessing
import os
from collections.abc import Callable
from functools import wraps

fork = multiprocessing.get_context("fork")
asked: list[float] = []  # seconds of the loans


def GPU(task: Callable | None = None, *, duration: Callable | int = 60) -> Callable:
    if task is None:
        return lambda task: GPU(task, duration=duration)
    if inspect.iscoroutinefunction(task) or inspect.isasyncgenfunction(task):
        raise NotImplementedError
    assert inspect.isgeneratorfunction(task)

    @wraps(task)
    def lent(*arguments):
        asked.append(duration(*arguments) if callable(duration) else duration)
        if os.environ.get("NO_QUOTA"):
            raise RuntimeError("You have exceeded your <b>GPU quota</b>")
        to, back, stop = fork.SimpleQueue(), fork.SimpleQueue(), fork.Event()

        def work() -> None:
            generator = task(*to.get())
            try:
                for value in generator:
                    if stop.is_set():
                        break
                    back.put(("value", value))
            except Exception as error:
                back.put(("error", type(error).__name__))
            generator.close()
            back.put(("end", stop.is_set()))

        worker = fork.Process(target=work, daemon=True)
        worker.start()
        to.put(arguments)
        try:
            while True:
                kind, value = back.get()
                if kind == "error":
                    raise RuntimeError(value)
                if kind == "end":
                    return
                yield value
        finally:
            stop.set()
            worker.join(20)
            assert not worker.is_alive(), "the work goes on after it was stopped"

    return lent
