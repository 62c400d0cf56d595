"""Runtimes of the scoring graph on this machine's GPU, beside the CPU: the same scores, and how fast.

    python benchmarks/gpu/runtimes.py --model FILE [--devices cpu cuda rtx ...] [--seconds 20]

For each runtime: the largest difference from the package's reference scores, latency at several batch sizes (turn by
turn, in one process), and throughput of several streams, each with a runtime of its own. For ONNX Runtime's CUDA
provider also the share of the memory's bandwidth at which the statistics are read: the graph's time less that of its
backbone. `ort-rtx` is ONNX Runtime's plugin onnxruntime-ep-nv-tensorrt-rtx, to be held against `rtx`, which is
EdgeFlame's own. A runtime that cannot be used is listed with the reason; exit code 1 if one scores something else than
the package says, or if none but the CPU could be used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime

from edge.runtimes.bench import take_turns
from edge.runtimes.interface import Runtime
from edge.runtimes.load import LineDevice, compare_with_references, open_for_line
from edge.runtimes.onnx_runtime import OnnxRuntime
from edgeflame.errors import EdgeFlameError, RuntimeUnavailableError
from edgeflame.images import ImageU8
from edgeflame.onnx_session import failures_of, open_session
from edgeflame.package import Package, read_package
from edgeflame.scoring_graph import INPUT, with_unsmoothed_map
from edgeflame.tensorrt import TENSORRT_KINDS, TensorRTKind, device_capability, load_tensorrt, select_capabilities
from export.precision import Precision, backbone_model, with_precision
from export.trt import build_engines

ORT_RTX = "ort-rtx"
DEVICES = ("cpu", "cuda", "ort-tensorrt", ORT_RTX, "rtx", "rtx fp16", "tensorrt", "tensorrt fp16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="A package with reference images.")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="For each batch size, all runtimes together.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        package = read_package(options.model)
        openers = {name: partial(open_device, package, name, Path(folder) / name) for name in options.devices}
        runtimes, is_right = check(package, openers)
        print(f"\nONNX Runtime {onnxruntime.__version__}; input {package.manifest.learning.input}\n", flush=True)
        time_batches(runtimes, options.batch, options.seconds)
        if "cuda" in runtimes:
            measure_bandwidth(package, options.seconds / 4)
        time_streams({name: openers[name] for name in runtimes}, options.streams, options.seconds / 20)
    wanted = set(options.devices) - {"cpu"}
    return 0 if is_right and (not wanted or wanted & runtimes.keys()) else 1


def open_device(package: Package, name: str, engines: Path) -> Runtime:
    """Open one of ``DEVICES``; engines are built into the folder first.

    Raises:
        EdgeFlameError: it cannot be used here.
    """
    device, _, precision = name.partition(" ")
    if device == ORT_RTX:
        return open_ort_rtx(package.model_onnx)
    if device in TENSORRT_KINDS:
        build(package, cast(TensorRTKind, device), cast(Precision, precision or "fp32"), engines)
    return open_for_line(package, device=cast(LineDevice, device), engines=engines)[0]


def build(package: Package, kind: TensorRTKind, precision: Precision, folder: Path) -> None:
    library, model = load_tensorrt(kind), package.model_onnx
    capabilities = select_capabilities(library, (device_capability(),))
    if precision != "fp32":
        model = with_precision(onnx.load_from_string(model), precision).SerializeToString()
    build_engines(
        library,
        model,
        folder,
        capabilities=capabilities,
        precision=precision,
        max_batch=32,
        package_sha256=package.sha256,
    )


def open_ort_rtx(model_onnx: bytes) -> Runtime:
    """The graph by NVIDIA's plugin of ONNX Runtime."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as exc:
        raise RuntimeUnavailableError(f"not installed ({exc})") from exc
    name = plugin.get_ep_name()
    failures = failures_of(onnxruntime)
    try:
        if all(device.ep_name != name for device in onnxruntime.get_ep_devices()):
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
        if not devices:
            raise RuntimeUnavailableError("it finds no GPU that it can use")
        settings = onnxruntime.SessionOptions()
        settings.add_provider_for_devices(devices[:1], {})
        session = onnxruntime.InferenceSession(with_unsmoothed_map(model_onnx), settings)
    except failures as exc:
        raise RuntimeUnavailableError(str(exc).splitlines()[0]) from exc
    return OnnxRuntime(session, failures=failures)


