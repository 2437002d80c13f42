"""After a load, compute again what modules derive from their parameters.

torch gives two occasions: a module's `train(mode)`, in which TinyViT's attention caches its biases for evaluation, and
the hooks that `load_state_dict` calls at its end.
"""

from graphlib import TopologicalSorter

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys


def refresh(model: nn.Module) -> None:
    """Tell every module of a model that its parameters changed. Each keeps its own mode."""
    if not any(module._load_state_dict_post_hooks or _listens(module) for module in model.modules()):
        return  # as most do; sorting them takes milliseconds
    modules = _parents_first(model)
    for module in reversed(modules):
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys([], []))
    _reapply_modes(modules)


def _reapply_modes(modules: list[nn.Module]) -> None:
    """Put every module that does something in `train` or `eval` into its own mode again.

    A module's `train` also sets the mode of its children, so these come after it.
    """
    modes = {module: module.training for module in modules}
    for module in modules:
        if not _listens(module):
            continue
        if modes[module]:
            module.train()
        else:
            module.eval()
    for module, mode in modes.items():
        module.training = mode


def _listens(module: nn.Module) -> bool:
    """Return whether the module has its own `train` or `eval`."""
    kind = type(module)
    return (
        kind.train is not nn.Module.train
        or kind.eval is not nn.Module.eval
        or not {"train", "eval"}.isdisjoint(vars(module))
    )


def _parents_first(model: nn.Module) -> list[nn.Module]:
    """Return every module once, after all modules that hold it."""
    order = TopologicalSorter[nn.Module]({model: ()})
    for module in model.modules():
        for child in module.children():
            order.add(child, module)
    return list(order.static_order())
