"""Register the quantization method `birkhoff` with transformers: `birkhoff.transformers.register()`.

`import birkhoff` does so by itself as soon as transformers is imported. With `BIRKHOFF_TRANSFORMERS=explicit` it does
not touch Python's import system, and this call is needed.
"""

from birkhoff.pipeline.load import transformers_hook

__all__ = ["register"]


def register() -> None:
    """Let `from_pretrained` load folders of `birkhoff pull --format transformers`. Imports transformers' quantizers.

    Raises:
        ImportError: transformers is not installed, or too old for quantization methods of other packages.
    """
    transformers_hook.register()
