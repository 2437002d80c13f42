"""The benchmark of masks: its own quantiser, and how rows are read against each other."""

from collections import defaultdict

import torch

from birkhoff.codec.output.hessian import Hessian
from tests.harness.benchmarks import bench_masks


def test_gptq_lowers_the_output_error_at_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    x = torch.randn(2000, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(256)

    def output_error(decoded: torch.Tensor) -> float:
        error = weight - decoded
        return float(((error @ hessian) * error).sum())

    plain, plain_bytes = bench_masks.gptq({}, 4)("w", weight)
    fed, fed_bytes = bench_masks.gptq({"w": Hessian(columns=hessian)}, 4)("w", weight)
    assert output_error(fed) < 0.5 * output_error(plain)
    assert fed_bytes == plain_bytes == 64 * 256 // 2 + 64 * 2 * 3


def test_rows_are_held_against_output_between_its_own_and_nowhere_else() -> None:
    on: dict[str, dict[str, str]] = defaultdict(lambda: {"commit": "c"}, far={"commit": "d"})

    def row(name: str, size: int, agreement: float) -> dict[str, object]:
        return {
            "name": name,
            "bytes": size,
            "agreement": agreement,
            "fifth": 0.5,
            "embedding_db": 9.0,
            "made_on": on[name],
        }

    rows = [row("output, 4", 250, 0.9), row("output, 10", 100, 0.7), row("x", 125, 0.6), row("far", 500, 0.99)]
    record = {"rows": rows, "source_bytes": 1000, "boxes": 8, "pictures": 24}
    lines = {line.split(" | ")[0]: line for line in bench_masks.markdown(record).splitlines()}
    assert lines["| x"].endswith("| 8.00 | 0.600 | 0.500 | 9.0 | 0.767 | +0.167 |")
    assert lines["| far"].endswith("| 2.00 | 0.990 | 0.500 | 9.0 |  |  |")
    assert "`output, 4`, `output, 10`, `x`: commit c" in lines
    assert "`far`: commit d" in lines
