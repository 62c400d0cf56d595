"""``edgeflame export``: a package's model for other runtimes, or its backbone for `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.output import cell, echo
from cli.paths import PATH
from edgeflame.errors import MissingDependencyError, UsageError, require_extra
from edgeflame.images import MAX_INPUT_SIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeflame.images import ImageU8
    from edgeflame.package import Package
    from edgeflame.tensorrt import EngineRecord


_MAX_COMPARED = 16
"""Calibration images on which int8 is held against float32."""


@click.command("export")
@click.option("--model", type=PATH, metavar="FILE", help="Model package.")
@click.option(
    "--onnx",
    "onnx_file",
    type=PATH,
    metavar="FILE",
    help="Write the scoring graph as an ONNX model.",
)
@click.option(
    "--backbone",
    "backbone_file",
    type=PATH,
    metavar="FILE",
    help="Write the backbone alone, for `fit --backbone-from` where PyTorch is not: the package's or, without --model, "
    "the one that PyTorch makes by --config and --size.",
)
@click.option("--config", type=PATH, help="With --backbone: TOML file of a learning's settings.")
@click.option(
    "--size", type=click.IntRange(32, MAX_INPUT_SIDE), help="With --backbone: side of its square input, in pixels."
)
@click.option("--trt", is_flag=True, help="Build TensorRT engines into the folder --out.")
@click.option("--out", type=PATH, metavar="DIR", help="Where engines and their report go.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the backbone; distances and scores are float32 in any.",
)
@click.option(
    "--calibration",
    type=PATH,
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
    model: Path | None,
    onnx_file: Path | None,
    backbone_file: Path | None,
    config: Path | None,
    size: int | None,
    trt: bool,
    out: Path | None,
    precision: Literal["fp32", "fp16", "int8"],
    calibration: Path | None,
    capabilities: tuple[str, ...],
    max_batch: int,
    kind: Literal["auto", "rtx", "tensorrt"],
    as_json: bool,
) -> None:
    """Write a package's model for runtimes other than EdgeFlame's own, or a backbone for `fit`.

    One graph from camera bytes to score: colour order, normalisation, backbone, distances, smoothing and
    maximum are inside; cropping and resizing are not.

    Engines for RTX GPUs are built on any machine; a Jetson or a data-centre GPU builds its own.
    """
    from edgeflame.package import read_package

    if sum((onnx_file is not None, backbone_file is not None, trt)) != 1 or (trt and out is None):
        raise UsageError("give either --onnx FILE, --trt with --out DIR, or --backbone FILE")
    if (config is not None or size is not None) and (backbone_file is None or model is not None):
        raise UsageError("--config and --size go with --backbone, for a backbone that PyTorch makes")
    if backbone_file is not None:
        _write_backbone(backbone_file, model, config, size)
        return
    if model is None:
        raise UsageError("--model FILE: which package")
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


def _write_backbone(path: Path, model: Path | None, config: Path | None, size: int | None) -> None:
    """Write the backbone of a package, or the one that PyTorch makes by a configuration."""
    from fitting.backbone import ExportedBackbone, open_backbone, write_backbone
    from fitting.embeddings import Embedder

    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder to write {path.name} into")
    embedder: Embedder
    if model is not None:
        with require_extra("cpu", "taking a backbone out of a package needs onnx"):
            from export.graph import cut_embedding_graph

        backbone, embedder = open_backbone(model, cut_embedding_graph)
    else:
        from edgeflame.config import load_config
        from edgeflame.methods import Learning

        learning = load_config(config, Learning, {"input": {"height": size, "width": size}})
        with require_extra("train", "making a backbone needs PyTorch; the one of a package, by --model, does not"):
            from export.network import embedding_graph_of
            from trainer.backbone import build_network
            from trainer.embedding import TorchEmbedder

        network, weights = build_network(learning.backbone, learning.input, seed=learning.seed)
        embedder = TorchEmbedder(network)
        backbone = ExportedBackbone(
            graph=embedding_graph_of(network, learning.input),
            backbone=learning.backbone,
            height=learning.input.height,
            width=learning.input.width,
            grid=network.grid,
            num_channels=network.num_channels,
            num_tapped_channels=network.num_tapped_channels,
            weights=weights,
            origin={},
        )
    write_backbone(path, backbone, embedder)
    chosen = backbone.backbone
    echo(
        f"{path}: {chosen.name}, {chosen.taps}, for images of {backbone.width}x{backbone.height}, "
        f"{path.stat().st_size / 1e6:.1f} MB; weights: {backbone.weights.source}"
    )


def _calibration_images(package: Package, folder: Path | None) -> ImageU8:
    """``[N, H, W, 3]`` as the graph takes them, from a folder or the package."""
    import numpy as np

    from edgeflame.dataset import open_dataset
    from edgeflame.errors import DataError
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
    echo(f"  image        uint8 [N, {size.height}, {size.width}, 3], BGR, {crop}resized by {size.resized_by}")
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
