import pytest
import torch

from birkhoff.codec.errors import FormatError, TensorError
from birkhoff.codec.output.feedback import factorise
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.packing import pack, packed_bytes, unpack


def test_worked_example_of_the_module() -> None:
    data = pack(Hessian(columns=torch.tensor([[4.0, 2.0], [2.0, 4.0]])))
    assert len(data) == packed_bytes(2, 0) == 6
    torch.testing.assert_close(unpack(data, 2, 0).columns, torch.tensor([[1.0, 0.5], [0.5, 1.0]]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 7, 96])
def test_comes_back_to_three_digits_up_to_its_scale(columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(400, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    hessian = x.T @ x
    back = unpack(pack(Hessian(columns=hessian)), columns, 0).columns
    wanted = hessian / hessian.diagonal().mean()
    assert float((back - wanted).norm() / wanted.norm()) < 1e-3
    assert pack(Hessian(columns=hessian)) == pack(Hessian(columns=hessian * 4))


def test_what_comes_back_is_positive_although_few_columns_carry_nearly_all() -> None:
    """Ten of 600 columns, all along one direction: in float16 the triangle of H itself is no Hessian any more."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 600, generator=g) * 1e-3
    x[:, :10] += torch.randn(2000, 1, generator=g) * (10 + torch.rand(10, generator=g))
    hessian = x.T @ x
    scaled = hessian / hessian.diagonal().mean()
    with pytest.raises(TensorError, match="not positive"):
        factorise(scaled.half().float(), damping=1e-3)
    factor = factorise(unpack(pack(Hessian(columns=hessian)), 600, 0).columns, damping=1e-3)
    assert bool(torch.isfinite(factor.upper).all())


def test_rank_that_is_short_is_damped_and_no_hessian_is_refused() -> None:
    vector = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    assert float(unpack(pack(Hessian(columns=vector @ vector.T)), 64, 0).columns.diagonal().mean()) == pytest.approx(
        1, rel=1e-2
    )
    for wrong in (torch.full((4, 4), torch.nan), torch.zeros(4, 4), torch.ones(4, 3), -torch.eye(4)):
        with pytest.raises(TensorError, match="Hessian"):
            pack(Hessian(columns=wrong))
    with pytest.raises(TensorError, match="not positive"):
        pack(Hessian(columns=torch.tensor([[1.0, 5.0], [5.0, 1.0]])))


def test_a_solver_that_reports_success_and_returns_nan_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    solve, calls = torch.linalg.cholesky_ex, []

    def mistaken(matrix: torch.Tensor, *, upper: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        factor, wrong = solve(matrix, upper=upper)
        calls.append(matrix)
        return (factor * torch.nan, wrong) if len(calls) == 1 else (factor, wrong)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", mistaken)
    assert bool(torch.isfinite(unpack(pack(Hessian(columns=torch.eye(4))), 4, 0).columns).all())
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(TensorError, match="not positive"):
        factorise(torch.eye(4))


def test_bytes_that_are_none_are_refused() -> None:
    data = pack(Hessian(columns=torch.eye(5)))
    for wrong, columns in ((data[:-2], 5), (data, 4), (data + b"\0\0", 5), (b"\xff\x7f" * 15, 5)):
        with pytest.raises(FormatError, match="Hessian"):
            unpack(wrong, columns, 0)


def test_both_factors_come_back_and_the_rows_can_be_missing() -> None:
    hessian = Hessian(columns=torch.eye(3), rows=torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    data = pack(hessian)
    assert len(data) == packed_bytes(3, 2) == 12 + 6
    back = unpack(data, 3, 2)
    torch.testing.assert_close(back.columns, torch.eye(3), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(back.rows, torch.tensor([[1.0, 0.5], [0.5, 1.0]]), rtol=1e-3, atol=1e-5)
    assert unpack(data[:12], 3, 0).rows is None
    for columns, rows in ((3, 0), (4, 2), (3, 3)):
        with pytest.raises(FormatError, match=f"for {columns} columns and {rows} rows"):
            unpack(data, columns, rows)
