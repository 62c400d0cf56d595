"""``edgeflame inspect``: judge the parts that pass a camera."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.output import echo
from cli.paths import PATH

if TYPE_CHECKING:
    from edge.cameras import Plan
    from edge.delivery.sinks import Sink
    from edge.status import Summary


@click.command("inspect")
@click.option(
    "--model",
    type=PATH,
    metavar="FILE",
    help="Model package, where the configuration has no [products].",
)
@click.option(
    "--public-key",
    type=PATH,
    metavar="FILE",
    help="Refuse a package that this key did not sign.",
)
@click.option(
    "--source",
    "address",
    metavar="SRC",
    help="Where the configuration has no [cameras]: folder of images, image, video file, watch:FOLDER for files as "
    "they arrive, camera:0, rtsp://..., gst:PIPELINE, csi:0, or generated boards: "
    "boards:TEXTURE?seed=0&parts=100&defect_rate=0.3&site=1&size=256&every=1.",
)
@click.option(
    "--config",
    type=PATH,
    metavar="FILE",
    help="TOML with the sections [products], [cameras.NAME], [verdict], [image_quality], [capture], [roi], [trigger], "
    "[parts], [drift], [self_test], [images], [outbox], [retry], [mqtt], [models], [webhook], [web], [modbus]; "
    "options given here win.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line a part on standard output.")
@click.option(
    "--threshold", type=float, metavar="X", help="Raw distance above which a part fails.  [default: the package's]"
)
@click.option(
    "--review-band",
    type=float,
    metavar="SHARE",
    help="Leave scores this near the threshold to a person: 0.1 is from 90% to 110% of it.",
)
@click.option("--results", type=PATH, metavar="FILE", help="Append the JSON lines to this file as well.")
@click.option(
    "--images",
    type=PATH,
    metavar="DIR",
    help="Keep pictures of failed and unknown parts here, with heat maps.",
)
@click.option("--rejects", type=PATH, hidden=True, help="The old name of --images.")
@click.option(
    "--summary",
    "summary_file",
    type=PATH,
    metavar="FILE",
    help="Write the summary of the run as JSON.",
)
@click.option(
    "--state",
    type=PATH,
    metavar="DIR",
    help="Keep every result here before it goes anywhere, and deliver it to [mqtt] and [webhook] until they have it.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Touch everything that this command line and configuration name, say what is wrong and what to do, and end.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after N parts.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "ort-tensorrt", "rtx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the model; one that cannot be had is an error. auto takes the fastest that scores the reference "
    "images right.",
)
@click.option(
    "--engines",
    type=PATH,
    metavar="DIR",
    help="Engines of `edgeflame export --trt`, for the devices rtx and tensorrt.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU cores, for one image or several at once.  [default: all]",
)
def command(
    model: Path | None,
    public_key: Path | None,
    address: str | None,
    config: Path | None,
    as_json: bool,
    threshold: float | None,
    review_band: float | None,
    results: Path | None,
    images: Path | None,
    rejects: Path | None,
    summary_file: Path | None,
    state: Path | None,
    check: bool,
    limit: int | None,
    device: str,
    engines: Path | None,
    threads: int | None,
) -> None:
    """Inspect parts: pass, fail, or unknown where something went wrong.

    An image that cannot be read or is no picture of a part gets the verdict "unknown" with the reason; none is
    skipped. Ctrl-C or SIGTERM ends the run after the part in hand, with the summary. The exit code is 0 when
    all was inspected, whatever the verdicts, and 130 when the run was stopped before its source ended. Cameras,
    streams and watched folders have no end: of them the code is 0 when the run was stopped.

    With --check nothing is inspected: cameras give one frame, models, broker, web service, PLC, page and folders are
    touched, and the exit code is 0 when all is well and 1 otherwise.

    With --state, results outlive a crash, a power cut and an outage of their destinations: what was not
    acknowledged is delivered after the next start.
    """
    from typing import cast

    from edge.cameras import Cameras, Overrides, plan_cameras
    from edge.config import InspectConfig
    from edge.daemon import run_inspection
    from edge.delivery.sinks import RejectsSink
    from edge.inspector import InspectorLoader
    from edge.memory import share_one_arena
    from edge.models.released import open_released_models
    from edge.runtimes.load import LineDevice
    from edge.systemd import handle_signals
    from edgeflame.config import load_config

    images = _images_folder(images, rejects)
    verdict = _verdict_options(threshold=threshold, review_band=review_band)

    def read_plan() -> Plan:
        return plan_cameras(
            load_config(config, InspectConfig, {"verdict": verdict}),
            model=model,
            source=address,
            product_of=lambda file: loader.package(file).manifest.product,
        )

    loader = InspectorLoader(
        device=cast(LineDevice, device), engines=engines, num_threads=threads, public_key=public_key, state=state
    )
    if check:
        from cli.output import print_findings
        from edge.check import check_daemon

        findings = list(check_daemon(read_plan, loader, state=state, images=images, file=config))
        print_findings(findings, as_json=as_json)
        return
    # Before the first threads, which would have arenas of their own.
    share_one_arena()
    plan = read_plan()
    loader.share_cores(len(plan.cameras))
    overrides = Overrides(state)
    models = open_released_models(plan, loader, state)
    if models is None:
        cameras = Cameras(plan, loader, overrides, state)
    else:
        cameras = models.open_cameras(lambda decided: Cameras(decided, loader, overrides, state))
    pictures = RejectsSink(images, plan.config.images) if images is not None else None
    sinks = _sinks(as_json=as_json, results=results)
    try:
        with handle_signals() as signals:
            summary = run_inspection(
                cameras,
                sinks,
                overrides=overrides,
                reread=read_plan,
                state=state,
                pictures=pictures,
                limit=limit,
                signals=signals,
                models=models,
            )
            stopped = signals.stop.is_set()
    finally:
        for sink in sinks:
            sink.close()
    _show(summary, as_json=as_json)
    if summary_file is not None:
        _write(summary_file, summary)
    if stopped and not all(worker.is_endless for worker in cameras.workers):
        raise KeyboardInterrupt


def _verdict_options(**given: float | None) -> dict[str, float | None]:
    """Options that win over a file's section ``[verdict]``, checked.

    Raises:
        UsageError: one of them is out of bounds.
    """
    from edge.config import VerdictConfig
    from edgeflame.config import parse_config
    from edgeflame.errors import ConfigError, UsageError

    try:
        parse_config(b"", VerdictConfig, "", given)
    except ConfigError as exc:
        raise UsageError(str(exc).replace(": ", "--", 1).replace("_", "-", 1)) from exc
    return given


def _images_folder(images: Path | None, rejects: Path | None) -> Path | None:
    """The folder for pictures; ``--rejects`` is the old name of the option.

    Raises:
        UsageError: both are given.
    """
    from edgeflame.errors import UsageError
    from edgeflame.log import EventLog

    if rejects is None:
        return images
    if images is not None:
        raise UsageError("--images and --rejects, its old name, are both given; leave --rejects out")
    EventLog("inspect").warning("old_option", option="--rejects", use="--images")
    return rejects


def _sinks(*, as_json: bool, results: Path | None) -> list[Sink]:
    from edge.delivery.sinks import ConsoleSink, JsonLinesSink, ResultsFileSink

    sinks: list[Sink] = []
    # The file first: what a reader of standard output has seen is then on disk as well.
    if results is not None:
        sinks.append(ResultsFileSink(results))
    if as_json:
        sinks.append(JsonLinesSink())
    else:
        from rich.console import Console

        sinks.append(ConsoleSink(Console()))
    return sinks


def _show(summary: Summary, *, as_json: bool) -> None:
    """For programs a log line, since standard output holds parts alone; for people a few lines of text."""
    from edgeflame.log import EventLog

    if as_json:
        truth = {} if summary.truth is None else {"right": summary.truth.right, "wrong": summary.truth.wrong}
        EventLog("inspect").info(
            "inspected",
            parts=summary.parts,
            passed=summary.passed,
            failed=summary.failed,
            unknown=summary.unknown,
            dropped=sum(summary.dropped.values()),
            missing=summary.counts.missing,
            duplicates=summary.counts.duplicates,
            late=summary.counts.late,
            latency_p95_ms=summary.latency_ms.p95 if summary.latency_ms else None,
            **truth,
        )
        return
    echo()
    echo(
        f"{summary.parts} parts in {summary.duration_s:.1f} s: {summary.passed} pass, {summary.failed} fail, "
        f"{summary.unknown} unknown"
    )
    for title, counts in (("reasons", summary.reasons), ("dropped frames", summary.dropped)):
        if counts:
            echo(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    fates = summary.counts
    handled = (
        (fates.triggers, "announced"),
        (fates.triggers_lost, "triggers not taken"),
        (fates.missing, "missing"),
        (fates.duplicates, "duplicate"),
        (fates.late, "late"),
    )
    if any(count for count, _ in handled):
        echo("parts: " + ", ".join(f"{count} {what}" for count, what in handled if count))
    if summary.latency_ms is not None:
        latency = summary.latency_ms
        echo(f"latency: p50 {latency.p50:.1f} ms, p95 {latency.p95:.1f} ms, p99 {latency.p99:.1f} ms")
    if summary.truth is not None:
        truth_counts = summary.truth
        echo(
            f"against the labels: {truth_counts.right} right, {truth_counts.wrong} wrong "
            f"({truth_counts.missed} missed, {truth_counts.false_rejects} false rejects), "
            f"{truth_counts.undecided} undecided"
        )
    if summary.evidence_lost:
        echo(f"pictures of {summary.evidence_lost} rejected parts could not be stored")
    for destination, count in summary.undelivered.items():
        echo(f"{count} results wait for {destination}; they are delivered after the next start")


def _write(path: Path, summary: Summary) -> None:
    import msgspec

    from edgeflame.errors import StorageError

    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    except OSError as exc:
        raise StorageError(f"{path}: the summary cannot be written ({exc.strerror})") from exc
