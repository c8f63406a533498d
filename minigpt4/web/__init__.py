"""The server: the chat page (Gradio), the HTTP API, and the limits on what both accept.

Gradio is imported without the type stubs (.pyi) that it would compare with its sources, and write
into its own folder, at every import: nothing reads them here, and they take half of that time.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader


class _WithoutStubs(MetaPathFinder):
    """Finds the one module that writes stubs."""

    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        if name != "gradio.component_meta":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module) -> None:
        super().exec_module(module)
        module.create_or_modify_pyi = lambda *_: None


sys.meta_path.insert(0, _WithoutStubs())
