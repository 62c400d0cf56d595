"""Several cameras on one machine: throughput of all together, its share for each, and the latency at half load.

    python benchmarks/latency/cameras.py [--model m.edgeflame] [--cameras 1 2 4] [--size 640x480] [--repeats 3]

*The runtime alone* is ONNX Runtime in a bare loop at batch 1, the faster of: all cores on one image, or an image on
each core. *As fast as they can*: `edgeflame inspect` with that many cameras whose frames are in memory, until the last
result is acknowledged by Mosquitto; *least share* is the part of the camera that got least, over the mean. *At half of
the runtime's rate*: cameras in child processes that give a frame at the same rate each, whatever happens to it.
Segments alternate, and each is compared with the runtime's before and after it. Writes `cameras.md`.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))
from brokers import mosquitto_version, running
from daemon import (
    WARM_UP_PARTS,
    Bench,
    MemorySource,
    PacedCamera,
    Watch,
    fitted_package,
    frame_size,
    make_frames,
    spread,
)

from edge.runtimes.interface import Runtime
from edge.runtimes.load import open_runtime
from edgeflame.cpus import usable_cpus
from edgeflame.images import ImageU8
from edgeflame.package import Package, read_package

LATE_MS = 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a package; without it one is fitted to generated boards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--cameras", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each segment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or fitted_package(folder)
        with running("mosquitto", folder) as (url, pid):
            bench = Bench(model, url, pid, folder, options.seconds, None)
            alone = RuntimeAlone(read_package(model), make_frames(frame_size(options.size)))
            rows = [Row(count) for count in options.cameras]
            before = alone.rate(options.seconds)
            for _ in range(options.repeats):
                for row in rows:
                    row.measure(bench, frame_size(options.size), before, options.seconds)
                    after = alone.rate(options.seconds)
                    row.shares_of_runtime.append(2 * row.rates[-1] / (before + after))
                    before = after
    text = _report(rows, options)
    (options.out / "cameras.md").write_text(text)
    print(text)


class RuntimeAlone:
    """ONNX Runtime in bare loops."""

    def __init__(self, package: Package, frames: list[ImageU8]) -> None:
        preprocessing = package.manifest.learning.input
        self._inputs = [preprocessing.apply(frame)[None] for frame in frames]
        self._whole = open_runtime(package.model_onnx, device="cpu")
        self._single = [open_runtime(package.model_onnx, device="cpu", num_threads=1) for _ in range(usable_cpus())]

    def rate(self, seconds: float) -> float:
        """Images a second, of the faster way."""
        time.sleep(0.1)
        return max(self._loop([self._whole], seconds / 2), self._loop(self._single, seconds / 2))

    def _loop(self, runtimes: list[Runtime], seconds: float) -> float:
        counts = [0] * len(runtimes)
        end = time.perf_counter() + seconds

        def work(index: int) -> None:
            while time.perf_counter() < end:
                runtimes[index].score(self._inputs[counts[index] % len(self._inputs)])
                counts[index] += 1

        start = time.perf_counter()
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(runtimes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - start)


@dataclass
class Row:
    """A number of cameras."""

    num_cameras: int
    rates: list[float] = field(default_factory=list)
    shares_of_runtime: list[float] = field(default_factory=list)
    least_shares: list[float] = field(default_factory=list)
    half_rates: list[float] = field(default_factory=list)
    half_p50_ms: list[float] = field(default_factory=list)
    half_p99_ms: list[float] = field(default_factory=list)
    late: int = 0
    dropped: int = 0

    def measure(self, bench: Bench, size: tuple[int, int], alone: float, seconds: float) -> None:
        """One segment at full load and one at half of the runtime's rate."""
        names = [f"camera{number}" for number in range(1, self.num_cameras + 1)]
        parts = int(alone * seconds)
        watch = Watch(WARM_UP_PARTS, bench.cpu_s)
        memory = [
            # More than its share, for the fastest; the run ends when all together have their parts.
            MemorySource(images=make_frames(size), num_frames=parts + WARM_UP_PARTS, watch=watch, name=name)
            for name in names
        ]
        results = bench.run_daemon(memory, parts + WARM_UP_PARTS, watch)
        self.rates.append(parts / watch.took_s)
        shares = collections.Counter(result.camera for result in results[WARM_UP_PARTS:])
        self.least_shares.append(min(shares[name] for name in names) * self.num_cameras / parts)
        rate = alone / 2
        watch = Watch(int(rate), bench.cpu_s)
        paced = [PacedCamera(size=size, rate=rate / self.num_cameras, watch=watch, name=name) for name in names]
        results = bench.run_daemon(paced, int(rate * (1 + seconds)), watch)[int(rate) :]
        latencies = [result.latency_ms for result in results]
        self.half_rates.append(rate)
        self.half_p50_ms.append(float(np.percentile(latencies, 50)))
        self.half_p99_ms.append(float(np.percentile(latencies, 99)))
        self.late += sum(latency > LATE_MS for latency in latencies)
        for name in names:
            numbers = [result.sequence for result in results if result.camera == name]
            self.dropped += max(numbers) - min(numbers) + 1 - len(numbers)


def _report(rows: list[Row], options: argparse.Namespace) -> str:
    conditions = (
        f"Default model, 256x256, frames of {options.size}, ONNX Runtime {onnxruntime.__version__} on the CPU, "
        f"{platform.machine()} with {usable_cpus()} cores, {mosquitto_version()}, load average "
        f"{os.getloadavg()[0]:.1f} at the end. Medians of {options.repeats} segments of {options.seconds:g} s "
        "(least to most)."
    )
    columns = ("cameras", "as fast as they can, parts/s", "over the runtime alone", "least share", "at half: parts/s")
    columns += ("p50, ms", "p99, ms", f"later than {LATE_MS:g} ms", "dropped")
    lines = [
        conditions,
        "",
        f"| {' | '.join(columns)} |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row.num_cameras} | {spread(row.rates, 0)} | **{spread(row.shares_of_runtime, 2)}** | "
            f"{spread(row.least_shares, 2)} | {spread(row.half_rates, 0)} | "
            f"{spread(row.half_p50_ms, 1)} | {spread(row.half_p99_ms, 1)} | {row.late} | {row.dropped} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
