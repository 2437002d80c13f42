"""Register the quantization method `birkhoff` with transformers: `birkhoff.transformers.register()`.

`import birkhoff` does this when transformers is imported. With `BIRKHOFF_TRANSFORMERS=explicit` it leaves Python's
import system alone, and this call is needed.
"""

from birkhoff.pipeline.load import transformers_hook

__all__ = ["register"]


def register() -> None:
    """Make `from_pretrained` load folders of `birkhoff pull --format transformers`. Imports transformers' quantizers.

    Raises:
        ImportError: transformers is not installed, or too old for quantization methods of other packages.
    """
    transformers_hook.register()
