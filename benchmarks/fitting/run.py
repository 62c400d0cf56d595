"""Time and peak memory of fitting the statistics, beside anomalib's, each in a process of its own with a budget.

Embeddings are random, of the default size (1024 positions, 152 channels), and made on demand: neither the network nor
the time to make them is included. Writes `fitting.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from edgeflame.cpus import usable_cpus

GRID, CHANNELS, RANK, BATCH = (32, 32), 152, 24, 64
OURS, ANOMALIB = "EdgeFlame", "anomalib"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--images", type=int, nargs="+", default=[755, 10_000])
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for each fit")
    parser.add_argument("--anomalib-images", type=int, nargs="*", default=[755], help="10,000 take 6.2 GB at the least")
    parser.add_argument("--child", choices=[OURS, ANOMALIB], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_fit(options.child, options.images[0])))
        return
    conditions = (
        f"1024 positions x {CHANNELS} channels, rank {RANK}, {platform.machine()} with {usable_cpus()} cores, other "
        f"programs beside it (load average {os.getloadavg()[0]:.1f} at the start); at most {options.budget:.0f} s each."
    )
    lines = [conditions, "", "| | images | seconds | peak memory, MB |", "|---|---|---|---|"]
    for name, counts in {OURS: options.images, ANOMALIB: options.anomalib_images}.items():
        for count in counts:
            lines.append(_row(name, count, options.budget))
            print(lines[-1], flush=True)
    (options.out / "fitting.md").write_text("\n".join(lines) + "\n")


def _row(name: str, count: int, budget: float) -> str:
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, "--images", str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=budget + 30, check=False)
    except subprocess.TimeoutExpired:
        return f"| {name} | {count} | not done after {budget:.0f} | |"
    if done.returncode:
        return f"| {name} | {count} | stopped by exit code {done.returncode} (memory) | |"
    found = json.loads(done.stdout.splitlines()[-1])
    return f"| {name} | {count} | {found['seconds']:.1f} | {found['peak_mb']:.0f} |"


def _fit(name: str, count: int) -> dict[str, float]:
    seconds = _fit_ours(count) if name == OURS else _fit_anomalib(count)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_mb": peak * 1024 / 1e6}


def _fit_ours(count: int) -> float:
    import numpy as np

    from edgeflame.statistics.gaussian import fit_gaussian
    from edgeflame.statistics.moments import MomentAccumulator

    rng = np.random.default_rng(0)
    accumulator, spent = MomentAccumulator(), 0.0
    for start in range(0, count, BATCH):
        shape = (min(BATCH, count - start), GRID[0] * GRID[1], CHANNELS)
        embeddings = rng.standard_normal(shape, dtype=np.float32)
        begin = time.perf_counter()
        accumulator.add(embeddings)
        spent += time.perf_counter() - begin
    begin = time.perf_counter()
    fit_gaussian(accumulator.moments(), grid=GRID, rank=RANK)
    return spent + time.perf_counter() - begin


def _fit_anomalib(count: int) -> float:
    import torch
    from anomalib.models.components.stats import MultiVariateGaussian

    embeddings = torch.randn(count, CHANNELS, *GRID)
    begin = time.perf_counter()
    MultiVariateGaussian().fit(embeddings)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
