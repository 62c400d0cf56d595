"""What the whole daemon sustains beside the runtime alone, and how late its verdicts are at half load.

    python benchmarks/latency/daemon.py [--model m.edgeflame] [--sizes 640x480 1280x1024 1920x1080] [--repeats 5]

*Bare* is ONNX Runtime with its defaults, one thread a core, in a loop at batch 1 on inputs that are pre-processed.
*Daemon* is `edge.daemon.run_inspection` on frames in memory: pre-processing, image health, score, verdict, outbox on
the disk (`synchronous = FULL`), and each result acknowledged by Mosquitto, which is a process of its own; its time
ends when the last result is acknowledged. Segments of both alternate; each of the daemon's is compared with the bare
ones before and after it.

*Half load*: a camera, read by a child process through shared memory as any camera is, gives a frame at half of the
bare rate; latency is from the child's time stamp to the verdict. Writes `daemon.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

from edge.config import InspectConfig
from edge.daemon import run_inspection
from edge.delivery.mqtt import MqttConfig
from edge.health import HealthLimits
from edge.line import Line
from edge.loading import Loader
from edge.plan import CameraPlan, Plan
from edge.results import Inspected
from edge.runtimes.interface import INPUT
from edge.sources import Frame
from edge.sources.interface import make_frame
from edge.sources.live import live_frames
from edge.sources.taken import Remark, TakenImage, take
from edgeflame.boards.stream import BoardStream
from edgeflame.images import ImageU8

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
        model = options.model or _fitted(folder)
        with running("mosquitto", folder) as (url, pid):
            bench = Bench(model, url, pid, folder, options.seconds, options.threads)
            rows = [bench.measure(_size(text), options.repeats) for text in options.sizes]
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
    """Processor time a part, of the daemon and of the broker."""
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
        self._folder = folder
        self._broker_pid = broker_pid
        self._seconds = seconds
        self._num_states = 0
        config = InspectConfig(
            mqtt=MqttConfig(broker=url, fleet="bench", line="bench"),
            # The camera of a benchmark shows few pictures again and again.
            health=HealthLimits(max_repeats=0),
        )
        camera = CameraPlan(name="camera", source="", product="p", settings=config, modbus=None)
        self._plan = Plan(config=config, products={"p": model}, cameras=(camera,))
        self._loader = Loader(device="cpu", num_threads=threads)
        package = self._loader.package(model)
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
        # The threads of the daemon are gone; let the machine come to rest, and the caches fill.
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
        told = Told(WARM_UP_PARTS, self._cpu_s)
        end = self._run(MemorySource(images=frames, num_frames=parts + WARM_UP_PARTS), None, told)
        measured.cpu_ms.append(1000 * (self._cpu_s() - told.cpu_s) / parts)
        measured.daemon_rates.append(parts / (end - told.started))
        return measured.daemon_rates[-1]

    def _half(self, measured: Measured, rate: float) -> None:
        told = Told(int(rate), self._cpu_s)
        end = self._run(PacedCamera(size=measured.size, rate=rate), int(rate * (1 + self._seconds)), told)
        measured.half_cpu.append((self._cpu_s() - told.cpu_s) / (end - told.started))
        p50, p99 = np.percentile(told.latencies_ms, (50, 99))
        measured.half_p50_ms.append(float(p50))
        measured.half_p99_ms.append(float(p99))
        measured.half_ratios.append(float(p99) / float(np.median(measured.bare_ms)))
        measured.dropped += told.num_missing

    def _run(self, source: MemorySource | PacedCamera, limit: int | None, told: Told) -> float:
        """When it ended, all delivered."""
        self._num_states += 1
        camera = self._plan.cameras[0]
        judge = self._loader.open(self._plan.products["p"], camera.settings, camera=camera.name, is_live=source.is_live)
        summary = run_inspection(
            self._plan,
            [Line(camera.name, lambda: source, judge, camera.settings.capture)],
            self._loader,
            [told],
            state=self._folder / f"state-{self._num_states}",
            limit=limit,
            stop=threading.Event(),
        )
        end = time.perf_counter()
        wanted = limit if limit is not None else source.num_frames
        if summary.parts != wanted or summary.unknown or summary.undelivered:
            msg = f"{wanted} parts wanted, all judged and delivered; got {summary}"
            raise RuntimeError(msg)
        return end

    def _cpu_s(self) -> float:
        """Of the daemon and of the broker, not of the camera's process."""
        ours = resource.getrusage(resource.RUSAGE_SELF)
        fields = Path(f"/proc/{self._broker_pid}/stat").read_text().rpartition(")")[2].split()
        broker = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return ours.ru_utime + ours.ru_stime + broker


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """Frames that are there already: the source waits for the daemon."""

    images: list[ImageU8]
    num_frames: int
    name: str = "memory"
    is_live: bool = False
    is_endless: bool = False

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        for number in range(self.num_frames):
            if stop.is_set():
                return
            image = self.images[number % len(self.images)]
            yield make_frame(part_id=f"part-{number:06d}", source=self.name, image_bgr=image)


