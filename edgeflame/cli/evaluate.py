"""``edgeflame evaluate``: how well a package tells good from defective."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from edgeflame.package import Manifest
    from trainer.evaluation import EvaluationReport


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The package (.edgeflame).")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Data set in the MVTec layout; its test folder is used.",
)
@click.option(
    "--groups",
    type=click.Path(path_type=Path),
    help="CSV that says which images show the same part.  [default: groups.csv or tiles.csv in the folder]",
)
@click.option(
    "--on-unreadable",
    type=click.Choice(["skip", "refuse"]),
    default="skip",
    show_default=True,
    help="Skip and count images that cannot be read, or stop at the first.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where it runs."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: Path,
    data: Path,
    groups: Path | None,
    on_unreadable: Literal["skip", "refuse"],
    device: Literal["auto", "cpu", "cuda"],
    as_json: bool,
) -> None:
    """Evaluate a package on test images: AUROC of images and pixels, and the verdicts at its threshold.

    The package's own graph is run, by the runtime of the line.
    """
    from edge.runtimes import check_runtime_fits, open_runtime
    from edgeflame.console import print_json, progress_bar
    from edgeflame.dataset import open_dataset
    from edgeflame.package import read_package

    package = read_package(model)
    dataset = open_dataset(data, groups)
    runtime = open_runtime(package.model_onnx, device=device)
    check_runtime_fits(runtime, package.manifest)

    from trainer.evaluation import evaluate

    with progress_bar("Evaluating") as progress:
        report = evaluate(
            runtime.score,
            dataset,
            package.manifest.learning.input,
            threshold=package.manifest.threshold.value,
            on_unreadable=on_unreadable,
            progress=progress,
        )
    if as_json:
        print_json(report)
    else:
        _print_tables(package.manifest, report, data)


def _print_tables(manifest: Manifest, report: EvaluationReport, data: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{manifest.product} ({manifest.learning.method}, rank {manifest.rank}) on {data}")
    for heading in ("", "images", "image AUROC", "pixel AUROC", "pixel AUPRO", "rejected"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, one in report.per_class.items():
        table.add_row(
            name,
            str(one.num_images),
            _figure(one.image_AUROC),
            _figure(one.pixel_AUROC),
            _figure(one.pixel_AUPRO),
            f"{one.caught} ({one.caught / one.num_images:.0%})",
        )
    table.add_section()
    table.add_row("mean of classes", "", _figure(report.macro_image_AUROC), _figure(report.macro_pixel_AUROC), "", "")
    table.add_row(
        "all defective",
        str(report.num_defective),
        _figure(report.image_AUROC),
        _figure(report.pixel_AUROC),
        _figure(report.pixel_AUPRO),
        _share(report.defective_caught, report.num_defective),
        style="bold",
    )
    table.add_row("good", str(report.num_good), "", "", "", _share(report.good_rejected, report.num_good))
    console = Console()
    console.print(table)
    if report.image_AUROC_interval is not None:
        low, high = report.image_AUROC_interval
        unit = "parts" if report.groups_known else "images (parts unknown)"
        console.print(f"image AUROC 95% interval {low:.3f} to {high:.3f}, by bootstrap over {report.num_groups} {unit}")
    console.print(f"image F1Max {_figure(report.image_F1Max)}, threshold {report.threshold:.4g}")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "–"
