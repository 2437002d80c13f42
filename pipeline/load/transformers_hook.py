"""Register the quantization method `birkhoff` with transformers, whichever package is imported first.

transformers has no entry point for quantizers: they register in a module that it imports together with its models. If
that module is already imported, ours registers at once, else right after it. We import nothing that the user does not
import. For that, a finder waits in `sys.meta_path` until transformers is imported; `register` works without it.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


EXPLICIT = "BIRKHOFF_TRANSFORMERS"
"""If this environment variable is `explicit`, `install` does nothing; call `register` instead."""


def install() -> None:
    """Register now, or once transformers is imported. Repeated calls have no effect."""
    if os.environ.get(EXPLICIT) == "explicit":
        return
    if (registry := sys.modules.get(_REGISTRY)) is not None:
        _register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Register now, with all imports that this needs, and leave no finder behind.

    Raises:
        ImportError: transformers is not installed, or does not accept quantization methods of other packages.
    """
    registry = importlib.import_module(_REGISTRY)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    if not hasattr(registry, "register_quantizer"):
        raise ImportError(
            "this transformers accepts no quantization methods of other packages: pip install 'transformers>=5,<6'"
        )
    _register(registry)


class _Finder:
    """Finds the registry as the finders after it do, and makes its loader register ours at the end. Then it leaves."""

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
    if hasattr(registry, "register_quantizer"):  # older ones report that they do not know the method
        import birkhoff.pipeline.load.transformers_quantizer  # noqa: F401
