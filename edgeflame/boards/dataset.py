"""Writes generated boards as a data set in the MVTec layout.

::

    OUT/train/good/0000-0.png                    part 0, photograph 0
    OUT/test/good/*.png
    OUT/test/<defect>/*.png
    OUT/ground_truth/<defect>/<stem>_mask.png    255 on the defect, 0 elsewhere
    OUT/groups.csv                               which photographs show the same part
    OUT/dataset.json                             what generated it: all arguments, severity and SHA-256 per file

A data set is complete when ``dataset.json`` is there: the files are made in a hidden folder inside ``OUT`` and
moved into place at the end, ``dataset.json`` last. Asked again for what is already there, the writer checks
the files against their hashes and leaves them as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from edgeflame.boards.board import make_board
from edgeflame.boards.camera import Camera
from edgeflame.boards.plan import DatasetSpec, PlannedPart, plan_parts
from edgeflame.boards.seeds import generator
from edgeflame.dataset import GOOD, GROUPS_FILES
from edgeflame.errors import DataError, StorageError
from edgeflame.images import ImageU8

GENERATOR_VERSION = 1
"""Raised whenever the same arguments give other bytes than before."""

DATASET_FILE = "dataset.json"
GROUPS_FILE = GROUPS_FILES[0]

_STAGING = ".unfinished"

# Sensor noise hardly compresses: level 1 costs 3 % more bytes than 9 and a fraction of the time.
_PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)

PhotoProgress = Callable[[int, int], object]
"""Told how many photographs are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What lies in the folder now.

    Attributes:
        out: the folder.
        texture: of all its boards.
        num_parts: physical parts.
        num_train_images: good photographs to train on.
        num_test_good_images: good photographs to test on.
        num_test_defective_images: defective photographs, each with a mask.
        image_size: side of the photographs in pixels.
        seed: as given.
        reused: the folder held this data set already and was left as it was.
    """

    out: Path
    texture: str
    num_parts: int
    num_train_images: int
    num_test_good_images: int
    num_test_defective_images: int
    image_size: int
    seed: int
    reused: bool

    @property
    def num_images(self) -> int:
        """Photographs in all."""
        return self.num_train_images + self.num_test_good_images + self.num_test_defective_images


def write_dataset(
    out: Path,
    *,
    texture: str,
    num_train_parts: int = 40,
    num_test_good_parts: int = 20,
    num_test_defective_parts: int = 40,
    num_photos: int = 2,
    image_size: int = 256,
    seed: int = 0,
    camera: Camera | None = None,
    progress: PhotoProgress | None = None,
) -> DatasetSummary:
    """Write a data set; the same arguments give the same bytes.

    Args:
        out: a new or empty folder, or one that holds just this data set.
        texture: one of ``TEXTURES``.
        num_train_parts: good parts to train on.
        num_test_good_parts: other good parts to test on.
        num_test_defective_parts: defective parts, spread over the defects and from faint to glaring.
        num_photos: photographs of each part, in other placement, light and noise.
        image_size: side of the photographs in pixels.
        seed: which parts; other seeds share none with this one.
        camera: of the site, by default a typical one.
        progress: called after each photograph.

    Raises:
        DataError: the folder holds something else, or this data set with files missing or altered.
        StorageError: the folder cannot be read or written, or the disk is full.
        ValueError: an argument is out of its range.
    """
    spec = DatasetSpec(
        texture=texture,
        num_train_parts=num_train_parts,
        num_test_good_parts=num_test_good_parts,
        num_test_defective_parts=num_test_defective_parts,
        num_photos=num_photos,
        image_size=image_size,
        seed=seed,
        camera=camera or Camera(),
    )
    reused = _holds_already(out, spec)
    if not reused:
        _write_all(out, spec, progress)
    elif progress is not None:
        total = sum(len(part.stems) for part in plan_parts(spec))
        progress(total, total)
    return DatasetSummary(
        out=out,
        texture=texture,
        num_parts=num_train_parts + num_test_good_parts + num_test_defective_parts,
        num_train_images=num_train_parts * num_photos,
        num_test_good_images=num_test_good_parts * num_photos,
        num_test_defective_images=num_test_defective_parts * num_photos,
        image_size=image_size,
        seed=seed,
        reused=reused,
    )


def _holds_already(out: Path, spec: DatasetSpec) -> bool:
    """True if ``out`` holds this data set unharmed, False if it is free.

    Raises:
        DataError: neither.
    """
    try:
        entries = {entry.name for entry in out.iterdir()} - {_STAGING}
    except FileNotFoundError:
        return False
    except NotADirectoryError as exc:
        msg = f"{out}: expected a folder to write to, found a file; name another one"
        raise DataError(msg) from exc
    except OSError as exc:
        raise _unusable(out, exc) from exc
    if not entries:
        return False
    if DATASET_FILE not in entries:
        msg = f"{out}: expected a new or empty folder, found {min(entries)!r} in it; name another one or empty it"
        raise DataError(msg)
    record = _read_record(out)
    if record.get("generator_version") != GENERATOR_VERSION or record.get("spec") != spec.as_dict():
        msg = f"{out}: holds a data set made with other arguments; name another folder or delete this one"
        raise DataError(msg)
    for name, sha256 in _recorded_hashes(out, record).items():
        if not _is_unaltered(out / name, sha256):
            msg = f"{out / name}: missing or altered since it was generated; delete the folder to have it made anew"
            raise DataError(msg)
    return True


def _read_record(out: Path) -> dict[str, Any]:
    try:
        record = json.loads((out / DATASET_FILE).read_text(encoding="utf-8"))
    except OSError as exc:
        raise _unusable(out / DATASET_FILE, exc) from exc
    except ValueError as exc:
        msg = f"{out / DATASET_FILE}: not readable as a record of generated boards ({exc})"
        raise DataError(msg) from exc
    if not isinstance(record, dict):
        msg = f"{out / DATASET_FILE}: not a record of generated boards"
        raise DataError(msg)
    return record


def _recorded_hashes(out: Path, record: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file, by its path below ``out``."""
    try:
        hashes: dict[str, str] = {GROUPS_FILE: record["groups_sha256"]}
        for name, entry in record["files"].items():
            hashes[name] = entry["sha256"]
            if "mask" in entry:
                hashes[entry["mask"]] = entry["mask_sha256"]
    except (KeyError, TypeError, AttributeError) as exc:
        msg = f"{out / DATASET_FILE}: altered since it was generated; delete the folder to have it made anew"
        raise DataError(msg) from exc
    return hashes


