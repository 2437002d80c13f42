"""A prepared launch hands Triton's launcher what a full launch would, and takes the full way where it must."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from birkhoff.kernels.prepared import Prepared  # noqa: E402


class Kernel:
    """A compiled kernel's face: counts full launches and records short ones."""

    arg_names = ("x_ptr", "y_ptr", "N", "SIZE", "FLAG")

    def __init__(self) -> None:
        self.full: list[tuple[Any, ...]] = []
        self.short: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.full.append((grid, arguments, constants))
            return SimpleNamespace(run=lambda *a: self.short.append(a), function="function", packed_metadata="packed")

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    driver = SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return Kernel()


def prepared(kernel: Kernel) -> Prepared:
    constants = {"FLAG": True, "SIZE": 64}  # in another order than the kernel's
    return Prepared(kernel, (3,), (70,), constants, {"num_warps": 4}, device=torch.device("cpu"))


def test_the_second_launch_is_short_and_the_same(kernel: Kernel) -> None:
    launch, x, y = prepared(kernel), torch.zeros(64), torch.zeros(64)
    launch(x, y)
    assert kernel.full == [((3,), (x, y, 70), {"FLAG": True, "SIZE": 64, "num_warps": 4})]
    launch(y, x)
    assert len(kernel.full) == 1
    (short,) = kernel.short
    pointers = y.data_ptr(), x.data_ptr()
    assert short == (3, 1, 1, "stream of None", "function", "packed", None, None, None, *pointers, 70, 64, True)


def test_unaligned_tensors_are_launched_in_full(kernel: Kernel) -> None:
    launch, x = prepared(kernel), torch.zeros(64)
    launch(x[1:], x)
    launch(x, x)  # the first did not count
    launch(x[1:], x)
    assert (len(kernel.full), len(kernel.short)) == (3, 0)
    launch(x, x)
    assert len(kernel.short) + len(kernel.full) == 4


def test_profilers_hooks_are_called(kernel: Kernel) -> None:
    launch, x = prepared(kernel), torch.zeros(64)
    launch(x, x)
    hook = lambda metadata: None  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch(x, x)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(kernel.full) == 2
    launch(x, x)
    assert len(kernel.short) == 1
