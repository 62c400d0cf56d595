"""``edgeflame export``: a package's model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.output import cell, echo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeflame.images import ImageU8
    from edgeflame.package import Package
    from edgeflame.tensorrt import EngineRecord


_MAX_COMPARED = 16
"""Calibration images on which int8 is held against float32."""


@click.command("export")
@click.option("--model", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Model package.")
@click.option(
    "--onnx",
    "onnx_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the scoring graph as an ONNX model.",
)
@click.option("--trt", is_flag=True, help="Build TensorRT engines into the folder --out.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where engines and their report go.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the backbone; distances and scores are float32 in any.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Good images of the line for int8, 32 or more.  [default: the package's reference images]",
)
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    help="GPU generation to build for; repeat for more.  [default: 8.6, 8.9, 12.0; on the device: its own]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 1024),
    default=8,
    show_default=True,
    help="Most images an engine takes at once.",
)
@click.option(
    "--tensorrt",
    "kind",
    type=click.Choice(["auto", "rtx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Which TensorRT builds, where both are installed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the build report as JSON.")
def command(
    model: Path,
    onnx_file: Path | None,
    trt: bool,
    out: Path | None,
    precision: Literal["fp32", "fp16", "int8"],
    calibration: Path | None,
    capabilities: tuple[str, ...],
    max_batch: int,
    kind: Literal["auto", "rtx", "tensorrt"],
    as_json: bool,
) -> None:
    """Write a package's model for runtimes other than EdgeFlame's own.

    One graph from camera bytes to score: colour order, normalisation, backbone, distances, smoothing and
    maximum are inside; cropping and resizing are not.

    Engines for RTX GPUs are built on any machine; a Jetson or a data-centre GPU builds its own.
    """
    from edgeflame.errors import MissingDependencyError, UsageError
    from edgeflame.package import read_package

    if (onnx_file is None) == (not trt) or (trt and out is None):
        raise UsageError("give either --onnx FILE or --trt with --out DIR")
    package = read_package(model)
    try:
        from edgeflame.state import atomic_write
        from export.onnx_file import onnx_with_metadata
    except ImportError as exc:
        raise MissingDependencyError(f"checking the graph needs onnx ({exc}): pip install 'edgeflame[train]'") from exc
    images = _calibration_images(package, calibration) if precision == "int8" else None
    data = onnx_with_metadata(package, precision, calibration=images, target="tensorrt" if trt else "cpu")
    if images is not None:
        _require_parity(package, data, images)
    if onnx_file is not None:
        atomic_write(onnx_file, data)
        _describe_onnx(onnx_file, package, size_bytes=len(data), precision=precision)
        return
    assert out is not None
    from edgeflame.tensorrt import load_tensorrt, select_capabilities
    from export.builder import fold_constants
    from export.trt import build_engines

    library = load_tensorrt(None if kind == "auto" else kind)
    records = build_engines(
        library,
        fold_constants(data),
        out,
        capabilities=select_capabilities(library, capabilities),
        precision=precision,
        max_batch=max_batch,
        package_sha256=package.sha256,
        started=lambda file: echo(f"building {file}", err=True),
    )
    if as_json:
        from cli.output import print_json

        print_json({"engines": records})
    else:
        _print_engines(records, out)


def _calibration_images(package: Package, folder: Path | None) -> ImageU8:
    """``[N, H, W, 3]`` as the graph takes them, from a folder or the package."""
    import numpy as np

    from edgeflame.dataset import open_dataset
    from edgeflame.errors import DataError, UsageError
    from edgeflame.package import evenly_spaced
    from export.int8 import MAX_CALIBRATION_IMAGES

    preprocessing = package.manifest.learning.input
    if folder is None:
        if not package.references:
            raise UsageError("int8 needs good images of the line, and the package holds none: give --calibration DIR")
        return np.stack([reference.image(preprocessing) for reference in package.references])
    dataset = open_dataset(folder)
    good = dataset.train or [record for record in dataset.test if record.is_good]
    if not good:
        raise DataError(f"{folder}: no good images to calibrate int8 with")
    chosen = [good[index] for index in evenly_spaced(len(good), MAX_CALIBRATION_IMAGES)]
    return np.stack([preprocessing.apply(preprocessing.read(record.path)) for record in chosen])


def _require_parity(package: Package, model_onnx: bytes, images: ImageU8) -> None:
    """The parity gate on the package's references and on some of the images it was calibrated on."""
    import dataclasses

    from edge.runtimes.load import open_runtime, require_parity
    from edgeflame.package import evenly_spaced, make_references

    some = images[list(evenly_spaced(len(images), _MAX_COMPARED))]
    by_itself = open_runtime(package.model_onnx, device="cpu").score(some)
    expected = make_references(some, by_itself.maps, by_itself.unsmoothed)
    whole = dataclasses.replace(package, references=(*package.references, *expected))
    report = require_parity(open_runtime(model_onnx, device="cpu"), whole)
    assert report.worst is not None
    echo(
        f"int8 scores {report.num_images} good images as the trained model does, to {report.worst:.1%} "
        f"({report.tolerance:.0%} allowed), and no verdict flips",
        err=True,
    )


def _describe_onnx(path: Path, package: Package, *, size_bytes: int, precision: str) -> None:
    manifest = package.manifest
    size, (height, width) = manifest.learning.input, manifest.grid
    roi = size.roi
    crop = "" if roi is None else f"cropped to {roi.width}x{roi.height}+{roi.x}+{roi.y}, "
    echo(f"{path}: {size_bytes / 1e6:.1f} MB, opset 18, {precision}, package {package.sha256[:12]}")
    echo(f"  image        uint8 [N, {size.height}, {size.width}, 3], BGR, {crop}resized with OpenCV's INTER_AREA")
    echo(f"  score        float32 [N]: a part is defective above {manifest.threshold.value:.6g}")
    echo(f"  anomaly_map  float32 [N, {height}, {width}]")


def _print_engines(records: Sequence[EngineRecord], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("file", "capability", "precision", "batch", "MB", "seconds"):
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    for record in records:
        table.add_row(
            cell(record.file),
            record.compute_capability,
            record.precision,
            f"1-{record.max_batch}",
            f"{record.size_bytes / 1e6:.1f}",
            "as it was" if record.reused else f"{record.build_s:.1f}",
        )
    # A file's name is for copying: it is not broken into lines, however narrow the terminal.
    console = Console(width=max(Console().width, 110))
    console.print(table)
    first = records[0]
    console.print(
        cell(
            f"{first.runtime} {first.runtime_version}, model {first.model_sha256[:12]} of package "
            f"{first.package_sha256[:12]}; report in {out / 'engines.json'}"
        ),
        soft_wrap=True,
    )
