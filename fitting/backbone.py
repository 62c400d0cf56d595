"""A backbone as ONNX, ready to embed: what `fit` needs where nothing is trained, and PyTorch is not.

It is taken from a model package, whose graph begins with it, or read from a file of its own, which
``edgeflame export --backbone`` writes:

    manifest.json    which network it is, for which input, where its weights came from, and what it makes of a picture
    backbone.onnx    uint8 images in, embeddings out

Before anything is fitted with it, what runs it here is checked: it must embed the reference images of the package as
the model that was trained, or the picture as the machine that wrote the file.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from edgeflame import __version__
from edgeflame.archive import open_archive, write_archive
from edgeflame.cpus import usable_cpus
from edgeflame.errors import ConfigError, EdgeFlameError, PackageError, RuntimeUnavailableError, UsageError
from edgeflame.images import ImageU8, printable_name
from edgeflame.log import EventLog
from edgeflame.methods import METHODS, Backbone, Learning
from edgeflame.onnx_session import CPU, Device, failures_of, first_line, import_library, open_session
from edgeflame.package import (
    FORMAT,
    MANIFEST_MEMBER,
    MAX_MANIFEST_BYTES,
    Package,
    WeightsOrigin,
    evenly_spaced,
    read_package,
)
from edgeflame.scoring_graph import EMBEDDINGS, INPUT
from edgeflame.tensors import F32
from fitting.embeddings import Embedder
from fitting.packaging import score_references

log = EventLog("backbone")

BACKBONE_FORMAT = "edgeflame-backbone"
BACKBONE_FORMAT_VERSION = 1
BACKBONE_MEMBER = "backbone.onnx"
_MAX_BACKBONE_BYTES = 1 << 30

TOLERANCE = 0.005
"""Largest relative difference from what PyTorch makes of the same picture: the parity gate's for float32."""

IMAGES_PER_CORE = 4
"""Images embedded at a time on a CPU, for each core: enough for none to wait long for the last one."""

GPU_BATCH = 16

MAX_CHECKED = 4
"""Reference images of a package that are embedded to check what runs it."""


class CutFunction(Protocol):
    """Takes the way to the embeddings out of a package's graph: ``export.graph.cut_embedding_graph``."""

    def __call__(self, model_onnx: bytes, *, num_positions: int, num_channels: int) -> bytes: ...


class BackboneManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backbone's file says about it."""

    format: str = BACKBONE_FORMAT
    format_version: int = BACKBONE_FORMAT_VERSION
    edgeflame_version: str = __version__
    created: str
    """UTC, ISO 8601."""
    backbone: Backbone
    height: int
    """Of the images it takes, pixels."""
    width: int
    grid: tuple[int, int]
    num_channels: int
    num_tapped_channels: int
    """Of its maps before their projection."""
    weights: WeightsOrigin
    expected: tuple[float, ...]
    """What it makes of :func:`check_picture`: the mean of each channel."""
    sha256: str
    """Of the graph."""


@dataclass(frozen=True, kw_only=True)
class ExportedBackbone:
    """A backbone as ONNX.

    Attributes:
        graph: ``image [N, height, width, 3]`` uint8 BGR to ``EMBEDDINGS [P, N, C]``.
        backbone: its configuration.
        height: of the images, pixels.
        width: likewise.
        grid: rows and columns of the P positions.
        num_channels: C.
        num_tapped_channels: of its maps before their projection.
        weights: where its weights came from.
        origin: what it was taken from, for a package's provenance.
    """

    graph: bytes
    backbone: Backbone
    height: int
    width: int
    grid: tuple[int, int]
    num_channels: int
    num_tapped_channels: int
    weights: WeightsOrigin
    origin: dict[str, str]

    def settings(self) -> dict[str, Any]:
        """The settings of a learning that follow from it, as a file would give them."""
        return {"backbone": msgspec.to_builtins(self.backbone), "input": {"height": self.height, "width": self.width}}

    def require_fits(self, learning: Learning) -> None:
        """Refuse a learning by other settings than :meth:`settings`, or one that trains.

        Raises:
            UsageError: its method learns more than statistics.
            ConfigError: it asks for another backbone, or another size of its input.
        """
        if METHODS[learning.method].learns:
            raise UsageError(
                f"--backbone-from and --prior take a backbone as it is; method {learning.method} learns more than "
                "statistics, by PyTorch and from backbone.weights: leave one of both out"
            )
        for section, wanted in self.settings().items():
            asked = msgspec.to_builtins(getattr(learning, section))
            for key, value in wanted.items():
                if asked[key] != value:
                    raise ConfigError(
                        f"{section}.{key} is {asked[key]}, but the backbone of {self.origin['file']} is made for "
                        f"{value}: leave the setting out, or have `edgeflame export --backbone` make one for it"
                    )


