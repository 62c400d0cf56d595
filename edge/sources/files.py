"""Image files: one file, one part."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.sources.interface import Frame, make_frame
from edgeflame.dataset import GOOD, list_images
from edgeflame.errors import DataError
from edgeflame.images import read_image


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Image files in a fixed order, each once.

    Attributes:
        name: the folder or file they were found by.
        files: path, part id and label (None where unknown) of each.
    """

    name: str
    files: Sequence[tuple[Path, str, str | None]]
    is_live: bool = False
    is_endless: bool = False

    @property
    def num_frames(self) -> int | None:
        return len(self.files)

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        for path, part_id, label in self.files:
            if stop.is_set():
                return
            try:
                image, error = read_image(path), None
            except DataError as exc:
                image, error = None, str(exc)
            yield make_frame(part_id=part_id, source=str(path), image_bgr=image, error=error, label=label)


def folder_source(folder: Path) -> FileSource:
    """All images of a folder and its subfolders, sorted by path.

    Where the folder is the test folder of a data set in the MVTec layout, or one class of it, the names of the
    class folders are taken as the truth.

    Raises:
        DataError: no such folder, no image in it, or it is the root of a data set, whose masks are no parts.
    """
    if (folder / "test").is_dir() and ((folder / "train").is_dir() or (folder / "ground_truth").is_dir()):
        msg = f"{folder}: this is a whole data set; to inspect its test images give {folder / 'test'}"
        raise DataError(msg)
    files = []
    for path in list_images(folder):
        part_id = path.relative_to(folder).as_posix()
        files.append((path, part_id, _label(folder, path)))
    return FileSource(name=str(folder), files=tuple(files))


def image_source(path: Path) -> FileSource:
    """A single image."""
    return FileSource(name=str(path), files=((path, path.name, None),))


def _label(folder: Path, path: Path) -> str | None:
    if (folder / GOOD).is_dir():
        parts = path.relative_to(folder).parts
        return parts[0] if len(parts) > 1 else None
    if folder.absolute().parent.name == "test":
        return folder.absolute().name
    return None
