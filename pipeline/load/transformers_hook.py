"""Register the quantization method `birkhoff` with transformers, whichever package is imported first.

transformers has no entry point for quantizers: they register in a module that it imports with its models. Where that is
imported already, ours registers at once, else right after it; nothing is imported that the user does not import. For
that, a finder stands in `sys.meta_path` until transformers is imported; `register` does without.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


EXPLICIT = "BIRKHOFF_TRANSFORMERS"
"""With `explicit` in this variable of the environment, `install` does nothing: `register` is called instead."""


def install() -> None:
    """Register now or when the time has come; once, however often it is called."""
    if os.environ.get(EXPLICIT) == "explicit":
        return
    if (registry := sys.modules.get(_REGISTRY)) is not None:
        _register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Register now, importing what that takes, and leave no finder behind.

    Raises:
        ImportError: transformers is not installed, or takes no quantization methods from others.
    """
    registry = importlib.import_module(_REGISTRY)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    if not hasattr(registry, "register_quantizer"):
        raise ImportError(
            "this transformers takes no quantization methods from others: pip install 'transformers>=5,<6'"
        )
    _register(registry)


class _Finder:
    """Finds the registry as the finders after it do, and has its loader register ours at the end; then it goes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        others = (finder for finder in list(sys.meta_path) if not isinstance(finder, _Finder))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader, for this module
        return spec


def _register(registry: ModuleType) -> None:
    if hasattr(registry, "register_quantizer"):  # a transformers from before says that it does not know the method
        import birkhoff.pipeline.load.transformers_quantizer  # noqa: F401