class OnnxEmbedder:
    """A backbone in ONNX Runtime; implements :class:`fitting.embeddings.Embedder`.

    On a CPU every core has an image of its own, which is faster than all cores together on one after another, and does
    not stand still where one of the cores has other work.

    Args:
        backbone: the backbone.
        device: where it runs.

    Raises:
        PackageError: its graph cannot be loaded.
        RuntimeUnavailableError: the device cannot be used.
        MissingDependencyError: ONNX Runtime is not installed.
    """

    def __init__(self, backbone: ExportedBackbone, *, device: Device = "auto") -> None:
        self.grid = backbone.grid
        self.num_channels = backbone.num_channels
        self.num_tapped_channels = backbone.num_tapped_channels
        self._session = open_session(backbone.graph, device=device, num_threads=1)
        on_cpu = self._session.get_providers()[0] == CPU
        self._workers = usable_cpus() if on_cpu else 1
        self.forward_size = IMAGES_PER_CORE * self._workers if on_cpu else GPU_BATCH
        self._failures = failures_of(import_library())
        (output,) = (node for node in self._session.get_outputs() if node.name == EMBEDDINGS)
        expected = self.grid[0] * self.grid[1], self.num_channels
        if (output.shape[0], output.shape[2]) != expected:
            raise PackageError(f"the backbone's graph gives {output.shape}, its manifest says {list(expected)}")

    def embed(self, images: ImageU8) -> F32:
        if self._workers == 1:
            return self._run(images)
        with ThreadPoolExecutor(min(self._workers, len(images)), thread_name_prefix="embedding") as pool:
            return np.concatenate(list(pool.map(self._run, images[:, None])))

    def _run(self, images: ImageU8) -> F32:
        try:
            (embeddings,) = self._session.run([EMBEDDINGS], {INPUT: images})
        except self._failures as exc:
            raise RuntimeUnavailableError(
                f"ONNX Runtime failed on a batch of {len(images)} ({first_line(exc)})"
            ) from exc
        by_image: F32 = embeddings.transpose(1, 0, 2)
        return by_image


def check_picture(height: int, width: int) -> ImageU8:
    """A picture ``[height, width, 3]`` that every machine makes alike, with smooth and with fine structure."""
    rows, columns, colour = np.ogrid[:height, :width, :3]
    ramp = 60 + rows * 90 // height + columns * 60 // width + colour * 15
    texture = (rows * rows * 3 + rows * columns * 5 + columns * 7 + colour * 11) % 31
    picture: ImageU8 = (ramp + texture).astype(np.uint8)
    return picture


def channel_means(embedder: Embedder, height: int, width: int) -> tuple[float, ...]:
    """What an embedder makes of :func:`check_picture`: the mean of each of its C channels."""
    means = embedder.embed(check_picture(height, width)[None])[0].mean(axis=0, dtype=np.float64)
    return tuple(float(one) for one in means)


def write_backbone(path: Path, backbone: ExportedBackbone, embedder: Embedder) -> BackboneManifest:
    """Write a backbone as a file of its own, whole or not at all.

    Args:
        path: the file.
        backbone: the backbone.
        embedder: what is trusted to run it: whatever runs the file later must give what this gives.

    Raises:
        StorageError: it cannot be written.
    """
    manifest = BackboneManifest(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        backbone=backbone.backbone,
        height=backbone.height,
        width=backbone.width,
        grid=backbone.grid,
        num_channels=backbone.num_channels,
        num_tapped_channels=backbone.num_tapped_channels,
        weights=backbone.weights,
        expected=channel_means(embedder, backbone.height, backbone.width),
        sha256=hashlib.sha256(backbone.graph).hexdigest(),
    )
    document = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_archive(path, {MANIFEST_MEMBER: document, BACKBONE_MEMBER: backbone.graph})
    return manifest


