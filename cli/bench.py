"""``edgeflame bench``: how fast a package is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from cli.output import echo
from cli.paths import PATH

if TYPE_CHECKING:
    from edge.runtimes.bench import BenchReport
    from edge.runtimes.load import LineDevice
    from edge.trace import TraceReport


@click.command("bench")
@click.option("--model", type=PATH, required=True, metavar="FILE", help="Model package.")
@click.option("--batch", "batches", type=click.IntRange(1, 256), multiple=True, help="Size.  [default: 1, 4, 16]")
@click.option("--seconds", type=click.FloatRange(0, 600), default=5.0, show_default=True, help="For each size, about.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "ort-tensorrt", "rtx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs it; auto takes the fastest that scores the reference images right.",
)
@click.option("--engines", type=PATH, metavar="DIR", help="Engines of `export --trt`.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: one a core]")
@click.option(
    "--trace",
    "address",
    metavar="ADDRESS",
    help="Inspect this source instead, as `edgeflame inspect --source`, and show where each frame's time goes.",
)
@click.option("--parts", type=click.IntRange(2, 100_000), default=300, show_default=True, help="To time, with --trace.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: Path,
    batches: tuple[int, ...],
    seconds: float,
    device: Literal["auto", "cpu", "cuda", "ort-tensorrt", "rtx", "tensorrt"],
    engines: Path | None,
    threads: int | None,
    address: str | None,
    parts: int,
    as_json: bool,
) -> None:
    """Time a package's graph on this machine, and its backbone alone for comparison, turn by turn.

    With --trace, time the whole way of a frame instead: camera, queue, resizing, score, verdict, disk. Nobody is told
    of these parts: nothing is published, no PLC is written.
    """
    import msgspec

    from cli.output import print_json

    if address is not None:
        _trace(model, address, parts, device, engines, threads, as_json=as_json)
        return
    from edge.runtimes.bench import run_bench
    from edge.runtimes.load import open_for_line
    from edgeflame.log import EventLog
    from edgeflame.package import read_package

    package = read_package(model)
    runtime, candidates = open_for_line(package, device=device, engines=engines, num_threads=threads)
    # An engine has no part that could be timed alone: its backbone is ONNX Runtime's.
    chosen = candidates[0].device if candidates else device
    report = run_bench(
        runtime,
        model_bytes=len(package.model_onnx),
        backbone_onnx=None if chosen in ("rtx", "tensorrt") else _backbone(package.model_onnx),
        batches=sorted(set(batches)) or (1, 4, 16),
        seconds=seconds,
        device=cast(Any, chosen),
        num_threads=threads,
        progress=lambda batch: EventLog("bench").info("timing", batch=batch, seconds=seconds),
    )
    report = msgspec.structs.replace(report, candidates=candidates)
    if as_json:
        print_json(report)
    else:
        _print_table(report)


def _trace(
    model: Path,
    address: str,
    parts: int,
    device: LineDevice,
    engines: Path | None,
    threads: int | None,
    *,
    as_json: bool,
) -> None:
    from cli.output import print_json
    from edge.inspector import InspectorLoader
    from edge.trace import run_trace

    report = run_trace(
        model, address, InspectorLoader(device=device, engines=engines, num_threads=threads), num_parts=parts
    )
    if as_json:
        print_json(report)
    else:
        _print_trace(report)


def _print_trace(report: TraceReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "p50 ms", "p90", "p99", "max", "median of each"):
        table.add_column(heading, justify="left" if heading in ("", "median of each") else "right")
    scale = _BAR / max(sum(one.p50_ms for one in report.hops), 1e-9)
    start = 0.0
    for one in report.hops:
        begin, end = round(start * scale), round((start + max(one.p50_ms, 0.0)) * scale)
        start += max(one.p50_ms, 0.0)
        figures = (one.p50_ms, one.p90_ms, one.p99_ms, one.max_ms)
        table.add_row(one.what, *(f"{value:.2f}" for value in figures), " " * begin + "█" * max(end - begin, 1))
    total = report.verdict
    table.add_section()
    table.add_row(total.hop, *(f"{value:.2f}" for value in (total.p50_ms, total.p90_ms, total.p99_ms, total.max_ms)))
    Console().print(table)
    echo(f"{report.num_parts} parts of {report.source}, {report.parts_per_s:.1f} a second, {report.dropped} dropped")


_BAR = 20
"""Columns of the bars together."""


def _backbone(model_onnx: bytes) -> bytes | None:
    """The backbone alone; None on a box without the library that cuts it out."""
    try:
        from export.precision import backbone_model
    except ImportError:
        echo("the backbone is not timed alone: that takes the Python package onnx", err=True)
        return None
    return backbone_model(model_onnx)


def _print_table(report: BenchReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "batch", "min ms", "p50", "p95", "p99", "max", "images/s", "calls"):
        table.add_column(heading, justify="left" if not heading else "right")
    for one in report.latencies:
        figures = (one.min_ms, one.p50_ms, one.p95_ms, one.p99_ms, one.max_ms)
        table.add_row(
            one.what,
            str(one.batch),
            *(f"{value:.2f}" for value in figures),
            f"{one.images_per_s:.0f}",
            str(one.num_calls),
        )
    console = Console()
    console.print(table)
    for batch in dict.fromkeys(one.batch for one in report.latencies):
        ratio = report.ratio(batch)
        if ratio is not None:
            echo(f"graph / backbone at batch {batch}: {ratio[0]:.2f} of medians, {ratio[1]:.2f} of minima")
    for candidate in report.candidates if len(report.candidates) > 1 else ():
        why = f"refused: {candidate.refused}" if candidate.median_ms is None else f"{candidate.median_ms:.2f} ms"
        echo(f"candidate {candidate.device}: {why}")
    threads = "one a core" if report.num_threads is None else str(report.num_threads)
    echo(
        f"{report.provider}, threads: {threads}, model {report.model_bytes / 1e6:.1f} MB, peak memory "
        f"{report.peak_memory_bytes / 1e6:.0f} MB"
    )
