"""Data sets as folders: the MVTec layout, or a plain folder of good images.

MVTec layout::

    ROOT/train/good/*.png                     good images to train on
    ROOT/test/good/*.png                      good images to test on
    ROOT/test/<defect>/*.png                  defective ones
    ROOT/ground_truth/<defect>/<stem>_mask.png  their masks (optional, per image)
    ROOT/groups.csv                           which photographs show the same part (optional)

Any other folder is read as good images to train on, subfolders included, as far as their names allow it: see
``edgeflame.layout``. Names of folders may be written in any case of letters.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgeflame.errors import DataError
from edgeflame.fitted_images import image_digest
from edgeflame.frame_sizes import FrameSizes
from edgeflame.image_quality import picture_faults
from edgeflame.images import (
    IMAGE_SUFFIXES,
    LISTED_SUFFIXES,
    LITTLE_USED,
    ImageU8,
    Preprocessing,
    printable_name,
    share_of_range,
)
from edgeflame.layout import GOOD, FolderLayout, read_defects, read_layout
from edgeflame.log import EventLog
from edgeflame.state import atomic_write

log = EventLog("dataset")

GROUPS_FILES = ("groups.csv", "tiles.csv")
"""Looked for in this order in the data set's root when no groups file is named."""

BITS_ADVICE = "samples of 10 or 12 bits in files of 16? set input.bits of fit; otherwise see to light and exposure"

_UNGROUPED = "file:"
"""Before the name of a photograph that is a part of its own; it keeps such parts from those of a groups file."""

UnreadablePolicy = Literal["skip", "refuse"]


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image file.

    Attributes:
        path: the file.
        name: its path below the data set's root, with forward slashes; bytes that are not UTF-8 are escaped.
        label: ``good`` or the name of the defect.
        group: the physical part it shows; photographs of one part are not independent.
        mask: the file of its defect mask, or None.
        is_cropped: whether it shows the region of interest alone.
    """

    path: Path
    name: str
    label: str
    group: str
    mask: Path | None = None
    is_cropped: bool = False

    @property
    def is_good(self) -> bool:
        return self.label == GOOD


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The images of a folder, sorted by name.

    Attributes:
        root: the folder.
        train: good images.
        test: good and defective images; empty for a plain folder.
        groups_known: whether a groups file said which photographs show the same part. If not, every
            photograph counts as a part of its own, and figures that rest on independence are optimistic.
    """

    root: Path
    train: tuple[ImageRecord, ...]
    test: tuple[ImageRecord, ...]
    groups_known: bool


def open_dataset(root: Path, groups_file: Path | None = None) -> Dataset:
    """Find the images below ``root``; no image is opened.

    Args:
        root: a folder in the MVTec layout or a plain folder of good images.
        groups_file: CSV with a header, the image's path (below ``root``) in the first column and its part in
            the second. Default: ``groups.csv`` or ``tiles.csv`` in ``root``, if there.

    Raises:
        DataError: the folder is not there or holds no image, its name or what lies below it says that it is not what
            is meant (see :func:`edgeflame.layout.read_layout`), or the groups file is wrong.
    """
    return _open(root, groups_file, read_layout, "good images")


def open_defects(root: Path, groups_file: Path | None = None) -> Dataset:
    """Find the labelled defects below ``root``, as the ``test`` of a data set; no image is opened.

    Args:
        root: a data set in the MVTec layout, its test folder, another folder of classes, or a folder of defects.
        groups_file: see :func:`open_dataset`.

    Raises:
        DataError: the folder is not there or holds no labelled defect (see :func:`edgeflame.layout.read_defects`), or
            the groups file is wrong.
    """
    return _open(root, groups_file, read_defects, "images of labelled defects")


def _open(
    root: Path, groups_file: Path | None, read: Callable[[Path, Sequence[Path]], FolderLayout], wanted: str
) -> Dataset:
    files = list_images(root)
    groups = _read_groups(root, groups_file)
    layout = read(root, files)
    for folder, count in sorted(layout.left_out.items()):
        log.warning("folder_left_out", folder=folder, images=count, data=str(root))
    train = [_record(root, path, GOOD, groups, layout) for path in layout.train]
    test = [_record(root, path, label, groups, layout) for path, label in layout.test]
    if not train and not test:
        folders = ", ".join(sorted(layout.left_out))
        said = f": the names of its folders say that these are not: {folders}" if folders else ""
        raise DataError(f"{root}: no {wanted}{said}")
    if groups:
        missing = [record.name for record in (*train, *test) if record.name not in groups]
        if len(missing) == len(train) + len(test):
            raise DataError(
                f"{root}: no image is in the groups file; paths such as {missing[0]} are expected, it has "
                f"{next(iter(groups))}"
            )
        if missing:
            log.warning("images_without_group", count=len(missing), first=missing[0])
    return Dataset(root=root, train=tuple(train), test=tuple(test), groups_known=bool(groups))


