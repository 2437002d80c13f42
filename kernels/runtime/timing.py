"""Comparable GPU times: CUDA graphs, weights outside the cache, alternating candidates."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Microseconds per call: median, 20th and 80th percentile over replays of a graph of calls."""

    median: float
    low: float
    high: float


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Return one graph of all calls in sequence. Each runs once before (compilation, library handles)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        for call in calls:
            call()
    return graph


def compare(candidates: Mapping[Name, Sequence[Call]], rounds: int) -> dict[Name, Times]:
    """Time each candidate's calls as one graph. The candidates alternate for `rounds`, after one round of warm-up."""
    graphs = {name: capture(calls) for name, calls in candidates.items()}
    events: dict[Name, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: _percentiles([1e3 * begin.elapsed_time(end) / len(candidates[name]) for begin, end in pairs[1:]])
        for name, pairs in events.items()
    }


def copies(tensor: Tensor, *, most: int, cache_bytes: int = 128 << 20) -> list[Tensor]:
    """Return the tensor and clones of it, together larger than twice an H200's cache if `most` allows it."""
    count = min(most, -(-cache_bytes // max(1, tensor.nbytes)))
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def _percentiles(values: list[float]) -> Times:
    ordered = sorted(values)
    low, median, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8))
    return Times(median=median, low=low, high=high)
