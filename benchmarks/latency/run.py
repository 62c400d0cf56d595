"""Latency, memory and size of the scoring graph beside its backbone alone and anomalib's PaDiM, on one machine.

Everything is timed in one process, turn by turn (`edge.runtimes.bench.take_turns`); memory is that of a fresh process
for each model. Writes `latency.md` and `latency.png`.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

from edge.runtimes.bench import take_turns
from edgeflame.cpus import usable_cpus

sys.path.insert(0, str(Path(__file__).parent))
from models import (  # beside this script
    BACKBONE,
    BACKBONE_COARSE,
    OURS,
    OURS_COARSE,
    OURS_INT8,
    PADIM,
    PREPROCESSING,
    SIDE,
    Model,
    calibration_images,
    make_models,
)

FRAME = (1080, 1920)
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
AGAINST = {OURS: BACKBONE, OURS_INT8: BACKBONE, OURS_COARSE: BACKBONE_COARSE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--no-anomalib", dest="anomalib", action="store_false")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), calibration_images(), anomalib=options.anomalib)
        sizes = {model.name: model.path.stat().st_size for model in models}
        memory = {model.name: _memory(model, options.threads) for model in models}
        runs = {model.name: _runner(model, options.threads) for model in models}
        print("timing", file=sys.stderr, flush=True)
        single = take_turns({name: partial(run, 1) for name, run in runs.items()}, seconds=options.seconds)
        whole = take_turns(
            {model.name: _end_to_end(model, options.threads) for model in models}, seconds=options.seconds
        )
        batches = {
            batch: take_turns(
                {name: partial(runs[name], batch) for name in (BACKBONE, OURS, OURS_INT8)}, seconds=options.seconds / 2
            )
            for batch in options.batch
        }
        ours = {model.name: model for model in models}
        streams = {
            (name, count): _streams(ours[name], count, options.seconds / 6)
            for name in (OURS, OURS_INT8)
            for count in options.streams
        }
    lines = [_conditions(options.threads), "", "## One image", "", *_single_table(single, whole, sizes, memory)]
    lines += ["", "## Batches, graph alone", "", *_batch_table(batches)]
    lines += ["", "## Streams, each with a session of one thread, graph alone", "", *_stream_table(streams)]
    text = "\n".join(lines) + "\n"
    (options.out / "latency.md").write_text(text)
    _plot(single, sizes, options.out / "latency.png")
    print(text)


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def _input(model: Model, batch: int) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8)
    return images if model.bgr else _normalised(images)


def _normalised(images: np.ndarray) -> np.ndarray:
    """Images as anomalib's model takes them, in the fewest passes of numpy."""
    planes = images[..., ::-1].transpose(0, 3, 1, 2)
    scale, shift = 1 / (255 * STD), -MEAN / STD
    return planes * scale[None, :, None, None] + shift[None, :, None, None]


def _runner(model: Model, threads: int) -> Callable[[int], object]:
    session = _session(model.path, threads)
    name = session.get_inputs()[0].name
    inputs: dict[int, np.ndarray] = {}

    def run(batch: int) -> object:
        if batch not in inputs:
            inputs[batch] = _input(model, batch)
        return session.run(None, {name: inputs[batch]})

    return run


def _end_to_end(model: Model, threads: int) -> Callable[[], object]:
    """From a camera's frame to score and map: crop, resize, the model's own normalisation, the graph."""
    session = _session(model.path, threads)
    name = session.get_inputs()[0].name
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    frame = cv2.GaussianBlur(frame, (0, 0), 3)

    def run() -> object:
        image = PREPROCESSING.apply(frame)[None]
        return session.run(None, {name: image if model.bgr else _normalised(image)})

    return run


def _memory(model: Model, threads: int) -> int:
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), str(model.path), str(threads)]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _streams(model: Model, count: int, seconds: float) -> list[float]:
    """Seconds of every call, with ``count`` threads at once."""
    took: list[list[float]] = [[] for _ in range(count)]
    runs = [_runner(model, 1) for _ in range(count)]
    barrier = threading.Barrier(count)

    def work(index: int) -> None:
        runs[index](1)
        barrier.wait()
        end = time.perf_counter() + seconds
        while not took[index] or time.perf_counter() < end:
            start = time.perf_counter()
            runs[index](1)
            took[index].append(time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for each in took for one in each]


