"""Birkhoff: compress fleets of vision models, prove every layer, publish, pull and run them.

import birkhoff
tensors = birkhoff.load_state_dict("pulled/demo-sam")     # dense
birkhoff.load_into(model, "demo-sam@stable")              # linear layers compute on the compressed weights
"""

from typing import TYPE_CHECKING, Any

from birkhoff.pipeline import transformers_hook

__version__ = "0.1.0"
__all__ = ["__version__", "load_into", "load_state_dict"]

if TYPE_CHECKING:
    from birkhoff.pipeline.load import load_into, load_state_dict

transformers_hook.install()


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line and Ray's workers start without what they do not use.
    if name in ("load_into", "load_state_dict"):
        from birkhoff.pipeline import load

        return getattr(load, name)
    raise AttributeError(f"module 'birkhoff' has no attribute {name!r}")
