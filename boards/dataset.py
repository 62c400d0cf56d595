"""Generated boards as a data set in the MVTec layout, and as an endless stream for the inspection daemon.

::

    OUT/train/good/0000-0.png                    part 0, photograph 0
    OUT/test/good/*.png
    OUT/test/<defect>/*.png
    OUT/ground_truth/<defect>/<stem>_mask.png    255 on the defect, 0 elsewhere
    OUT/groups.csv                               which photographs show the same part
    OUT/dataset.json                             what generated it: all arguments, severity and SHA-256 per file

Which parts a data set holds and where each photograph goes is decided before anything is drawn. A data set is
complete when ``dataset.json`` is there: the files are made in a hidden folder inside ``OUT`` and moved into place
at the end, ``dataset.json`` last. Asked again for what is already there, the writer checks the files against their
hashes and leaves them as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2

from boards.board import DEFECTS, MIN_IMAGE_SIZE, make_board
from boards.camera import Camera
from boards.surface import derive_seed, generator
from boards.textures import TEXTURES
from edgeflame.dataset import GOOD, GROUPS_FILES
from edgeflame.errors import DataError, StorageError
from edgeflame.images import ImageU8

# Five starting points in [0, 1], one for each defect, so that even one part of each kind spans the range.
_STAGGER = (0.4, 0.8, 0.2, 0.6, 0.0)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """All that decides a data set's bytes.

    Attributes:
        texture: one of ``TEXTURES``.
        num_train_parts: good parts to train on, at least 1.
        num_test_good_parts: good parts to test on.
        num_test_defective_parts: defective parts to test on, dealt out over the defects in turn.
        num_photos: photographs of each part, at least 1.
        image_size: side of the photographs in pixels.
        seed: which parts.
        camera: what photographs them.

    Raises:
        ValueError: a value out of its range.
    """

    texture: str
    num_train_parts: int
    num_test_good_parts: int
    num_test_defective_parts: int
    num_photos: int
    image_size: int
    seed: int
    camera: Camera

    def __post_init__(self) -> None:
        if self.texture not in TEXTURES:
            raise ValueError(f"no texture {self.texture!r}; there are {', '.join(TEXTURES)}")
        least = {
            "num_train_parts": 1,
            "num_test_good_parts": 0,
            "num_test_defective_parts": 0,
            "num_photos": 1,
            "image_size": MIN_IMAGE_SIZE,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"{name} is at least {low}, got {value}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``dataset.json`` holds them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """One part of a data set.

    Attributes:
        group: its name in ``groups.csv``, unique in the data set.
        split: ``train`` or ``test``.
        label: ``good`` or the defect.
        severity: 0 for a good part.
        seed: the board's.
        stems: its photographs' file names without the ending, unique in their folder.
    """

    group: str
    split: str
    label: str
    severity: float
    seed: int
    stems: tuple[str, ...]

    def image_name(self, photo: int) -> str:
        """Path of a photograph below the data set's root."""
        return f"{self.split}/{self.label}/{self.stems[photo]}.png"

    def mask_name(self, photo: int) -> str:
        """Path of its mask below the data set's root; good parts have none."""
        return f"ground_truth/{self.label}/{self.stems[photo]}_mask.png"


def plan_parts(spec: DatasetSpec) -> Iterator[PlannedPart]:
    """All parts of a data set, training parts first."""
    for index in range(spec.num_train_parts):
        yield _part(spec, "train", GOOD, index, 0.0)
    for index in range(spec.num_test_good_parts):
        yield _part(spec, "test", GOOD, index, 0.0)
    for kind, defect in enumerate(DEFECTS):
        count = len(range(kind, spec.num_test_defective_parts, len(DEFECTS)))
        for index in range(count):
            yield _part(spec, "test", defect, index, defect_severity(kind, index, count))


def defect_severity(kind: int, index: int, count: int) -> float:
    """Severity of the ``index``-th of ``count`` parts with the ``kind``-th defect.

    The parts of a defect lie evenly over the range; defects are staggered. Over all defects the range from
    0 to 1 is covered evenly, both ends included.
    """
    steps = count * len(_STAGGER) - 1
    return round((index + _STAGGER[kind]) * len(_STAGGER) / steps, 4)


