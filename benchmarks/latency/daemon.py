"""Throughput of the whole daemon compared with the runtime alone, and latency of its verdicts at half load.

    python benchmarks/latency/daemon.py [--model m.edgeflame] [--sizes 640x480 1280x1024 1920x1080] [--repeats 5]

*Bare* is ONNX Runtime with its defaults, one thread a core, in a loop at batch 1 on inputs that are pre-processed.
*Daemon* is `edgeflame inspect` on frames in memory: pre-processing, image health, score, verdict, outbox on
the disk (`synchronous = FULL`), and each result acknowledged by Mosquitto, which is a process of its own; its time
ends when the last result is acknowledged. Segments of both alternate; each of the daemon's is compared with the bare
ones before and after it.

*Half load*: a camera, read by a child process through shared memory as any camera is, gives a frame at half of the
bare rate; latency is from the child's time stamp to the verdict. Writes `daemon.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import onnxruntime

from boards.dataset import BoardStream
from cli import cli as edgeflame
from edge.config.outputs import OutboxConfig
from edge.delivery.outbox import OUTBOX_FILE, Outbox
from edge.frame import Frame, make_frame
from edge.result import Result
from edge.sources.child import Remark, TakenImage, live_frames, taken_image
from edgeflame.cpus import usable_cpus
from edgeflame.images import ImageU8
from edgeflame.package import read_package
from edgeflame.scoring_graph import INPUT

sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))
from brokers import mosquitto_version, running

NUM_FRAMES = 16
"""Different frames, shown in turn."""

WARM_UP_PARTS = 100
"""At the start of a segment, before its time begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a package; without it one is fitted to generated boards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1280x1024", "1920x1080"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each segment")
    parser.add_argument("--threads", type=int, help="as `edgeflame inspect --threads`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or fitted_package(folder)
        with running("mosquitto", folder) as (url, pid):
            bench = Bench(model, url, pid, folder, options.seconds, options.threads)
            rows = [bench.measure(frame_size(text), options.repeats) for text in options.sizes]
    text = _report(rows, options)
    (options.out / "daemon.md").write_text(text)
    print(text)


@dataclass
class Measured:
    """One frame size."""

    size: tuple[int, int]
    bare_ms: list[float] = field(default_factory=list)
    """Every bare call."""
    bare_rates: list[float] = field(default_factory=list)
    daemon_rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """Processor time per part, of daemon and broker together."""
    half_rates: list[float] = field(default_factory=list)
    half_p50_ms: list[float] = field(default_factory=list)
    half_p99_ms: list[float] = field(default_factory=list)
    half_ratios: list[float] = field(default_factory=list)
    """p99 over the bare median of the bare segment before."""
    half_cpu: list[float] = field(default_factory=list)
    """Share of one core."""
    dropped: int = 0


class Bench:
    """Everything that stays the same between segments."""

    def __init__(
        self, model: Path, url: str, broker_pid: int, folder: Path, seconds: float, threads: int | None
    ) -> None:
        self._model = model
        self._folder = folder
        self._broker_pid = broker_pid
        self._seconds = seconds
        self._threads = threads
        self._num_states = 0
        self._url = url
        package = read_package(model)
        self._preprocessing = package.manifest.learning.input
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(package.model_onnx, options, providers=["CPUExecutionProvider"])

    def measure(self, size: tuple[int, int], repeats: int) -> Measured:
        """All segments of one frame size."""
        print(f"{size[0]}x{size[1]}", file=sys.stderr, flush=True)
        frames = make_frames(size)
        measured = Measured(size=size)
        self._bare(measured, frames, 0.5)
        self._full(measured, frames, 100)
        measured = Measured(size=size)
        before = self._bare(measured, frames, self._seconds / 2)
        for _ in range(repeats):
            rate = self._full(measured, frames, max(50, int(before * self._seconds)))
            after = self._bare(measured, frames, self._seconds / 2)
            measured.ratios.append(2 * rate / (before + after))
            measured.half_rates.append(after / 2)
            self._half(measured, after / 2)
            before = self._bare(measured, frames, self._seconds / 2)
        return measured

    def _bare(self, measured: Measured, frames: list[ImageU8], seconds: float) -> float:
        inputs = [self._preprocessing.apply(frame)[None] for frame in frames]
        # The daemon's threads are gone; let the machine become idle, and fill the caches.
        time.sleep(0.1)
        for _ in range(5):
            self._session.run(None, {INPUT: inputs[0]})
        took = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            self._session.run(None, {INPUT: inputs[len(took) % len(inputs)]})
            took.append(time.perf_counter() - start)
        measured.bare_ms += [1000 * one for one in took]
        measured.bare_rates.append(len(took) / sum(took))
        return measured.bare_rates[-1]

    def _full(self, measured: Measured, frames: list[ImageU8], parts: int) -> float:
        watch = Watch(WARM_UP_PARTS, self.cpu_s)
        source = MemorySource(images=frames, num_frames=parts + WARM_UP_PARTS, watch=watch)
        self.run_daemon([source], parts + WARM_UP_PARTS, watch)
        measured.cpu_ms.append(1000 * watch.used_s / parts)
        measured.daemon_rates.append(parts / watch.took_s)
        return measured.daemon_rates[-1]

    def _half(self, measured: Measured, rate: float) -> None:
        watch = Watch(int(rate), self.cpu_s)
        camera = PacedCamera(size=measured.size, rate=rate, watch=watch)
        results = self.run_daemon([camera], int(rate * (1 + self._seconds)), watch)
        results = results[int(rate) :]
        measured.half_cpu.append(watch.used_s / watch.took_s)
        p50, p99 = np.percentile([result.latency_ms for result in results], (50, 99))
        measured.half_p50_ms.append(float(p50))
        measured.half_p99_ms.append(float(p99))
        measured.half_ratios.append(float(p99) / float(np.median(measured.bare_ms)))
        measured.dropped += results[-1].sequence - results[0].sequence + 1 - len(results)

    def run_daemon(self, sources: Sequence[MemorySource | PacedCamera], parts: int, watch: Watch) -> list[Result]:
        """Run the command with a camera for each source; returns the results, all of which were delivered."""
        self._num_states += 1
        state, config = (self._folder / f"{what}-{self._num_states}" for what in ("state", "line.toml"))
        cameras = "".join(f'[cameras.{source.name}]\nsource = "{source.name}"\n' for source in sources)
        # The camera of a benchmark shows few pictures again and again, of more pixels than the model was made of.
        config.write_text(
            f'[image_quality]\nmax_repeats = 0\nframe_size = "any"\n'
            f'[mqtt]\nbroker = "{self._url}"\nfleet = "bench"\nline = "bench"\n{cameras}'
        )
        command = ["inspect", "--model", str(self._model), "--config", str(config)]
        command += ["--state", str(state), "--limit", str(parts), "--device", "cpu", "--json"]
        command += [] if self._threads is None else ["--threads", str(self._threads)]
        by_name = {source.name: source for source in sources}
        with (
            mock.patch("edge.cameras.open_image_source", side_effect=lambda address, **_: by_name[address]),
            mock.patch.object(Outbox, "acknowledge", watch.acknowledging(Outbox.acknowledge)),
            (self._folder / "log").open("w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            edgeflame(command, standalone_mode=False)
        # Another camera may have had a part in hand when the last one was counted.
        if not parts <= watch.acknowledged < parts + len(sources):
            raise RuntimeError(f"{parts} parts wanted, all of them delivered; {watch.acknowledged} were")
        with Outbox(state / OUTBOX_FILE, OutboxConfig()) as outbox:
            results = [result for _, result in reversed(outbox.latest(watch.acknowledged))]
        if any(result.verdict == "unknown" for result in results):
            raise RuntimeError(
                f"a part was not judged: {next(result for result in results if result.verdict == 'unknown')}"
            )
        return results

    def cpu_s(self) -> float:
        """Processor time of the daemon and the broker, without the camera's process, seconds."""
        ours = resource.getrusage(resource.RUSAGE_SELF)
        fields = Path(f"/proc/{self._broker_pid}/stat").read_text().rpartition(")")[2].split()
        broker = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return ours.ru_utime + ours.ru_stime + broker


class Watch:
    """Measures wall and processor time from the frame that ends the warm-up to the last acknowledgement.

    Args:
        skip: frames of the warm-up.
        cpu_s: reads the processor's time.
    """

    def __init__(self, skip: int, cpu_s: Callable[[], float]) -> None:
        self.acknowledged = 0
        self.took_s = self.used_s = 0.0
        self._skip = skip
        self._frames = itertools.count()
        self._cpu_s = cpu_s
        self._started = self._started_cpu_s = 0.0

    def frame(self) -> None:
        """A source yields a frame."""
        if next(self._frames) == self._skip:
            self._started, self._started_cpu_s = time.perf_counter(), self._cpu_s()

    def acknowledging(self, acknowledge: Callable[[Outbox, str, int], None]) -> Callable[[Outbox, str, int], None]:
        """Wrap the outbox's method, to note each acknowledgement."""

        def watched(outbox: Outbox, name: str, number: int) -> None:
            acknowledge(outbox, name, number)
            self.acknowledged = number
            self.took_s = time.perf_counter() - self._started
            self.used_s = self._cpu_s() - self._started_cpu_s

        return watched


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """Frames in memory; the daemon takes them as fast as it can."""

    images: list[ImageU8]
    num_frames: int
    watch: Watch
    name: str = "memory"
    is_live: bool = False
    is_endless: bool = False

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        for number in range(self.num_frames):
            if stop.is_set():
                return
            self.watch.frame()
            image = self.images[number % len(self.images)]
            yield make_frame(part_id=f"part-{number:06d}", source=self.name, image_bgr=image)


@dataclass(frozen=True, kw_only=True)
class PacedCamera:
    """A camera in a child process that gives ``rate`` frames a second, whatever happens to them."""

    size: tuple[int, int]
    rate: float
    watch: Watch = field(compare=False)
    name: str = "paced"
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        for frame in live_frames(self.name, PacedReader(self.size, self.rate), stop):
            self.watch.frame()
            yield frame


@dataclass(frozen=True)
class PacedReader:
    """Yields the images in the camera's child process."""

    size: tuple[int, int]
    rate: float

    def __call__(self, stop: threading.Event) -> Iterator[TakenImage | Remark]:
        frames = make_frames(self.size)
        start, number = time.monotonic(), 0
        while not stop.is_set():
            yield taken_image(frames[number % len(frames)])
            number += 1
            time.sleep(max(0.0, start + number / self.rate - time.monotonic()))


def make_frames(size: tuple[int, int]) -> list[ImageU8]:
    """Boards as a camera of this size would see them."""
    stream = BoardStream(texture="warm_wood", seed=0, defect_rate=0.1, num_parts=NUM_FRAMES)
    return [cv2.resize(part.image_bgr, size, interpolation=cv2.INTER_CUBIC) for part in stream]


def fitted_package(folder: Path) -> Path:
    """The default model, fitted to generated boards by the command itself."""
    data, model = folder / "data", folder / "boards.edgeflame"
    for command in (["demo-data", "--out", str(data)], ["fit", "--data", str(data), "--out", str(model)]):
        subprocess.run([sys.executable, "-m", "edgeflame", *command], check=True, stdout=subprocess.DEVNULL)
    return model


def frame_size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def spread(values: list[float], digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _report(rows: list[Measured], options: argparse.Namespace) -> str:
    first = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    conditions = (
        f"Default model, 256x256, ONNX Runtime {onnxruntime.__version__} on the CPU, {platform.machine()} with "
        f"{usable_cpus()} cores, {mosquitto_version()}, load average {os.getloadavg()[0]:.1f} at the end"
        f"{', at real-time priority' if first else ''}. Medians of {options.repeats} segments of "
        f"{options.seconds:g} s (least to most)."
    )
    full = [
        f"| {_named(row)} | {spread(row.bare_rates, 0)} | {spread(row.daemon_rates, 0)} | "
        f"**{spread(row.ratios, 2)}** | {spread(row.cpu_ms, 1)} |"
        for row in rows
    ]
    half = [
        f"| {_named(row)} | {spread(row.half_rates, 0)} | {np.median(row.bare_ms):.2f} | "
        f"{spread(row.half_p50_ms, 1)} | {spread(row.half_p99_ms, 1)} | **{spread(row.half_ratios, 2)}** | "
        f"{spread(row.half_cpu, 2)} | {row.dropped} |"
        for row in rows
    ]
    lines = [
        conditions,
        "",
        "## As fast as it can",
        "",
        "| frame | bare, parts/s | daemon, parts/s | daemon over bare | CPU ms a part, broker included |",
        "| --- | --- | --- | --- | --- |",
        *full,
        "",
        "## At half of the bare rate, from a camera's child process",
        "",
        "| frame | parts/s | bare p50, ms | latency p50, ms | p99, ms | p99 over bare p50 | CPU, cores | dropped |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *half,
    ]
    return "\n".join(lines) + "\n"


def _named(row: Measured) -> str:
    return f"{row.size[0]}x{row.size[1]}"


if __name__ == "__main__":
    main()
