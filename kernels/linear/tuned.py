"""Choose a plan: the user's own measurements (see `tune`) first, then shipped ones for known GPUs, then rules.

A plan follows from shapes alone, so it costs a look-up per call and is the same in every graph.
"""

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from birkhoff.kernels.linear.plan import Plan, Problem, by_rule
from birkhoff.kernels.linear.tuned_h200 import PLANS as H200

_log = logging.getLogger("birkhoff.kernels")

Table = dict[tuple[int, int], dict[int, Plan]]
"""By (rows, columns), then by tokens (a power of two): the plan for 16-bit floats."""

SHIPPED: dict[str, Table] = {"NVIDIA H200": H200}
"""By the name of the GPU."""


_EVERYWHERE = ("decode", "tiles", "int8_fused", "int8_tiles")
"""Paths that every GPU supports."""


@cache
def choose(problem: Problem, gpu: str, kernels: frozenset[str]) -> Plan:
    """Return the plan for a problem on the GPU named `gpu`, where the Gluon `kernels` ("small_m", "hopper") run."""
    return measured(problem, gpu, kernels, SHIPPED.get(gpu, {})) or by_rule(problem, kernels)


def measured(problem: Problem, gpu: str, kernels: frozenset[str], shipped: Table) -> Plan | None:
    """Return the measured plan of a problem, the user's or a shipped one, if it runs here."""
    if not (problem.half and problem.aligned):
        return None
    plan = user_table().get(key(gpu, problem)) or _shipped(shipped, problem)
    return plan if plan is not None and (plan.path in _EVERYWHERE or plan.path in kernels) else None


def _shipped(table: Table, problem: Problem) -> Plan | None:
    """Return the plan for the next larger measured number of tokens."""
    plans = table.get((problem.rows, problem.columns), {})
    tokens = min((measured for measured in plans if measured >= problem.bucket), default=0)
    return plans.get(tokens)


def key(gpu: str, problem: Problem) -> str:
    """Return the key in the user's table: everything that can change which plan is best."""
    versions = f"torch {torch.__version__}|{_triton_version()}"
    compute = "|int8" if problem.int8 else ""
    return f"{gpu}|{versions}|{problem.rows}x{problem.columns}|{problem.bucket}{compute}"


@cache
def user_table() -> dict[str, Plan]:
    """Return the plans of `plans.json`; empty if the file is missing or cannot be read."""
    try:
        stored: dict[str, dict[str, Any]] = json.loads(_path().read_text())
        return {name: Plan(**fields) for name, fields in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("cannot read %s (%s): tuned plans are not used", _path(), error)
        return {}


def save(plans: dict[str, Plan]) -> None:
    """Add plans to the user's table. The file is replaced atomically."""
    table = {**user_table(), **plans}
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({name: fields(plan) for name, plan in table.items()}, indent=1, sort_keys=True))
    partial.replace(path)
    user_table.cache_clear()
    choose.cache_clear()


def fields(plan: Plan) -> dict[str, Any]:
    """Return the fields that a plan uses."""
    names = Plan.__slots__
    return {name: value for name in names if (value := getattr(plan, name))}


def _path() -> Path:
    # The same folder as pipeline.paths.cache_folder, which may not be imported here.
    home, caches = os.environ.get("BIRKHOFF_HOME"), os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "cache" if home else Path(caches) / "birkhoff"
    return folder.absolute() / "plans.json"


@cache
def _triton_version() -> str:
    import triton

    return f"triton {triton.__version__}"
