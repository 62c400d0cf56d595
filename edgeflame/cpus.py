"""How many CPU cores this process may use: fewer than the machine has, in a container or under a service's limits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Number of cores for threads that compute, at least 1: those of the affinity, within the quota of CPU time.

    A quota is rounded down. Threads beyond it do not compute faster: once it is used up, all stand still until its
    period of a tenth of a second is over.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    # Elsewhere than on Linux there is no affinity to ask for.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, math.floor(min(_quotas(root), default=count))))


def are_cpus_limited() -> bool:
    """Whether there are more cores than this process may use, which libraries that count cores may not know."""
    return usable_cpus() < (os.cpu_count() or 1)


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's control groups and all groups around them (Linux, cgroup v1 and v2)."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mounted / controllers if controllers else mounted
        inside = top / path.lstrip("/")
        # Within a container its own group may be mounted at the top, whatever its path says.
        for group in (inside, *inside.parents):
            if not group.is_relative_to(top):
                break
            quota = _v2_quota(group) if not controllers else _v1_quota(group)
            if quota is not None:
                yield quota


def _v2_quota(group: Path) -> float | None:
    return _share(*[*_read(group / "cpu.max").split(), "", ""][:2])


def _v1_quota(group: Path) -> float | None:
    return _share(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _share(quota: str, period: str) -> float | None:
    """A quota in cores; None if there is none: v2 says ``max`` then, v1 -1."""
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""
