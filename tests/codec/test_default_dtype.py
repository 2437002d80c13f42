"""A program that uses the library may have set torch's default dtype: nothing here may depend on it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from birkhoff.codec import lattice, trellis
from birkhoff.codec.container import parse, serialise
from birkhoff.codec.difference.encode import Base
from birkhoff.codec.difference.encode import encode as by_difference
from birkhoff.codec.output import rows
from birkhoff.codec.output.encode import encode as by_output
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.pictures import synthetic_boxes, synthetic_pictures
from birkhoff.codec.output.shapes import drawn_shapes
from birkhoff.codec.output.statistics import gather
from birkhoff.codec.profiles import PROFILES, Decision
from birkhoff.codec.tensor import decode_tensor
from birkhoff.kernels.hyperlinear import HyperLinear
from tests.codec.by_profile import encode_tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


WEIGHT = drawn(96, 70)
NEAR = WEIGHT + 0.01 * drawn(96, 70, seed=1)
SPREAD = drawn(96, 200, seed=2) * torch.linspace(0.2, 2.0, 200, dtype=torch.float32)
HESSIAN = Hessian(columns=SPREAD[:70] @ SPREAD[:70].T, rows=SPREAD @ SPREAD.T)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sets the default dtype when called."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def by_profile(name: str) -> bytes:
    return serialise([encode_tensor("w", WEIGHT, PROFILES[name]).tensor])


def of_outputs(target_db: float) -> bytes:
    return serialise([by_output("w", WEIGHT, target_db, HESSIAN).tensor])


def difference() -> bytes:
    held = encode_tensor("w", WEIGHT, PROFILES["balanced"]).tensor
    decision = Decision(codec="lattice", target_db=30.0, nominal=True)
    return serialise([by_difference("w", NEAR, decision, Base(container="ab" * 32, tensor=held), HESSIAN).tensor])


def in_torch(path: bool) -> list[float]:
    """What the native library does, in torch."""
    factor = rows.factorise(SPREAD @ SPREAD.T, lanes=2 if path else 0)
    u = 3 * WEIGHT[:, 0].contiguous()
    out = torch.empty_like(u)
    rows.reference_round_rows_(u.clone(), out, factor)
    return [*out.tolist(), *trellis.reference_search_(u.clone(), 3).tolist()]


def decoded(name: str) -> tuple[object, object]:
    (coded,) = parse(by_profile(name))
    found = decode_tensor(coded)
    return found.dtype, found.float().tolist()


def computed() -> list[list[float]]:
    layer = HyperLinear.from_lattice(lattice.quantise(WEIGHT, 0.05))
    with torch.inference_mode():
        found: list[list[float]] = layer(drawn(3, 70)).tolist()
    return found


def linear() -> nn.Linear:
    layer = nn.Linear(70, 96, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(WEIGHT)
        layer.bias.zero_()  # type: ignore[union-attr]
    return layer


def taken() -> list[object]:
    layer, found = linear(), list[object]()
    x = drawn(50, 70, seed=3)
    sensitivity = gather(
        layer,
        lambda _: {"out": (1.0, layer(x))},
        batches=2,
        probes=1,
        seed=0,
        keep=lambda name, hessian: found.append((name, hessian.columns.sum().item())),
    )
    return [sensitivity, *found]


def pictures() -> list[float]:
    drawn = synthetic_pictures(4, 64, 0), synthetic_boxes(2, 3, 64, 0), *drawn_shapes(2, (64, 48), 0)
    return [one.double().sum().item() for one in drawn]


@pytest.mark.parametrize(
    "work",
    [
        *(lambda name=name: by_profile(name) for name in ("balanced", "small", "paper")),
        *(lambda name=name: decoded(name) for name in ("balanced", "paper")),
        *(lambda target=target: of_outputs(target) for target in (8.0, 20.0, 50.0)),
        *(lambda path=path: in_torch(path) for path in (False, True)),
        difference,
        computed,
        taken,
        pictures,
    ],
)
def test_another_default_changes_nothing(work: Callable[[], object], default: Callable[[], None]) -> None:
    expected = work()
    default()
    assert work() == expected
