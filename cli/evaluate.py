"""``edgeflame evaluate``: how well a package tells good from defective."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.options import dataset_options, device_option, json_option, model_option
from cli.output import echo, print_json, print_promises, print_threshold, progress_bar, reconcile
from cli.paths import PATH

if TYPE_CHECKING:
    from edgeflame.package import Manifest
    from fitting.evaluation import EvaluationReport, Interval


BARS = ("image_AUROC", "macro_image_AUROC", "pixel_AUROC", "macro_pixel_AUROC", "image_F1Max", "pixel_AUPRO")
"""Figures that ``--min-...`` may set a bar for."""


@click.command()
@model_option
@click.option(
    "--data",
    required=True,
    type=PATH,
    metavar="DIR",
    help="Data set in the MVTec layout; its test folder is used.",
)
@dataset_options
@device_option
@click.option(
    "--report",
    "report_dir",
    type=PATH,
    metavar="DIR",
    help="Write index.html there: curves, pictures and figures in one page, for people.",
)
@click.option("--min-image-auroc", type=click.FloatRange(0, 1), metavar="X", help="Exit with 1 below this.")
@click.option("--min-macro-image-auroc", type=click.FloatRange(0, 1), metavar="X", help="The same, mean of classes.")
@click.option("--min-pixel-auroc", type=click.FloatRange(0, 1), metavar="X", help="The same for pixels.")
@click.option("--min-macro-pixel-auroc", type=click.FloatRange(0, 1), metavar="X", help="The same, mean of classes.")
@click.option("--min-pixel-aupro", type=click.FloatRange(0, 1), metavar="X", help="The same for the regions' overlap.")
@click.option("--min-image-f1max", type=click.FloatRange(0, 1), metavar="X", help="The same for the highest F1.")
@json_option
def command(
    model: Path,
    data: Path,
    groups: Path | None,
    on_unreadable: Literal["skip", "refuse"],
    device: Literal["auto", "cpu", "cuda"],
    report_dir: Path | None,
    as_json: bool,
    **bars: float | None,
) -> None:
    """Evaluate a package on test images: AUROC, AUPRO and F1 with 95% intervals, and the verdicts at its threshold.

    The package's own graph is run, by the runtime of the line. With a bar that is not reached it exits with 1.
    """
    from edge.runtimes.interface import check_runtime_fits
    from edge.runtimes.load import open_runtime
    from edgeflame.dataset import open_dataset
    from edgeflame.package import read_package

    package = read_package(model)
    dataset = open_dataset(data, groups)
    if report_dir is not None:
        from cli.pages.page import prepare_report_folder

        prepare_report_folder(report_dir)
    runtime = open_runtime(package.model_onnx, device=device)
    manifest = package.manifest
    check_runtime_fits(runtime, manifest)

    from fitting.evaluation import compute_metrics, score_test_images

    with progress_bar("Evaluating") as progress:
        scored = score_test_images(
            lambda images: runtime.score(images).scores_and_shown(),
            dataset,
            manifest.learning.input,
            on_unreadable=on_unreadable,
            made_of=manifest.frames,
            progress=progress,
        )
    report = compute_metrics(
        scored,
        manifest.learning.input,
        threshold=manifest.threshold.value,
        groups_known=dataset.groups_known,
        promises=manifest.threshold.others,
    )
    if as_json:
        print_json(report)
    else:
        _print_tables(manifest, report, data)
        print_threshold(manifest.threshold)
        if (both := reconcile(manifest.threshold, report.good_rejected_interval)) is not None:
            echo(both)
        print_promises(manifest.threshold, scored.scores_of("good"), scored.defective_scores)
    if report_dir is not None:
        from cli.pages.evaluation import write_evaluation

        page = write_evaluation(
            report_dir, package=package, package_file=model, data=data, report=report, scored=scored
        )
        echo(f"report: {page}", err=as_json)
    _hold_bars(report, bars)


def _hold_bars(report: EvaluationReport, bars: dict[str, float | None]) -> None:
    """Refuse a model below a bar.

    Raises:
        NegativeAnswerError: a figure is lower than its bar, or not defined on this data.
    """
    from edgeflame.errors import NegativeAnswerError

    missed = []
    for name in BARS:
        bar, value = bars[f"min_{name.lower()}"], getattr(report, name)
        if bar is not None and (value is None or value < bar):
            missed.append(f"{name} is {'not defined on this data' if value is None else f'{value:.4f}'}, below {bar:g}")
    if missed:
        raise NegativeAnswerError("the bar is not reached: " + "; ".join(missed))


def _print_tables(manifest: Manifest, report: EvaluationReport, data: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{manifest.product} ({manifest.learning.method}, {manifest.size_in_words}) on {data}")
    for heading in ("", "images", "parts", "image AUROC", "pixel AUROC", "pixel AUPRO", "image F1Max", "rejected"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, one in report.per_class.items():
        table.add_row(
            name,
            str(one.num_images),
            str(one.num_groups),
            *(_figure(getattr(one, key), one.intervals.get(key)) for key in _COLUMNS),
            _share(one.caught, one.num_images),
        )
    table.add_section()
    macro = (f"macro_{key}" for key in _COLUMNS)
    table.add_row(
        "mean of classes",
        *("", ""),
        *(_figure(getattr(report, key), report.intervals.get(key)) for key in macro),
        "",
    )
    table.add_row(
        "all defective",
        *(str(report.num_defective), ""),
        *(_figure(getattr(report, key), report.intervals.get(key)) for key in _COLUMNS),
        _share(report.defective_caught, report.num_defective),
        style="bold",
    )
    table.add_row("good", str(report.num_good), *[""] * 5, _share(report.good_rejected, report.num_good))
    console = Console()
    Console(width=max(console.width, 140)).print(table)
    unit = "parts" if report.groups_known else "images (parts unknown, which makes the intervals too narrow)"
    echo(f"[ ]: 95% interval, {report.num_resamples} resamples of {report.num_groups} {unit}")
    for name, reason in report.without_interval.items():
        if getattr(report, name) is not None:
            echo(f"no interval for {name}: {reason}")


_COLUMNS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max")


def _figure(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if interval is None else f" [dim]\\[{interval[0]:.2f}, {interval[1]:.2f}][/dim]")


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "–"
