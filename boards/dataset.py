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
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2

from boards.board import DEFECTS, MIN_IMAGE_SIZE, make_board
from boards.camera import Camera
from boards.surface import check_range, derive_seed, generator
from boards.textures import check_texture
from edgeflame.dataset import GROUPS_FILES
from edgeflame.errors import DataError
from edgeflame.images import ImageU8
from edgeflame.layout import GOOD
from edgeflame.state import storage_errors

# Five starting points in [0, 1], one for each defect, so that even one part of each kind spans the range.
_STAGGER = (0.4, 0.8, 0.2, 0.6, 0.0)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """All that decides a data set's bytes; ``dataset.json`` holds it.

    Attributes:
        texture: one of ``TEXTURES``.
        num_train_parts: good parts to train on, at least 1.
        num_test_good_parts: other good parts to test on.
        num_test_defective_parts: defective parts to test on, dealt out over the defects in turn and from faint to
            glaring.
        num_photos: photographs of each part, in other placement, light and noise; at least 1.
        image_size: side of the photographs in pixels.
        seed: which parts; data sets of different seeds share none.
        camera: what photographs them, by default a typical one.

    Raises:
        ValueError: a value is out of its range.
    """

    texture: str
    num_train_parts: int = 40
    num_test_good_parts: int = 20
    num_test_defective_parts: int = 40
    num_photos: int = 2
    image_size: int = 256
    seed: int = 0
    camera: Camera = field(default_factory=Camera)

    def __post_init__(self) -> None:
        check_texture(self.texture)
        check_range("num_train_parts", self.num_train_parts, 1)
        check_range("num_test_good_parts", self.num_test_good_parts, 0)
        check_range("num_test_defective_parts", self.num_test_defective_parts, 0)
        check_range("num_photos", self.num_photos, 1)
        check_range("image_size", self.image_size, MIN_IMAGE_SIZE)

    @property
    def num_parts(self) -> int:
        """All parts, to train and to test on."""
        return self.num_train_parts + self.num_test_good_parts + self.num_test_defective_parts


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

    def photographs(self, spec: DatasetSpec, camera: Camera) -> Iterator[tuple[str, ImageU8, ImageU8]]:
        """Make the part and photograph it: the stem, picture ``[S, S, 3]`` and mask ``[S, S]`` of each photograph."""
        board = make_board(
            texture=spec.texture,
            seed=self.seed,
            image_size=spec.image_size,
            defect=None if self.label == GOOD else self.label,
            severity=self.severity,
        )
        for photo, stem in enumerate(self.stems):
            yield stem, *camera.photograph(board, generator(self.seed, "photograph", photo))


def plan_parts(spec: DatasetSpec) -> Iterator[PlannedPart]:
    """All parts of a data set, training parts first."""

    def part(split: str, label: str, index: int, severity: float = 0.0) -> PlannedPart:
        return PlannedPart(
            group=f"{split}-{label}-{index:04d}",
            split=split,
            label=label,
            severity=severity,
            seed=derive_seed(spec.seed, "dataset", split, label, index),
            stems=tuple(f"{index:04d}-{photo}" for photo in range(spec.num_photos)),
        )

    yield from (part("train", GOOD, index) for index in range(spec.num_train_parts))
    yield from (part("test", GOOD, index) for index in range(spec.num_test_good_parts))
    for kind, defect in enumerate(DEFECTS):
        count = len(range(kind, spec.num_test_defective_parts, len(DEFECTS)))
        yield from (part("test", defect, index, defect_severity(kind, index, count)) for index in range(count))


def defect_severity(kind: int, index: int, count: int) -> float:
    """Severity of the ``index``-th of ``count`` parts with the ``kind``-th defect.

    The parts of a defect lie evenly over the range; defects are staggered. Over all defects the range from
    0 to 1 is covered evenly, both ends included.
    """
    steps = count * len(_STAGGER) - 1
    return round((index + _STAGGER[kind]) * len(_STAGGER) / steps, 4)


GENERATOR_VERSION = 1
"""Raised whenever the same arguments give other bytes than before."""

DATASET_FILE = "dataset.json"
GROUPS_FILE = GROUPS_FILES[0]

_STAGING = ".unfinished"

# Sensor noise hardly compresses: level 1 costs 3 % more bytes than 9 and a fraction of the time.
_PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)

PhotoProgress = Callable[[int, int], object]
"""Called with the number of photographs that are done, and of all."""


