import math

import numpy as np
import pytest
import torch
from torch import Tensor

from birkhoff.codec import container, lattice
from birkhoff.codec.errors import TargetError, TensorError
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output import allocation, feedback
from birkhoff.codec.output.encode import REFINEMENTS, encode, is_no_worse, stored_step
from birkhoff.codec.output.hessian import Hessian, normalised
from birkhoff.codec.tensor import decode_tensor, encoded_code, lattice_of
from tests.codec import page_reader


def layer(rows: int = 128, columns: int = 150, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian weights, and the Hessian of inputs that are correlated as those of real layers are: of 32 directions
    with falling energy, over a floor of 1 % of it."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, columns, generator=g) * torch.logspace(0, -1, 32)[:, None]
    x = torch.randn(4000, 32, generator=g) @ mix + 0.3 * torch.randn(4000, columns, generator=g)
    return torch.randn(rows, columns, generator=g) * 0.05, x.T @ x / len(x)


def output_db(weight: Tensor, hessian: Tensor, decoded: Tensor) -> float:
    error, ours = weight - decoded, weight
    loss, energy = float(((error @ hessian) * error).sum()), float(((ours @ hessian) * ours).sum())
    return 10 * math.log10(energy / loss)


def test_worked_example_of_the_module() -> None:
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    factor = feedback.factorise(hessian, damping=0.0)
    assert factor.order.tolist() == [1, 0]
    assert factor.partner.tolist() == [-1, 0]
    torch.testing.assert_close(factor.upper, torch.tensor([[2.2942, -2.0647], [0.0, 1.0]]), rtol=1e-3, atol=1e-4)
    weight = torch.tensor([[0.4, 0.4]])
    code = feedback.quantise(weight, 1.0, factor)
    assert code.decode().tolist() == [[1.0, 0.0]]
    assert Hessian(columns=hessian).error(weight, code) == pytest.approx(0.088, abs=1e-4)
    assert Hessian(columns=hessian).error(weight, lattice.quantise(weight, 1.0)) == pytest.approx(0.608, abs=1e-4)


def test_what_feedback_leaves_is_known_before_anything_is_rounded() -> None:
    assert feedback.left(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), damping=0.0) == pytest.approx(1.19 / 2, abs=1e-3)
    assert feedback.left(torch.eye(7)) == pytest.approx(1.0)
    weight, hessian = layer(256)
    hessian = normalised(hessian).float()
    rounded = Hessian(columns=hessian).error(weight, lattice.quantise(weight, 0.02))
    fed = Hessian(columns=hessian).error(weight, feedback.quantise(weight, 0.02, feedback.factorise(hessian)))
    assert fed / rounded == pytest.approx(feedback.left(hessian), rel=0.25)


def test_rounding_again_lowers_the_outputs_error_at_the_same_step() -> None:
    weight, hessian = layer(256)
    factor = feedback.factorise(hessian)
    codes = [feedback.quantise(weight, 0.04, factor)]
    for _ in range(2):
        codes.append(feedback.refine(weight, codes[-1], hessian, factor))
    losses = [Hessian(columns=hessian).error(weight, code) for code in codes]
    assert losses[1] < 0.96 * losses[0]
    assert losses[2] < losses[1]
    assert {code.step for code in codes} == {0.04}
    taken = lattice_of(encode("w", weight, 1.0, Hessian(columns=hessian)).tensor)
    plain = feedback.quantise(weight, taken.step, factor)
    assert Hessian(columns=hessian).error(weight, taken) < 0.96 * Hessian(columns=hessian).error(weight, plain)


@pytest.mark.parametrize("columns", [150, 64, 33, 2])
def test_every_order_is_of_all_columns_with_second_weights_first(columns: int) -> None:
    factor = feedback.factorise(torch.diag(torch.rand(columns) + 0.1))
    assert sorted(factor.order.tolist()) == list(range(columns))
    for place, partner in enumerate(factor.partner.tolist()):
        assert partner < place
    assert sum(p >= 0 for p in factor.partner.tolist()) == columns // 2


