"""Choose a faster version of a function by the device of its tensors."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Dispatched(Generic[P, R]):
    """A function whose first argument is a tensor. Where no version is registered for its device, the reference runs.

    `torch.library.custom_op` does this too, but its first call imports torch's compiler: 900 modules, which take each
    worker one to two seconds.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self._reference = reference
        self._versions: dict[str, Callable[P, R]] = {}

    def register(self, device_type: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Return a decorator that registers a version for a type of device, such as `cuda`."""

        def registered(version: Callable[P, R]) -> Callable[P, R]:
            self._versions[device_type] = version
            return version

        return registered

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the version for the device of the first argument."""
        first = args[0]
        assert isinstance(first, Tensor)
        return self._versions.get(first.device.type, self._reference)(*args, **kwargs)
