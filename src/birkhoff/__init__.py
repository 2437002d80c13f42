"""Birkhoff: compress fleets of vision models, prove every tensor, publish, pull and run them.

import birkhoff
version = birkhoff.compress(model, "demo-sam")             # a module or a state dict, published to a store
birkhoff.load_into(model, version.reference)              # linear layers compute on the compressed weights
tensors = birkhoff.load_state_dict("demo-sam@stable")     # dense
birkhoff.pull("demo-sam", "pulled/demo-sam")              # into a folder
birkhoff.push("demo-sam", "s3://BUCKET/PREFIX")           # into another store
with birkhoff.open_store("s3://BUCKET/PREFIX") as store:  # for several of these calls, `store=store`
    birkhoff.list(store=store)

The import adds a finder to `sys.meta_path`, which registers the quantization method `birkhoff` when transformers is
imported, and then removes itself. With `BIRKHOFF_TRANSFORMERS=explicit`, `birkhoff.transformers.register()` does that.
"""

from typing import TYPE_CHECKING, Any

from birkhoff.pipeline.load import transformers_hook

__version__ = "0.2.0"
__all__ = ["__version__", "compress", "list", "load_into", "load_state_dict", "open_store", "pull", "push"]

if TYPE_CHECKING:
    from birkhoff.pipeline.api.compress import compress
    from birkhoff.pipeline.api.pull import pull
    from birkhoff.pipeline.api.push import push
    from birkhoff.pipeline.api.versions import list_versions as list
    from birkhoff.pipeline.load.load import load_into, load_state_dict
    from birkhoff.pipeline.store.default import open_default_store as open_store

_PLACES = {
    "compress": ("birkhoff.pipeline.api.compress", "compress"),
    "list": ("birkhoff.pipeline.api.versions", "list_versions"),
    "load_into": ("birkhoff.pipeline.load.load", "load_into"),
    "load_state_dict": ("birkhoff.pipeline.load.load", "load_state_dict"),
    "open_store": ("birkhoff.pipeline.store.default", "open_default_store"),
    "pull": ("birkhoff.pipeline.api.pull", "pull"),
    "push": ("birkhoff.pipeline.api.push", "push"),
}
"""Module and name of each function. They load on first use, so that commands and Ray workers start without them."""

transformers_hook.install()


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        import importlib

        module, function = _PLACES[name]
        return getattr(importlib.import_module(module), function)
    raise AttributeError(f"module 'birkhoff' has no attribute {name!r}")