def _is_unaltered(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise _unusable(path, exc) from exc


def _write_all(out: Path, spec: DatasetSpec, progress: PhotoProgress | None) -> None:
    staging = out / _STAGING
    was_there = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Left behind by a run that was killed.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            _write_files(staging, spec, progress)
            for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == DATASET_FILE):
                entry.rename(out / entry.name)
            staging.rmdir()
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if not was_there and not any(out.iterdir()):
                out.rmdir()
            raise
    except OSError as exc:
        raise _unusable(out, exc) from exc


def _write_files(root: Path, spec: DatasetSpec, progress: PhotoProgress | None) -> None:
    parts = list(plan_parts(spec))
    total = sum(len(part.stems) for part in parts)
    # MVTec readers expect the folders even of a split without images.
    for folder in ("train/good", "test/good", "ground_truth"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, entry in _photograph(root, part, spec):
            files[name] = entry
            if progress is not None:
                progress(len(files), total)
    rows = ["path,group", *(f"{name},{entry['group']}" for name, entry in files.items())]
    groups = ("\n".join(rows) + "\n").encode()
    (root / GROUPS_FILE).write_bytes(groups)
    record = {
        "generator": "edgeflame.boards",
        "generator_version": GENERATOR_VERSION,
        "spec": spec.as_dict(),
        "groups_sha256": hashlib.sha256(groups).hexdigest(),
        "files": files,
    }
    (root / DATASET_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")


def _photograph(root: Path, part: PlannedPart, spec: DatasetSpec) -> list[tuple[str, dict[str, Any]]]:
    """Make a part, photograph it, write the files; their names and entries in ``dataset.json``."""
    board = make_board(
        texture=spec.texture,
        seed=part.seed,
        image_size=spec.image_size,
        defect=None if part.label == GOOD else part.label,
        severity=part.severity,
    )
    written = []
    for photo in range(len(part.stems)):
        image, mask = spec.camera.photograph(board, generator(part.seed, "photograph", photo))
        name = part.image_name(photo)
        entry: dict[str, Any] = {"group": part.group, "label": part.label, "sha256": _save(root / name, image)}
        if part.label != GOOD:
            entry |= {
                "severity": part.severity,
                "mask": part.mask_name(photo),
                "mask_sha256": _save(root / part.mask_name(photo), mask),
            }
        written.append((name, entry))
    return written


def _save(path: Path, pixels: ImageU8) -> str:
    """Write a PNG; the SHA-256 of its bytes."""
    encoded = cv2.imencode(".png", pixels, _PNG_OPTIONS)[1].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded)
    return hashlib.sha256(encoded).hexdigest()


def _unusable(path: Path, exc: OSError) -> StorageError:
    return StorageError(f"{path}: cannot keep a data set there ({exc.strerror or exc})")
