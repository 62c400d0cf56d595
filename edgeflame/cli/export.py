"""``edgeflame export``: a package's model for other runtimes."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.option("--model", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Model package.")
@click.option(
    "--onnx",
    "onnx_file",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Write the scoring graph as an ONNX model.",
)
def command(model: Path, onnx_file: Path) -> None:
    """Write a package's model for runtimes other than EdgeFlame's own.

    One graph from camera bytes to score: colour order, normalisation, backbone, distances, smoothing and
    maximum are inside; cropping and resizing are not.
    """
    from edgeflame.errors import MissingDependencyError
    from edgeflame.package import read_package

    package = read_package(model)
    try:
        from export.onnx_file import onnx_with_metadata, write_atomically
    except ImportError as exc:
        msg = f"checking the graph needs onnx ({exc}): pip install 'edgeflame[train]'"
        raise MissingDependencyError(msg) from exc
    data = onnx_with_metadata(package)
    write_atomically(onnx_file, data)

    manifest = package.manifest
    given, (height, width) = manifest.learning.input, manifest.grid
    crop = "" if given.roi is None else f"cropped to {given.roi.width}x{given.roi.height}+{given.roi.x}+{given.roi.y}, "
    click.echo(f"{onnx_file}: {len(data) / 1e6:.1f} MB, opset 18, package {package.sha256[:12]}")
    click.echo(
        f"  image        uint8 [N, {given.height}, {given.width}, 3], BGR, {crop}resized with OpenCV's INTER_AREA"
    )
    click.echo(f"  score        float32 [N]: a part is defective above {manifest.threshold.value:.6g}")
    click.echo(f"  anomaly_map  float32 [N, {height}, {width}]")