def test_feedback_lowers_the_output_error_by_more_than_3_db_at_any_step() -> None:
    weight, hessian = layer()
    factor = feedback.factorise(hessian)
    for step in (0.2, 0.05, 0.01):
        plain = output_db(weight, hessian, lattice.quantise(weight, step).decode())
        fed = output_db(weight, hessian, feedback.quantise(weight, step, factor).decode())
        assert fed - plain > 3.0


def test_without_correlation_feedback_is_plain_rounding_of_columns() -> None:
    weight, _ = layer(16, 70)
    code = feedback.quantise(weight, 0.02, feedback.factorise(torch.eye(70)))
    plain = lattice.quantise(weight, 0.02)
    # Plain nodes try both rows; those of one column at a time take the nearest row first.
    near = (code.decode() - weight).square().sum() / (plain.decode() - weight).square().sum()
    assert 1.0 <= float(near) < 1.02


def test_paths_down_columns_win_most_of_a_db_at_equal_symbols() -> None:
    weight, hessian = layer(256, 96, seed=3)
    factor = feedback.factorise(hessian)
    single = output_db(weight, hessian, feedback.quantise(weight, 0.04, factor).decode())
    path = output_db(weight, hessian, feedback.quantise(weight, 0.02, factor, path=True).decode())
    assert path - single > 0.7


@pytest.mark.parametrize(("rows", "columns"), [(100, 96), (65, 63), (37, 200), (1, 1024)])
def test_paths_go_down_columns_of_any_height(rows: int, columns: int) -> None:
    weight, hessian = layer(rows, columns, seed=4)
    code = feedback.quantise(weight, 0.01, feedback.factorise(hessian), path=True)
    encoded = encoded_code("w", weight, code, fidelity(weight, code.decode()), path=feedback.DOWN)
    (coded,) = container.parse(container.serialise([encoded.tensor]))
    back = lattice_of(coded)
    assert torch.equal(back.i, code.i)
    assert torch.equal(back.j, code.j)
    single = feedback.quantise(weight, 0.02, feedback.factorise(hessian))
    if rows >= 37:  # the first steps of a run are less free
        assert output_db(weight, hessian, code.decode()) > output_db(weight, hessian, single.decode()) + 0.4


def test_paths_are_taken_where_they_take_fewer_bits_for_the_same_error() -> None:
    kinds = {}
    for target_db in (1.0, 30.0):
        weight, hessian = layer(256, 128, seed=6)
        encoded = {
            path: encode("w", weight, target_db, Hessian(columns=hessian), path=path).tensor for path in (False, True)
        }
        params = encoded[True].params
        assert isinstance(params, container.LatticeParams)
        kinds[target_db] = params.path
        worth = {
            path: 8 * coded.nbytes - weight.numel() * output_db(weight, hessian, decode_tensor(coded)) / 6.0206
            for path, coded in encoded.items()
        }
        assert worth[True] <= worth[False]
    assert kinds == {1.0: 0, 30.0: feedback.DOWN}


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_unchanged_reader_decodes_the_quantisers_own_values(path: bool, dtype: torch.dtype) -> None:
    weight, hessian = layer(128, 150, seed=5)
    weight = weight.to(dtype)
    weight[3, 7] = 2.0  # an escape
    encoded = encode("w", weight, 36.0, Hessian(columns=hessian), path=path)
    (coded,) = container.parse(container.serialise([encoded.tensor]))
    assert coded.codec == "lattice"
    code = lattice_of(coded)
    factor = feedback.factorise(hessian)
    step = code.step
    assert isinstance(coded.params, container.LatticeParams)
    assert coded.params.path == (feedback.DOWN if path else 0)
    own = feedback.quantise(weight, step, factor, path=path)
    for _ in range(0 if path else REFINEMENTS):
        own = feedback.refine(weight, own, hessian, factor)
    assert len(own.escapes) > 0
    assert torch.equal(own.i, code.i)
    assert torch.equal(own.j, code.j)
    assert torch.equal(own.escapes.i, code.escapes.i)
    assert torch.equal(decode_tensor(coded), own.decode(dtype))
    again = encode("w", weight, 36.0, Hessian(columns=hessian), path=path)
    assert container.serialise([again.tensor]) == container.serialise([encoded.tensor])


