"""``edgeflame model``: what a package is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeflame.package import Package


@click.group("model")
def command() -> None:
    """Look into model packages."""


@command.command("show")
@click.argument("package_file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show(package_file: Path, as_json: bool) -> None:
    """Verify a model package and say what it is, what its threshold promises, and where it comes from."""
    from edgeflame.console import print_json
    from edgeflame.package import read_package

    package = read_package(package_file)
    if as_json:
        print_json({"file": str(package_file), "sha256": package.sha256, "manifest": package.manifest})
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Names come from the package: they are text, never mark-up.
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(package, package_file):
        table.add_row(Text(name), Text(value))
    Console().print(table)


def _lines(package: Package, path: Path) -> list[tuple[str, str]]:
    manifest = package.manifest
    learning, threshold = manifest.learning, manifest.threshold
    given = learning.input
    region = (
        ""
        if given.roi is None
        else (f", of the region x {given.roi.x}, y {given.roi.y}, {given.roi.width}x{given.roi.height}")
    )
    parts = "parts" if threshold.groups_known else "images, each taken for a part of its own"
    promise = (
        f"with {threshold.confidence:.0%} confidence at most {threshold.false_reject_rate:.2%} of good parts score "
        f"higher ({threshold.num_groups} {parts})"
    )
    if threshold.requested_false_reject_rate < threshold.false_reject_rate:
        promise += f"; {threshold.requested_false_reject_rate:.2%} was asked for, which needs more parts"
    grid = f"{manifest.grid[1]}x{manifest.grid[0]}"
    return [
        ("package", f"{path}, {_megabytes(path.stat().st_size)}, format {manifest.format_version}"),
        ("sha256", package.sha256),
        ("product", manifest.product + ("" if manifest.site is None else f", site {manifest.site}")),
        ("created", f"{manifest.created} by EdgeFlame {manifest.edgeflame_version}"),
        ("method", learning.method),
        ("backbone", f"{learning.backbone.name}, stages {', '.join(map(str, learning.backbone.stages))}"),
        ("weights", f"{manifest.weights.source} (sha256 {manifest.weights.sha256[:12]})"),
        ("input", f"{given.width}x{given.height} BGR{region}"),
        (
            "statistics",
            f"{manifest.num_images} images: grid {grid}, {manifest.num_channels} channels, rank {manifest.rank}",
        ),
        ("threshold", f"{threshold.value:.6g}"),
        ("promise", promise),
        *[(f"· {name}", _short(value)) for name, value in manifest.provenance.items()],
    ]


def _short(value: Any) -> str:
    import msgspec

    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 400 else f"{text[:400]} ... (all of it: --json)"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
