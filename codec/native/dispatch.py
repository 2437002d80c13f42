"""Choose a faster version of a function by the device of its tensors."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _of_first(*args: object, **_: object) -> torch.device:
    first = args[0]
    assert isinstance(first, Tensor)
    return first.device


class Dispatched(Generic[P, R]):
    """A function of tensors on one device. Where no version is registered for that, the reference runs.

    `torch.library.custom_op` does this too, but its first call imports torch's compiler: 900 modules, which take each
    worker one to two seconds.
    """

    def __init__(self, reference: Callable[P, R], device_of: Callable[P, torch.device] = _of_first) -> None:
        """Store the reference. `device_of` gives the device of its arguments. Default: that of the first, a tensor."""
        self._reference, self._device_of = reference, device_of
        self._versions: dict[str, Callable[P, R]] = {}

    def register(self, device_type: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Return a decorator that registers a version for a type of device, such as `cuda`."""

        def registered(version: Callable[P, R]) -> Callable[P, R]:
            self._versions[device_type] = version
            return version

        return registered

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the version for the device of the arguments."""
        device = self._device_of(*args, **kwargs)
        return self._versions.get(device.type, self._reference)(*args, **kwargs)