@dataclass(frozen=True, kw_only=True)
class PacedCamera:
    """A camera in a child process that gives ``rate`` frames a second, whatever happens to them."""

    size: tuple[int, int]
    rate: float
    name: str = "paced"
    is_live: bool = True
    is_endless: bool = True
    num_frames: int | None = None

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        return live_frames(self.name, self.read, stop)

    def read(self, stop: threading.Event) -> Iterator[TakenImage | Remark]:
        """Images, in the child process."""
        frames = make_frames(self.size)
        start, number = time.monotonic(), 0
        while not stop.is_set():
            yield take(frames[number % len(frames)])
            number += 1
            time.sleep(max(0.0, start + number / self.rate - time.monotonic()))


class Told:
    """A sink: latencies, and what is missing between the parts, from a certain part on."""

    def __init__(self, skip: int, cpu_s: Callable[[], float]) -> None:
        self.latencies_ms: list[float] = []
        self.num_missing = 0
        self.started = self.cpu_s = 0.0
        self._skip = skip
        self._read_cpu_s = cpu_s
        self._last = 0

    def accept(self, inspected: Inspected) -> None:
        result = inspected.result
        if self._skip:
            self._skip -= 1
            if not self._skip:
                self.started, self.cpu_s = time.perf_counter(), self._read_cpu_s()
        else:
            self.latencies_ms.append(result.latency_ms)
            self.num_missing += result.sequence - self._last - 1
        self._last = result.sequence

    def close(self) -> None:
        pass


def make_frames(size: tuple[int, int]) -> list[ImageU8]:
    """Boards as a camera of this size would see them."""
    stream = BoardStream(texture="warm_wood", seed=0, defect_rate=0.1, num_parts=NUM_FRAMES)
    return [cv2.resize(part.image_bgr, size, interpolation=cv2.INTER_CUBIC) for part in stream]


def _fitted(folder: Path) -> Path:
    """The default model, fitted to generated boards by the command itself."""
    from click.testing import CliRunner

    from edgeflame.cli import main as edgeflame

    data, model = folder / "data", folder / "boards.edgeflame"
    for command in (
        ["demo-data", "--out", str(data)],
        ["fit", "--data", str(data), "--out", str(model)],
    ):
        result = CliRunner().invoke(edgeflame, command)
        if result.exit_code:
            raise RuntimeError(result.output)
    return model


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _spread(values: list[float], digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _report(rows: list[Measured], options: argparse.Namespace) -> str:
    first = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    conditions = (
        f"Default model, 256x256, ONNX Runtime {onnxruntime.__version__} on the CPU, {platform.machine()} with "
        f"{os.cpu_count()} cores, {mosquitto_version()}, load average {os.getloadavg()[0]:.1f} at the end"
        f"{', at real-time priority' if first else ''}. Medians of {options.repeats} segments of "
        f"{options.seconds:g} s (least to most)."
    )
    full = [
        f"| {_named(row)} | {_spread(row.bare_rates, 0)} | {_spread(row.daemon_rates, 0)} | "
        f"**{_spread(row.ratios, 2)}** | {_spread(row.cpu_ms, 1)} |"
        for row in rows
    ]
    half = [
        f"| {_named(row)} | {_spread(row.half_rates, 0)} | {np.median(row.bare_ms):.2f} | "
        f"{_spread(row.half_p50_ms, 1)} | {_spread(row.half_p99_ms, 1)} | **{_spread(row.half_ratios, 2)}** | "
        f"{_spread(row.half_cpu, 2)} | {row.dropped} |"
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