def _part(spec: DatasetSpec, split: str, label: str, index: int, severity: float) -> PlannedPart:
    return PlannedPart(
        group=f"{split}-{label}-{index:04d}",
        split=split,
        label=label,
        severity=severity,
        seed=derive_seed(spec.seed, "dataset", split, label, index),
        stems=tuple(f"{index:04d}-{photo}" for photo in range(spec.num_photos)),
    )


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
        raise DataError(f"{out}: expected a folder to write to, found a file; name another one") from exc
    except OSError as exc:
        raise _unusable(out, exc) from exc
    if not entries:
        return False
    if DATASET_FILE not in entries:
        raise DataError(
            f"{out}: expected a new or empty folder, found {min(entries)!r} in it; name another one or empty it"
        )
    record = _read_record(out)
    if record.get("generator_version") != GENERATOR_VERSION or record.get("spec") != spec.as_dict():
        raise DataError(f"{out}: holds a data set made with other arguments; name another folder or delete this one")
    for name, sha256 in _recorded_hashes(out, record).items():
        if not _is_unaltered(out / name, sha256):
            raise DataError(
                f"{out / name}: missing or altered since it was generated; delete the folder to have it made anew"
            )
    return True


def _read_record(out: Path) -> dict[str, Any]:
    try:
        record = json.loads((out / DATASET_FILE).read_text(encoding="utf-8"))
    except OSError as exc:
        raise _unusable(out / DATASET_FILE, exc) from exc
    except ValueError as exc:
        raise DataError(f"{out / DATASET_FILE}: not readable as a record of generated boards ({exc})") from exc
    if not isinstance(record, dict):
        raise DataError(f"{out / DATASET_FILE}: not a record of generated boards")
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
        raise DataError(
            f"{out / DATASET_FILE}: altered since it was generated; delete the folder to have it made anew"
        ) from exc
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


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamPart:
    """One part as the camera saw it.

    Attributes:
        part_id: ``part-000000`` and so on.
        image_bgr: ``[S, S, 3]`` uint8.
        mask: ``[S, S]`` uint8, 255 on the defect; all 0 for a good part.
        label: ``good`` or the defect.
        severity: 0 for a good part.
    """

    part_id: str
    image_bgr: ImageU8
    mask: ImageU8
    label: str
    severity: float


@dataclass(frozen=True, kw_only=True)
class BoardStream:
    """Boards passing a camera, each photographed once; iterating again starts over with the same parts.

    A part depends on the seed and its place in the stream alone. Its seed is derived from the words "stream"
    and its number, that of a data set's part from "dataset", so the two share no board even when both are
    given the same ``seed``.

    Attributes:
        texture: one of ``TEXTURES``.
        seed: which parts.
        camera: of the site.
        defect_rate: probability that a part is defective, in ``[0, 1]``; defects and severities are then
            drawn uniformly.
        num_parts: after how many parts the stream ends; None for never.
        image_size: side of the pictures in pixels.

    Raises:
        ValueError: a value out of its range.
    """

    texture: str
    seed: int = 0
    camera: Camera = field(default_factory=Camera)
    defect_rate: float = 0.1
    num_parts: int | None = None
    image_size: int = 256

    def __post_init__(self) -> None:
        if self.texture not in TEXTURES:
            raise ValueError(f"no texture {self.texture!r}; there are {', '.join(TEXTURES)}")
        if not 0.0 <= self.defect_rate <= 1.0:
            raise ValueError(f"defect_rate lies between 0 and 1, got {self.defect_rate}")
        if self.num_parts is not None and self.num_parts < 0:
            raise ValueError(f"num_parts is at least 0, got {self.num_parts}")

    def __iter__(self) -> Iterator[StreamPart]:
        index = 0
        while self.num_parts is None or index < self.num_parts:
            yield self.part(index)
            index += 1

    def part(self, index: int) -> StreamPart:
        """The part at a place in the stream, from 0, without making those before it."""
        seed = self._part_seed(index)
        rng = generator(seed, "fate")
        # Always three draws, so that a part's defect does not depend on the rate.
        chance, kind, severity = rng.random(), int(rng.integers(len(DEFECTS))), round(float(rng.random()), 4)
        defect = DEFECTS[kind] if chance < self.defect_rate else None
        board = make_board(
            texture=self.texture, seed=seed, image_size=self.image_size, defect=defect, severity=severity
        )
        image, mask = self.camera.photograph(board, generator(seed, "photograph", 0))
        return StreamPart(
            part_id=f"part-{index:06d}",
            image_bgr=image,
            mask=mask,
            label=defect or GOOD,
            severity=severity if defect else 0.0,
        )

    def _part_seed(self, index: int) -> int:
        return derive_seed(self.seed, "stream", index)