@dataclass
class LoadReport:
    """What happened while images were read: counts, names of those left out, digests of the others."""

    num_read: int = 0
    unreadable: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    digests: dict[Path, bytes] = field(default_factory=dict)
    unfit: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Images that a line would not judge, and its reasons."""
    made_of: FrameSizes | None = None
    """Of the photographs that the model at hand was made of, where there is one that says so."""
    most_used: float = 0.0
    """Largest share of the range of samples that an image uses."""

    def log_summary(self) -> None:
        """Say once, as log lines, what a user should know about the images just read."""
        if self.unreadable:
            log.warning("unreadable_images_skipped", count=len(self.unreadable), first=self.unreadable[0])
        if len(self.sizes) > 1:
            common = ", ".join(f"{w}x{h}: {n}" for (w, h), n in self.sizes.most_common(3))
            log.warning("mixed_image_sizes", sizes=len(self.sizes), most_common=common, all_resized=True)
        if self.unfit:
            name, reasons = next(iter(self.unfit.items()))
            log.warning(
                "images_a_line_would_not_judge",
                count=len(self.unfit),
                of=self.num_read,
                first=name,
                reasons=",".join(reasons),
                advice="take them out; where all good parts look so, see to light and exposure",
            )
        others = {size: count for size, count in self.sizes.items() if self.made_of and not self.made_of.has(*size)}
        if others:
            width, height = next(iter(others))
            log.warning(
                "images_of_another_size",
                count=sum(others.values()),
                such_as=f"{width}x{height}",
                model_made_of=str(self.made_of),
                consequence="a line would not judge them (image_quality.frame_size)",
            )
        if self.num_read and self.most_used <= LITTLE_USED:
            log.warning("little_of_range_used", most=round(self.most_used, 4), images=self.num_read, advice=BITS_ADVICE)


def load_images(
    records: Sequence[ImageRecord],
    preprocessing: Preprocessing,
    *,
    on_unreadable: UnreadablePolicy = "skip",
    report: LoadReport | None = None,
) -> Iterator[tuple[ImageRecord, ImageU8]]:
    """Read and pre-process images one after another.

    An unreadable image is named in the log and skipped, or refused: ``on_unreadable``.

    Yields:
        The record and its image ``[height, width, 3]`` uint8, BGR.

    Raises:
        DataError: an image is unreadable and ``on_unreadable`` is ``refuse``.
    """
    report = report if report is not None else LoadReport()
    for record in records:
        try:
            frame = preprocessing.read(record.path)
        except DataError as exc:
            if on_unreadable == "refuse":
                raise
            report.unreadable.append(record.name)
            log.warning("unreadable_image", image=record.name, reason=str(exc))
            continue
        report.num_read += 1
        report.sizes[(frame.shape[1], frame.shape[0])] += 1
        report.digests[record.path] = image_digest(frame)
        report.most_used = max(report.most_used, share_of_range(frame, preprocessing.sample_bits))
        try:
            image = (preprocessing.without_roi() if record.is_cropped else preprocessing).apply(frame)
        except DataError as exc:
            raise DataError(f"{record.name}: {exc}") from exc
        faults = picture_faults(image)
        if faults:
            report.unfit[record.name] = faults
        yield record, image


def list_images(folder: Path) -> list[Path]:
    """All image files of a folder and its subfolders, sorted by path.

    Raises:
        DataError: the folder is not there or holds no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder}: no images found (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


_TOOLS_OWN = frozenset({"__MACOSX", "@eaDir"})
"""Folders of thumbnails and the like, which archives and file servers leave behind."""


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, sorted by path, perhaps none; each folder once, however many links lead to it.

    Those of formats that are not read are among them, so that they are named and counted as unreadable.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def refuse(exc: OSError) -> None:
        raise DataError(f"{exc.filename}: the folder cannot be read ({exc.strerror})") from exc

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _TOOLS_OWN)
        for name in files:
            path = Path(parent, name)
            if path.suffix.lower() in LISTED_SUFFIXES and not name.startswith("."):
                found.append(path)
    return sorted(found)


def _record(root: Path, path: Path, label: str, groups: dict[str, str], layout: FolderLayout) -> ImageRecord:
    name = printable_name(path.relative_to(root).as_posix())
    mask = None
    truth = None if label == GOOD else layout.truth.get(label.casefold())
    if truth is not None:
        candidates = (truth / f"{path.stem}_mask.png", truth / f"{path.stem}.png", truth / path.name)
        mask = next((candidate for candidate in candidates if candidate.is_file()), None)
    # A photograph without an entry is a part of its own; the prefix keeps it apart from named groups.
    label = printable_name(label)
    return ImageRecord(path=path, name=name, label=label, group=groups.get(name, f"{_UNGROUPED}{name}"), mask=mask)


def write_groups(path: Path, records: Sequence[ImageRecord]) -> None:
    """Write a groups file, which a person can correct and :func:`open_dataset` reads.

    Raises:
        StorageError: it cannot be written.
    """
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("path", "group"))
    writer.writerows((record.name, record.group.removeprefix(_UNGROUPED)) for record in records)
    atomic_write(path, stream.getvalue().encode("utf-8", "surrogateescape"))


def _read_groups(root: Path, groups_file: Path | None) -> dict[str, str]:
    path = groups_file
    if path is None:
        path = next((root / name for name in GROUPS_FILES if (root / name).is_file()), None)
        if path is None:
            return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path}: cannot read the groups file ({exc})") from exc
    groups: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise DataError(f"{path}:{number}: expected `path,group`, got {','.join(row)!r}")
        groups[row[0].strip().replace("\\", "/")] = row[1].strip()
    if not groups:
        raise DataError(f"{path}: the groups file has no rows below its header")
    return groups
