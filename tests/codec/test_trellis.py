import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import trellis
from birkhoff.codec.native.library import native


def uniform(count: int, seed: int = 0, width: float = 100.0) -> torch.Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 0.5) * width


def test_worked_example_of_the_module() -> None:
    # A run of its own for every symbol but the first four: the example is the head of lane 0.
    lanes = 1
    k = torch.zeros(trellis.MIN_STEPS * lanes, dtype=torch.int8)
    k[:4] = torch.tensor([1, 1, -1, 2])
    assert trellis.numbers(k)[:4].tolist() == [2, 3, -1, 4]


@given(st.integers(1, 3000), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_symbols_give_the_path_back(count: int, seed: int) -> None:
    u = uniform(count, seed)
    n = trellis.search(u)
    assert torch.equal(trellis.numbers(trellis.symbols(n).to(torch.int8)).float(), n)
    assert (u - n).abs().max() <= 4


def parities(bits: torch.Tensor) -> torch.Tensor:
    """The rule of the docstring, step by step."""
    o = bits.clone()
    for t in range(2, len(o)):
        o[t] ^= o[t - 2]
        if t > 2:
            o[t] ^= o[t - 3]
    return o


@pytest.mark.parametrize("doublings", [0, 1, 2, trellis.MAX_STEPS])
def test_parities_by_doubling_and_by_blocks_are_those_step_by_step(doublings: int) -> None:
    for run in (*range(1, 40), 64, 100, 255, trellis.MAX_STEPS):
        bits = torch.randint(0, 2, (run, 7), dtype=torch.uint8)
        assert torch.equal(trellis._parities(bits.clone(), doublings), parities(bits))


def test_the_search_finds_the_best_of_all_paths() -> None:
    run = 5
    for seed in range(20):
        u = uniform(run, seed, width=8)
        found = trellis.viterbi(u[:, None])[:, 0]
        paths = []
        for k in itertools.product(range(-4, 4), repeat=run):
            o = [0, 0, 0]
            n = []
            for value in k:
                n.append(2 * value + o[-1])
                o.append((value & 1) ^ o[-2] ^ o[-3])
            paths.append(n)
        best = (torch.tensor(paths, dtype=torch.float32) - u).square().sum(1).min()
        assert float((u - found).square().sum()) == pytest.approx(float(best), abs=1e-5)


def test_gain_over_single_nodes_is_a_decibel() -> None:
    u = uniform(1 << 19)
    error = float((u - trellis.search(u)).square().mean())
    assert 10 * math.log10(4 / 12 / error) > 1.04


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_takes_the_same_path() -> None:
    u = uniform(100_000)
    n = trellis.search(u)
    assert torch.equal(trellis.search(u.cuda()).cpu(), n)
    k = trellis.symbols(n).to(torch.int8)
    assert torch.equal(trellis.numbers(k.cuda()).cpu(), trellis.numbers(k))


@pytest.mark.parametrize(("rows", "pairs"), [(1, 5), (63, 4), (64, 3), (65, 7), (300, 33), (700, 40)])
def test_paths_down_the_columns_are_each_columns_own(rows: int, pairs: int) -> None:
    """So that a column can be searched before those behind it are known."""
    u = torch.randn(rows, pairs, generator=torch.Generator().manual_seed(rows)) * 4
    lanes = trellis.lanes_of(rows, pairs, 2)
    assert lanes % pairs == 0
    n = trellis.search(u.view(-1), lanes).view(rows, pairs)
    one_by_one = [trellis.search(u[:, p].contiguous(), lanes // pairs) for p in range(pairs)]
    assert torch.equal(n, torch.stack(one_by_one, dim=1))
    k = trellis.symbols(n).to(torch.int8)
    assert torch.equal(trellis.numbers(k.view(-1), lanes).view(rows, pairs).float(), n)


def test_both_kinds_of_paths_are_one_where_runs_fill_the_columns() -> None:
    assert trellis.lanes_of(640, 320, 1) != trellis.lanes_of(640, 320, 2)
    assert trellis.lanes_of(768, 1024, 1) == trellis.lanes_of(768, 1024, 2) == 3 * 1024


@given(
    st.integers(1, 5000), st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([0.3, 4.0, 3000.0]), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_the_native_search_takes_the_references_paths(
    count: int, lanes: int, seed: int, width: float, tied: bool
) -> None:
    library = native()
    if library is None:
        pytest.skip("the native library is not built here")
    u = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * width
    u = (u * 2).round() / 2 if tied else u
    wanted = trellis.reference_search_(u.clone(), lanes)
    for vectors in (1, 0):
        library.birkhoff_native_vectors(vectors)
        assert torch.equal(trellis.search(u, lanes), wanted)
    library.birkhoff_native_vectors(1)