def _conditions(threads: int) -> str:
    first = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    return (
        f"{SIDE}x{SIDE}, rank 24, ONNX Runtime {onnxruntime.__version__} on the CPU with {threads} threads, "
        f"{platform.machine()} with {usable_cpus()} cores, load average {os.getloadavg()[0]:.1f} at the end"
        f"{', at real-time priority' if first else ''}. Milliseconds."
    )


def _ms(took: Sequence[float]) -> list[str]:
    ms = 1000 * np.asarray(took)
    return [f"{value:.2f}" for value in (ms.min(), *np.percentile(ms, (50, 95, 99)), ms.max())]


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _ratio(name: str, took: dict[str, list[float]]) -> str:
    if name not in AGAINST or AGAINST[name] not in took:
        return ""
    return _compared(took, name, AGAINST[name])


def _single_table(
    single: dict[str, list[float]], whole: dict[str, list[float]], sizes: dict[str, int], memory: dict[str, int]
) -> list[str]:
    head = ["", "MB", "peak MB", "least", "p50", "p95", "p99", "most", "of its backbone (least, p50)"]
    lines = [_row(*head, "from a 1920x1080 frame: least", "p50", "p99"), _row(*["---"] * (len(head) + 3))]
    for name, took in single.items():
        frame = _ms(whole[name])
        cells = [f"{sizes[name] / 1e6:.1f}", f"{memory[name] / 1e6:.0f}", *_ms(took), _ratio(name, single)]
        lines.append(_row(name, *cells, frame[0], frame[1], frame[3]))
    if PADIM in single:
        times, space = _compared(single, PADIM, OURS), sizes[PADIM] / sizes[OURS]
        lines += ["", f"{PADIM}: {times} times as long as {OURS} (least, p50), {space:.1f} times the space."]
    lines += ["", f"{OURS}: {_compared(single, OURS, OURS_INT8)} times as long as in int8 (least, p50)."]
    return lines


def _compared(took: dict[str, list[float]], one: str, other: str) -> str:
    first, second = np.asarray(took[one]), np.asarray(took[other])
    return f"{first.min() / second.min():.2f}, {np.median(first) / np.median(second):.2f}"


def _batch_table(batches: dict[int, dict[str, list[float]]]) -> list[str]:
    lines = [_row("batch", "", "least", "p50", "p95", "p99", "most", "of its backbone (least, p50)", "images/s (p50)")]
    lines.append(_row(*["---"] * 9))
    for batch, took in batches.items():
        for name, one in took.items():
            lines.append(_row(batch, name, *_ms(one), _ratio(name, took), f"{batch / np.median(one):.0f}"))
    return lines


def _stream_table(streams: dict[tuple[str, int], list[float]]) -> list[str]:
    lines = [_row("", "streams", "least", "p50", "p95", "p99", "most", "images/s"), _row(*["---"] * 8)]
    for (name, count), took in streams.items():
        lines.append(_row(name, count, *_ms(took), f"{count / np.mean(took):.0f}"))
    return lines


def _plot(single: dict[str, list[float]], sizes: dict[str, int], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(single)
    least = [1000 * min(single[name]) for name in names]
    median = [1000 * float(np.median(single[name])) for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    rows = np.arange(len(names))
    left.barh(rows, median, color="#c6d4e3", label="median")
    left.barh(rows, least, color="#2c5f8a", label="least")
    left.set(xlabel="ms for one image, graph alone", xscale="log", yticks=rows, yticklabels=names)
    left.set_xticks([2, 5, 10, 20, 50, 100], labels=["2", "5", "10", "20", "50", "100"])
    left.minorticks_off()
    left.invert_yaxis()
    left.legend(frameon=False, loc="upper right")
    right.barh(rows, [sizes[name] / 1e6 for name in names], color="#7a8b3c")
    right.set(xlabel="MB on disk")
    for axes, values in ((left, least), (right, [sizes[name] / 1e6 for name in names])):
        for row, value in zip(rows, values, strict=True):
            axes.annotate(f"{value:.1f}", (value, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