def check(package: Package, openers: dict[str, Callable[[], Runtime]]) -> tuple[dict[str, Runtime], bool]:
    """Open each and compare its scores with the package's; the runtimes that can be used, and whether all agree."""
    runtimes, is_right = {}, True
    print("| runtime | largest difference of reference scores | allowed | opened in s |\n|---|---|---|---|", flush=True)
    for name, opener in openers.items():
        start = time.perf_counter()
        try:
            runtime = opener()
            report = compare_with_references(runtime, package)
        except EdgeFlameError as exc:
            print(f"| {name} | cannot be used: {exc} | | |", flush=True)
            continue
        seconds = time.perf_counter() - start
        worst = "not finite" if report.worst is None else f"{report.worst:.1e}"
        flips = f", {len(report.flipped)} verdicts flip" if report.flipped else ""
        print(f"| {name} ({runtime.provider}) | {worst}{flips} | {report.tolerance:g} | {seconds:.1f} |", flush=True)
        is_right &= report.passed
        runtimes[name] = runtime
    return runtimes, is_right


def time_batches(runtimes: dict[str, Runtime], batches: list[int], seconds: float) -> None:
    print("\n| batch | runtime | least ms | p50 | p99 | images/s (p50) | calls |\n|---|---|---|---|---|---|---|")
    for batch in batches:
        calls = {}
        for name, runtime in runtimes.items():
            calls[name] = partial(runtime.score, images(runtime, batch))
            try:
                calls[name]()
            except EdgeFlameError as exc:
                print(f"| {batch} | {name} | {exc} | | | | |")
                del calls[name]
        for name, took in take_turns(calls, seconds=seconds).items():
            ms = 1000 * np.asarray(took)
            p50, p99 = np.percentile(ms, (50, 99))
            figures = " | ".join(f"{value:.2f}" for value in (ms.min(), p50, p99))
            print(f"| {batch} | {name} | {figures} | {1000 * batch / p50:.0f} | {len(ms)} |", flush=True)


def measure_bandwidth(package: Package, seconds: float) -> None:
    """How fast CUDA's provider reads the statistics, beside a copy within the GPU's memory."""
    backbone_onnx = backbone_model(package.model_onnx)
    num_bytes = weights_bytes(package.model_onnx) - weights_bytes(backbone_onnx)
    runtime = open_for_line(package, device="cuda")[0]
    backbone = open_session(backbone_onnx, device="cuda", num_threads=None)
    image = images(runtime, 1)
    took = take_turns(
        {"graph": partial(runtime.score, image), "backbone": partial(backbone.run, None, {INPUT: image})},
        seconds=seconds,
    )
    scoring_s = float(np.median(took["graph"]) - np.median(took["backbone"]))
    peak = copy_bandwidth()
    told = f"Statistics of {num_bytes / 1e6:.1f} MB: the graph takes {1000 * scoring_s:.3f} ms longer than its backbone"
    if scoring_s > 0:
        reached = num_bytes / scoring_s
        told += f", {reached / 1e9:.0f} GB/s, {reached / peak:.0%} of a copy's {peak / 1e9:.0f} GB/s"
    print(f"\n{told}.", flush=True)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GB within the GPU's memory."""
    import torch

    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    begin.record()
    for _ in range(20):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * source.numel() / (begin.elapsed_time(end) / 1000)


def weights_bytes(model_onnx: bytes) -> int:
    return sum(len(tensor.raw_data) for tensor in onnx.load_from_string(model_onnx).graph.initializer)


def time_streams(openers: dict[str, Callable[[], Runtime]], counts: list[int], seconds: float) -> None:
    print("\n| streams | runtime | p50 ms | p99 | images/s |\n|---|---|---|---|---|")
    for count in counts:
        for name, opener in openers.items():
            try:
                took, elapsed = streams(opener, count, seconds)
            except EdgeFlameError as exc:
                print(f"| {count} | {name} | {exc} | | |", flush=True)
                continue
            p50, p99 = np.percentile(1000 * np.asarray(took), (50, 99))
            print(f"| {count} | {name} | {p50:.2f} | {p99:.2f} | {len(took) / elapsed:.0f} |", flush=True)


def streams(opener: Callable[[], Runtime], count: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every call of ``count`` threads at once, each with a runtime of its own, and those of all together."""
    runtimes = [opener() for _ in range(count)]
    took: list[list[float]] = [[] for _ in range(count)]
    errors: list[EdgeFlameError] = []
    barrier = threading.Barrier(count + 1)

    def work(index: int) -> None:
        runtime, image = runtimes[index], images(runtimes[index], 1)
        try:
            for _ in range(5):
                runtime.score(image)
        except EdgeFlameError as exc:
            errors.append(exc)
        barrier.wait()
        until = time.perf_counter() + seconds
        while not errors and (start := time.perf_counter()) < until:
            runtime.score(image)
            took[index].append(time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [one for each in took for one in each], time.perf_counter() - begin


def images(runtime: Any, count: int) -> ImageU8:
    return np.random.default_rng(0).integers(0, 256, (count, *runtime.input_size, 3), dtype=np.uint8)


if __name__ == "__main__":
    sys.exit(main())