def test_a_convolution_is_fed_back_along_the_columns_of_its_matrix() -> None:
    weight, hessian = layer(64, 72)
    encoded = encode("w", weight.reshape(64, 8, 3, 3), 20.0, Hessian(columns=hessian))
    decoded = decode_tensor(encoded.tensor)
    assert decoded.shape == (64, 8, 3, 3)
    plain = decode_tensor(encode("w", weight.reshape(64, 8, 3, 3), 20.0, None).tensor).reshape(64, 72)
    assert output_db(weight, hessian, decoded.reshape(64, 72)) > output_db(weight, hessian, plain) + 2


def test_where_feedback_does_not_lower_the_output_error_plain_nodes_are_kept() -> None:
    """With nothing to feed back, nearest nodes of pairs are better than those of single weights."""
    weight, _ = layer(63, 70)
    plain = encode("w", weight, 30.0, None, path=False)
    assert encode("w", weight, 30.0, Hessian(columns=torch.eye(70)), path=False).tensor == plain.tensor


def test_plain_tensors_come_near_their_nominal_target() -> None:
    weight, _ = layer(64, 128)
    for path in (False, True):
        error = encode("w", weight, 30.0, None, path=path).fidelity
        assert error is not None
        assert abs(error.sqnr_db - 30.0) < 0.25


def test_at_the_lowest_target_something_is_left() -> None:
    weight, hessian = layer(64, 128)
    for given in (Hessian(columns=hessian), None):
        assert bool(decode_tensor(encode("w", weight, 0.0, given, path=False).tensor).any())


def test_a_reader_written_from_the_page_alone_decodes_every_form() -> None:
    weight, hessian = layer(128, 70)
    forms = [
        encode("path", weight, 20.0, Hessian(columns=hessian)),
        encode("single", weight, 20.0, Hessian(columns=hessian), path=False),
        encode("fixed", weight[:, :9].reshape(128, 1, 3, 3), 60.0, None),
    ]
    tensors = [form.tensor for form in forms]
    read = page_reader.read(container.serialise(tensors))
    for tensor in tensors:
        np.testing.assert_array_equal(read[tensor.name], decode_tensor(tensor).numpy())