def write_dataset(out: Path, spec: DatasetSpec, *, progress: PhotoProgress | None = None) -> bool:
    """Write a data set; the same ``spec`` gives the same bytes.

    Args:
        out: a new or empty folder, or one that holds just this data set.
        spec: what to write.
        progress: called after each photograph.

    Returns:
        False if the folder held this data set already and was left as it was.

    Raises:
        DataError: the folder holds something else, or this data set with files missing or altered.
        StorageError: the folder cannot be read or written, or the disk is full.
    """
    with storage_errors(out, "keep a data set there"):
        if _is_complete(out, spec):
            if progress is not None:
                progress(spec.num_parts * spec.num_photos, spec.num_parts * spec.num_photos)
            return False
        was_there = out.exists()
        staging = out / _STAGING
        # Left behind by a run that was killed.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
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
    return True


def _is_complete(out: Path, spec: DatasetSpec) -> bool:
    """True if ``out`` holds this data set unaltered, False if it is new or empty.

    Raises:
        DataError: neither.
    """
    if out.is_file():
        raise DataError(f"{out}: expected a folder to write to, found a file; name another one")
    names = {entry.name for entry in out.iterdir()} - {_STAGING} if out.exists() else set()
    if not names:
        return False
    if DATASET_FILE not in names:
        raise DataError(
            f"{out}: expected a new or empty folder, found {min(names)!r} in it; name another one or empty it"
        )
    path = out / DATASET_FILE
    try:
        record = json.loads(path.read_bytes())
        made_from = record["generator_version"], record["spec"]
        hashes = {GROUPS_FILE: record["groups_sha256"]}
        for name, entry in record["files"].items():
            hashes[name] = entry["sha256"]
            if "mask" in entry:
                hashes[entry["mask"]] = entry["mask_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DataError(f"{path}: altered since it was generated; delete the folder to have it made anew") from exc
    if made_from != (GENERATOR_VERSION, asdict(spec)):
        raise DataError(f"{out}: holds a data set made with other arguments; name another folder or delete this one")
    for name, sha256 in hashes.items():
        if not (out / name).is_file() or hashlib.sha256((out / name).read_bytes()).hexdigest() != sha256:
            raise DataError(
                f"{out / name}: missing or altered since it was generated; delete the folder to have it made anew"
            )
    return True


def _write_files(root: Path, spec: DatasetSpec, progress: PhotoProgress | None) -> None:
    # MVTec readers expect the folders even of a split without images.
    for folder in ("train/good", "test/good", "ground_truth"):
        (root / folder).mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    for part in plan_parts(spec):
        for stem, image, mask in part.photographs(spec, spec.camera):
            name = f"{part.split}/{part.label}/{stem}.png"
            files[name] = {"group": part.group, "label": part.label, "sha256": _save(root / name, image)}
            if part.label != GOOD:
                mask_name = f"ground_truth/{part.label}/{stem}_mask.png"
                files[name] |= {
                    "severity": part.severity,
                    "mask": mask_name,
                    "mask_sha256": _save(root / mask_name, mask),
                }
            if progress is not None:
                progress(len(files), spec.num_parts * spec.num_photos)
    groups = "".join(["path,group\n", *(f"{name},{entry['group']}\n" for name, entry in files.items())]).encode()
    (root / GROUPS_FILE).write_bytes(groups)
    record = {
        "generator": "edgeflame.boards",
        "generator_version": GENERATOR_VERSION,
        "spec": asdict(spec),
        "groups_sha256": hashlib.sha256(groups).hexdigest(),
        "files": files,
    }
    (root / DATASET_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")


def _save(path: Path, pixels: ImageU8) -> str:
    """Write a PNG; the SHA-256 of its bytes."""
    encoded = cv2.imencode(".png", pixels, _PNG_OPTIONS)[1].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded)
    return hashlib.sha256(encoded).hexdigest()


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
        ValueError: a value is out of its range.
    """

    texture: str
    seed: int = 0
    camera: Camera = field(default_factory=Camera)
    defect_rate: float = 0.1
    num_parts: int | None = None
    image_size: int = 256

    def __post_init__(self) -> None:
        check_texture(self.texture)
        check_range("defect_rate", self.defect_rate, 0, 1)
        check_range("num_parts", self.num_parts or 0, 0)

    def __iter__(self) -> Iterator[StreamPart]:
        places = itertools.count() if self.num_parts is None else range(self.num_parts)
        return map(self.part, places)

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
