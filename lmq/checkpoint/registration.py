"""Registration with transformers that costs nothing until transformers' quantizers are imported.

Importing them takes seconds, which `lmq --help` and every process that only reads tables should not pay.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_QUANTIZERS_MODULE = "transformers.quantizers.auto"
_LMQ_MODULE = "lmq.checkpoint.hf"
"""Registers the method `lmq` when it is imported."""


def register_with_transformers() -> None:
    """Register now if transformers' quantizers are imported already, or as soon as they are. Idempotent."""
    if _QUANTIZERS_MODULE in sys.modules:
        importlib.import_module(_LMQ_MODULE)
    elif not any(isinstance(finder, _QuantizersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuantizersFinder())


class _QuantizersFinder(MetaPathFinder):
    """Finds one module as usual and has `_RegisteringLoader` load it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads the module, then imports the one that registers; every other request goes to the usual loader."""

    def __init__(self, usual: Loader):
        self._usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._usual.exec_module(module)
        importlib.import_module(_LMQ_MODULE)

    def __getattr__(self, name: str) -> object:
        return getattr(self._usual, name)