def test_beyond_the_lattices_range_convolutions_are_fixed_point() -> None:
    weight = torch.randn(160, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    encoded = encode("w", weight, 62.0, None)
    (coded,) = container.parse(container.serialise([encoded.tensor]))
    decoded = decode_tensor(coded)
    assert encoded.fidelity is not None
    assert abs(encoded.fidelity.sqnr_db - 62.0) < 0.3
    assert float((decoded - weight).abs().max()) <= lattice_of(coded).step / 512 * 1.001
    assert coded.nbytes * 8 < 12 * weight.numel()


@pytest.mark.parametrize("target_db", [44.0, 50.0])
@pytest.mark.parametrize("rows", [32, 512])
def test_fixed_point_takes_the_bits_of_its_step_and_feeds_errors_back(rows: int, target_db: float) -> None:
    """Small planes and large ones; as pairs they take 7.9 and more than 12 bits. Its two symbols are coded apart, which
    costs a quarter of a bit where weights are about as large as the lower one reaches."""
    weight, hessian = layer(rows, 150)
    fed, plain = (encode("w", weight, target_db, given).tensor for given in (Hessian(columns=hessian), None))
    assert (lattice_of(fed).columns, lattice_of(plain).columns) == (1, 1)
    spread = float(weight.square().mean().sqrt()) / (lattice_of(fed).step / 256)
    entropy = math.log2(spread * math.sqrt(2 * math.pi * math.e))  # of normal weights
    for coded in (fed, plain):
        assert 8 * coded.nbytes / weight.numel() < entropy + (0.1 if target_db < 48 else 0.3) + 2000 / weight.numel()
    db = [output_db(weight, hessian, decode_tensor(coded)) for coded in (fed, plain)]
    assert db[0] > db[1] + 2.5


def test_below_fixed_point_a_matrix_stays_pairs() -> None:
    weight, hessian = layer()
    assert lattice_of(encode("w", weight, 43.9, Hessian(columns=hessian)).tensor).columns == 150


def test_a_version_that_holds_finer_matrices_as_pairs_is_still_right() -> None:
    """As those of before do up to 48 dB and beyond: what is stored says which form it has."""
    weight, hessian = layer(128, 72)
    single = allocation.step(allocation.root_mean_square(weight), 50.0)
    code = lattice.quantise(weight, single)
    assert stored_step(weight, 50.0, path=0, columns=72) == pytest.approx(single)
    assert stored_step(weight, 50.0, path=0, columns=1) == pytest.approx(256 * single)
    assert is_no_worse(weight, code, 50.0, None, path=False)
    assert is_no_worse(
        weight,
        feedback.quantise(weight, single, feedback.factorise(hessian)),
        50.0,
        Hessian(columns=hessian),
        path=False,
    )


def test_what_cannot_be_coded_is_kept_with_its_reason() -> None:
    encoded = encode("w", torch.ones(40, 40), 30.0, torch.eye(40))
    assert encoded.tensor.lossless
    assert encoded.tensor.claims.reason == "constant"
    near = torch.full((8, 64), 65504.0, dtype=torch.float16)
    near[::2] = -65400.0
    assert encode("w", near, 6.0, None).tensor.lossless


def test_hessians_that_are_none_are_refused() -> None:
    for wrong in (torch.full((4, 4), torch.nan), torch.zeros(4, 4), torch.ones(4, 3), -torch.eye(4) + 1e-3):
        with pytest.raises(TensorError, match="Hessian"):
            feedback.factorise(wrong)
    with pytest.raises(TensorError, match="not positive"):
        feedback.factorise(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(TargetError):
        encode("w", torch.randn(8, 8), -1.0, None)
    with pytest.raises(TargetError, match=r"outside 0\.\.72 dB"):
        encode("w", torch.randn(8, 8), 80.0, None)


@pytest.mark.parametrize("target_db", [20.0, 60.0])
@pytest.mark.parametrize("path", [False, True])
def test_what_is_stored_has_the_expected_step_and_is_no_worse_than_plain_nodes(path: bool, target_db: float) -> None:
    weight, hessian = layer(128, 72)
    tensor = weight.reshape(128, 8, 3, 3)
    for given in (Hessian(columns=hessian), None):
        (coded,) = container.parse(container.serialise([encode("w", tensor, target_db, given, path=path).tensor]))
        assert isinstance(coded.params, container.LatticeParams)
        assert coded.params.step == stored_step(tensor, target_db, path=coded.params.path, columns=coded.params.columns)
        assert is_no_worse(tensor, lattice_of(coded), target_db, given, path=path)


def test_a_code_that_the_output_feels_more_is_told() -> None:
    weight, hessian = layer(128, 150)
    coarse = encode("w", weight, 14.0, Hessian(columns=hessian), path=False).tensor
    assert not is_no_worse(weight, lattice_of(coarse), 26.0, Hessian(columns=hessian), path=False)
    assert not is_no_worse(weight, lattice_of(coarse), 26.0, None, path=False)
    # What pays for the output costs the weights: held against weights alone, feedback looks worse.
    fed = lattice_of(encode("w", weight, 26.0, Hessian(columns=hessian), path=False).tensor)
    assert is_no_worse(weight, fed, 26.0, Hessian(columns=hessian), path=False)
    assert not is_no_worse(weight, fed, 26.0, None, path=False)


def test_a_tensor_that_would_lose_every_weight_is_kept_whole() -> None:
    weight = torch.where(torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.5, -0.1, 0.1)
    encoded = encode("w", weight, 0.0, None, path=False)
    assert (encoded.tensor.lossless, encoded.tensor.claims.reason) == (True, "target")
