"""A prepared launch hands Triton's launcher what a full launch would, and takes the full way where it must."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from birkhoff.kernels.runtime import carveout  # noqa: E402
from birkhoff.kernels.runtime.prepared import Prepared  # noqa: E402


class Kernel:
    """A compiled kernel's face: counts full launches and records short ones."""

    arg_names = ("x_ptr", "y_ptr", "N", "SIZE", "FLAG")

    def __init__(self) -> None:
        self.full: list[tuple[Any, ...]] = []
        self.short: list[tuple[Any, ...]] = []
        self.function: Any = "function"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.full.append((grid, arguments, constants))
            return SimpleNamespace(
                run=lambda *a: self.short.append(a), function=self.function, packed_metadata="packed"
            )

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


class Launcher:
    """As much of Triton's launcher of a kernel with one descriptor as matters: a wrapper around the one proper."""

    def __init__(self, got: list[tuple[Any, ...]]) -> None:
        def launcher(*arguments: Any) -> None:
            got.append(arguments)

        def wrapper(*arguments: Any) -> None:
            launcher("wrapped", *arguments)

        self.launch = wrapper

    def __call__(self, *arguments: Any) -> None:
        self.launch(*arguments[9:])


def test_descriptors_are_encoded_once_for_each_address(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver
    from triton.experimental.gluon import language as gl

    encoded: list[int] = []

    def encode(descriptor: Any, metadata: str) -> list[Any]:
        encoded.append(descriptor.base.data_ptr())
        return [f"{metadata} at {descriptor.base.data_ptr()}", *descriptor.shape]

    got: list[tuple[Any, ...]] = []
    compiled = SimpleNamespace(
        run=Launcher(got), function=0, packed_metadata=0, metadata=SimpleNamespace(tensordesc_meta=["map"])
    )
    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, **k: self.full.append(a) or compiled)
    tile = [64, 64], gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    constants = {"FLAG": True, "SIZE": 64}
    launch = Prepared(kernel, (3,), (70,), constants, {}, device=torch.device("cpu"), tiles=(tile,))
    x, other, y = (torch.zeros(2, 64, 64, dtype=torch.bfloat16) for _ in range(3))
    launch(x, y)
    assert list(kernel.full[0][0].shape) == [128, 64]
    for tensor in (x, x, other, x):
        launch(tensor, y)
    assert len(kernel.full) == 1
    assert encoded == [x.data_ptr(), other.data_ptr()]
    assert got == [(f"map at {t.data_ptr()}", 128, 64, y.data_ptr(), 70, 64, True) for t in (x, x, other, x)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_kernel_that_wants_shared_memory_asks_for_it_once_it_is_compiled(
    kernel: Kernel, shared: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[Any, ...]] = []

    def set_attribute(function: Any, *rest: int) -> int:
        asked.append((function.value, *rest))
        return 801  # CUDA_ERROR_NOT_SUPPORTED

    monkeypatch.setattr(carveout, "_driver", lambda: SimpleNamespace(cuFuncSetAttribute=set_attribute))
    monkeypatch.setattr(kernel, "function", 12345)
    constants = {"FLAG": True, "SIZE": 64}
    launch = Prepared(kernel, (3,), (70,), constants, {}, device=torch.device("cpu"), shared=shared)
    x = torch.zeros(64)
    for _ in range(3):
        launch(x, x)
    assert asked == ([(12345, 9, 100)] if shared else [])
    assert ("rejected the preference for shared memory (CUresult 801)" in caplog.text) == shared
    monkeypatch.setattr(carveout, "_driver", lambda: None)
    Prepared(kernel, (3,), (70,), constants, {}, device=torch.device("cpu"), shared=shared)(x, x)
