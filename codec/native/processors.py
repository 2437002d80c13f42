"""How many processors this process may use, which in a container are fewer than the machine has."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def processors() -> int:
    """Return the number of logical processors that this process may use, at least 1.

    The smallest of three: processors of the machine, those that the process is bound to (`taskset`, a cpuset), and
    the time that its control group grants, rounded up (`docker run --cpus`, a Kubernetes limit).
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _granted(CGROUPS))))


def _granted(root: Path) -> float:
    """Processors' worth of time that a control group grants, as its own container sees it (cgroup v2, then v1)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return math.inf
    if quota in ("max", "-1"):
        return math.inf
    return int(quota) / int(period)