def open_backbone(path: Path, cut: CutFunction, *, device: Device = "auto") -> tuple[ExportedBackbone, OnnxEmbedder]:
    """Read a backbone from a package or a file of its own, load it, and check what runs it here.

    Args:
        path: a package, or what :func:`write_backbone` wrote.
        cut: takes it out of a package's graph.
        device: where it is to run.

    Raises:
        PackageError: neither of both, damaged, or of a format that this version does not read.
        RuntimeUnavailableError: what runs here embeds otherwise than the model that was trained.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    with open_archive(path) as archive:
        document = archive.read_small(MANIFEST_MEMBER, MAX_MANIFEST_BYTES)
        if _format_of(document) == FORMAT:
            return _from_package(path, cut, device)
        manifest = _decode_manifest(path, document)
        graph = archive.read(BACKBONE_MEMBER, sha256=manifest.sha256, max_bytes=_MAX_BACKBONE_BYTES)
        sha256 = archive.file_sha256()
    backbone = ExportedBackbone(
        graph=graph,
        backbone=manifest.backbone,
        height=manifest.height,
        width=manifest.width,
        grid=manifest.grid,
        num_channels=manifest.num_channels,
        num_tapped_channels=manifest.num_tapped_channels,
        weights=manifest.weights,
        origin={"file": printable_name(path.name), "sha256": sha256},
    )
    embedder = OnnxEmbedder(backbone, device=device)
    expected = np.array(manifest.expected)
    found = np.array(channel_means(embedder, manifest.height, manifest.width))
    scale = float(np.sqrt(np.mean(np.square(expected))))
    _require_parity(path, float(np.abs(found - expected).max()) / max(scale, 1e-12))
    return backbone, embedder


def _from_package(path: Path, cut: CutFunction, device: Device) -> tuple[ExportedBackbone, OnnxEmbedder]:
    package = read_package(path)
    manifest = package.manifest
    grid, learning = manifest.grid, manifest.learning
    statistics = manifest.provenance.get("statistics")
    tapped = statistics.get("channels_before_projection") if isinstance(statistics, dict) else None
    graph = cut(package.model_onnx, num_positions=grid[0] * grid[1], num_channels=manifest.num_channels)
    weights = manifest.weights
    if METHODS[learning.method].objective is not None:
        # What the manifest names is what it was before its training.
        weights = WeightsOrigin(
            source=f"trained by {learning.method}, package {package.sha256[:12]}",
            sha256=hashlib.sha256(graph).hexdigest(),
        )
    backbone = ExportedBackbone(
        graph=graph,
        backbone=learning.backbone,
        height=learning.input.height,
        width=learning.input.width,
        grid=grid,
        num_channels=manifest.num_channels,
        num_tapped_channels=tapped if isinstance(tapped, int) else manifest.num_channels,
        weights=weights,
        origin={"file": printable_name(path.name), "sha256": package.sha256, "product": manifest.product},
    )
    embedder = OnnxEmbedder(backbone, device=device)
    _check_by_references(path, package, embedder)
    return backbone, embedder


def _check_by_references(path: Path, package: Package, embedder: OnnxEmbedder) -> None:
    """Score the package's reference images by its own statistics, and compare."""
    learning = package.manifest.learning
    if not package.references:
        log.warning(
            "backbone_not_checked",
            package=str(path),
            consequence="it holds no reference images, by which it would show that this machine embeds as PyTorch did",
        )
        return
    chosen = [package.references[index] for index in evenly_spaced(len(package.references), MAX_CHECKED)]
    images = np.stack([one.image(learning.input) for one in chosen])
    smoothing = learning.scoring.smoothing_sigma
    found = score_references(embedder, package.statistics, images, smoothing_sigma=smoothing, head=package.head)
    worst = 0.0
    for got, wanted in zip(found, chosen, strict=True):
        for one, other in (
            (got.expected.score, wanted.expected.score),
            (got.expected.map_mean, wanted.expected.map_mean),
        ):
            difference = abs(one - other) / max(abs(other), 1e-12)
            worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    _require_parity(path, worst)


def _require_parity(path: Path, worst: float) -> None:
    # Against NaN every comparison is false.
    if not worst <= TOLERANCE:
        raise RuntimeUnavailableError(
            f"{path}: ONNX Runtime gives other embeddings here than PyTorch did where the backbone came from "
            f"({worst:.1%} off, {TOLERANCE:.1%} allowed); try --device cpu, or another version of ONNX Runtime"
        )


def _format_of(document: bytes | None) -> object:
    try:
        return msgspec.json.decode(document or b"", type=dict[str, Any]).get("format")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _decode_manifest(path: Path, document: bytes | None) -> BackboneManifest:
    found = _format_of(document)
    if document is None or found != BACKBONE_FORMAT:
        raise PackageError(f"{path}: neither a model package nor a backbone of `edgeflame export --backbone`")
    try:
        manifest = msgspec.json.decode(document, type=BackboneManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError, RecursionError) as exc:
        raise PackageError(f"{path}: its {MANIFEST_MEMBER} is wrong ({exc})") from exc
    if manifest.format_version != BACKBONE_FORMAT_VERSION:
        raise PackageError(
            f"{path}: backbone format {manifest.format_version}, this EdgeFlame {__version__} reads "
            f"{BACKBONE_FORMAT_VERSION}; use the version that wrote it ({manifest.edgeflame_version[:20]}) or a newer"
        )
    return manifest
