"""The server: the chat page (Gradio), the HTTP API, and the limits on what both accept.

At every import, Gradio would compare type stubs (.pyi) with its sources and write them into its own
folder. This takes half of the import's time and nothing here reads them: it is left out. The HTTP
clients that Gradio makes during the import ignore the environment: unusable proxies or certificates
in it would end the program, which needs none.
"""

import sys
from functools import partialmethod
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any


class _Finder(MetaPathFinder):
    """Finds the modules that get a loader of their own."""

    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        if name not in _LOADERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LOADERS[name](name, spec.loader.path)
        return spec


class _WithoutStubs(SourceFileLoader):
    def exec_module(self, module) -> None:
        super().exec_module(module)
        module.create_or_modify_pyi = lambda *_: None


class _WithoutEnvironment(SourceFileLoader):
    def exec_module(self, module) -> None:
        import httpx

        names = ("Client", "AsyncClient", "HTTPTransport", "AsyncHTTPTransport")
        parts: list[Any] = [getattr(httpx, name) for name in names]
        originals = [(part, part.__init__) for part in parts]
        for part, original in originals:
            part.__init__ = partialmethod(original, trust_env=False)
        try:
            super().exec_module(module)
        finally:
            for part, original in originals:
                part.__init__ = original


_LOADERS = {"gradio": _WithoutEnvironment, "gradio.component_meta": _WithoutStubs}
sys.meta_path.insert(0, _Finder())
