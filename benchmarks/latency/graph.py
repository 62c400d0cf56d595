"""Latency of the scoring graph with the default settings, against its backbone alone; a table in Markdown.

Weights and statistics are random: they change no time.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import numpy as np
import onnxruntime

from edge.bench import BenchReport, measure
from edge.runtimes import open_runtime
from edgeflame.images import Preprocessing
from edgeflame.learning import Backbone
from edgeflame.statistics import LowRankGaussian
from export.backbone import backbone_model
from export.graph import scoring_graph
from trainer.backbone import build_network

SIDE, RANK, SIGMA = 256, 24, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "graph.md")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    graph = default_graph()
    report = measure(
        open_runtime(graph, device="cpu", num_threads=options.threads),
        model_bytes=len(graph),
        backbone_onnx=backbone_model(graph),
        batches=options.batch,
        seconds=options.seconds,
        device="cpu",
        num_threads=options.threads,
    )
    text = markdown(report)
    options.out.write_text(text)
    print(text)


def default_graph() -> bytes:
    """The graph that `edgeflame fit` makes with its default backbone, at rank 24."""
    preprocessing = Preprocessing(height=SIDE, width=SIDE)
    network, _ = build_network(Backbone(weights="random"), preprocessing, seed=0)
    positions, channels = network.grid[0] * network.grid[1], network.num_channels
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(positions, channels, RANK)))[0]
    statistics = LowRankGaussian(
        grid=network.grid,
        count=100,
        ridge=0.01,
        mean=rng.normal(size=(positions, channels)).astype(np.float32),
        basis=np.ascontiguousarray(basis, dtype=np.float32),
        eigenvalues=np.ones((positions, RANK), dtype=np.float32),
        residual=np.full(positions, 0.1, dtype=np.float32),
    )
    return scoring_graph(network, statistics, preprocessing=preprocessing, smoothing_sigma=SIGMA, metadata={})


def markdown(report: BenchReport) -> str:
    """The report as a table, with what it was measured on."""
    conditions = (
        f"{SIDE}x{SIDE}, rank {RANK}, {report.num_threads} threads, ONNX Runtime {onnxruntime.__version__} on "
        f"{platform.machine()} with {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end; model "
        f"{report.model_bytes / 1e6:.1f} MB."
    )
    lines = [
        conditions,
        "",
        "| batch | | min ms | p50 | p95 | p99 | max | calls | graph / backbone (medians, minima) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in report.latencies:
        ratio = report.ratio(one.batch) if one.what == "graph" else None
        figures = " | ".join(f"{v:.2f}" for v in (one.min_ms, one.p50_ms, one.p95_ms, one.p99_ms, one.max_ms))
        shown = "" if ratio is None else f"{ratio[0]:.2f}, {ratio[1]:.2f}"
        lines.append(f"| {one.batch} | {one.what} | {figures} | {one.num_calls} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
