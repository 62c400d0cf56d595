"""Starts the learning process so that the line comes first: few cores, a low priority, first to go when memory is
short, and never longer than the daemon.

    python -m edge.teaching.launch PARENT CORES COMMAND...
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from edgeflame.background import die_with_parent


def main() -> None:
    """Give way, then become the command."""
    parent, cores, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    die_with_parent(parent=parent)
    with contextlib.suppress(OSError):
        # Lower still, and it would never end on a machine that is busy.
        os.nice(10)
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            # The first core takes most interrupts; the last ones are the freest.
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(cores)
    os.execv(command[0], command)  # noqa: S606 - the daemon's own interpreter


if __name__ == "__main__":
    main()
