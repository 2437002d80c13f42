"""Make transformers know the quantization method `birkhoff`, by name: `birkhoff.transformers.register()`.

`import birkhoff` sees to it by itself, once transformers is imported. With `BIRKHOFF_TRANSFORMERS=explicit` in the
environment it leaves Python's import system alone, and this call is what there is.
"""

from birkhoff.pipeline.load import transformers_hook

__all__ = ["register"]


def register() -> None:
    """Let `from_pretrained` load folders of `birkhoff pull --format transformers`; imports transformers' quantizers.

    Raises:
        ImportError: transformers is not installed, or is too old to take quantization methods from others.
    """
    transformers_hook.register()
