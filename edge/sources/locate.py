"""Makes the source for an address given as ``--source``; and the source of image files, one part each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.frame import Frame, Source, make_frame
from edgeflame.dataset import list_images
from edgeflame.errors import DataError, UsageError
from edgeflame.images import IMAGE_SUFFIXES, MAX_PIXELS, printable_name, read_samples
from edgeflame.layout import GOOD, TEST, TRAIN, TRUTH, child_folder, data_sets_in, is_good_name
from edgeflame.masking import without_secrets


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Image files in a fixed order, each once.

    Attributes:
        name: the folder or file given in the address.
        files: path, part id and label (None: unknown) of each.
        max_pixels: of the largest picture that is decoded.
    """

    name: str
    files: Sequence[tuple[Path, str, str | None]]
    max_pixels: int = MAX_PIXELS
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
                image, error = read_samples(path, max_pixels=self.max_pixels), None
            except DataError as exc:
                image, error = None, str(exc)
            yield make_frame(part_id=part_id, source=str(path), image_bgr=image, error=error, label=label)


def folder_source(folder: Path, *, max_pixels: int = MAX_PIXELS) -> FileSource:
    """All images of a folder and its subfolders, sorted by path.

    If the folder is the test folder of a data set in the MVTec layout, or one class of it, the names of the class
    folders are taken as labels.

    Raises:
        DataError: no such folder, no image in it, or there is a whole data set, whose masks are not parts.
    """
    images = list_images(folder)
    for root, has in sorted(data_sets_in(folder, images).items()):
        if TEST in has and any(child_folder(root, name) for name in (TRAIN, TRUTH)):
            test = child_folder(root, TEST)
            raise DataError(f"{root}: this is a whole data set; to inspect its test images give {test}")
    has_classes = any(is_good_name(path.relative_to(folder).parts[0]) for path in images)
    files = tuple((path, path.relative_to(folder).as_posix(), _label(folder, path, has_classes)) for path in images)
    return FileSource(name=printable_name(str(folder)), files=files, max_pixels=max_pixels)


def image_source(path: Path, *, max_pixels: int = MAX_PIXELS) -> FileSource:
    """A single image."""
    return FileSource(name=printable_name(str(path)), files=((path, path.name, None),), max_pixels=max_pixels)


def _label(folder: Path, path: Path, has_classes: bool) -> str | None:
    name = None
    if has_classes:
        parts = path.relative_to(folder).parts
        name = parts[0] if len(parts) > 1 else None
    elif folder.absolute().parent.name.casefold() == TEST:
        name = folder.absolute().name
    return GOOD if name is not None and is_good_name(name) else name


WATCHED = "watch:"
"""Before the address of a folder in which files arrive."""


def open_image_source(address: str, *, outbox: Path | None = None, max_pixels: int = MAX_PIXELS) -> Source:
    """Make the source for an address; cameras and streams are opened only when frames are read.

    Args:
        address: a folder, an image, a video file, ``camera:0``, ``rtsp://...``, ``gst:PIPELINE``, ``csi:0`` or
            ``boards:TEXTURE``, ``watch:FOLDER``; see docs/sources.md.
        outbox: SQLite file of the results, where a watched folder looks up which files are done; None: there is none.
        max_pixels: of the largest picture in a file that is decoded.

    Raises:
        UsageError: the address is of no known kind.
        DataError: no such folder or file, or nothing to inspect in it.
    """
    if not address.strip():
        raise UsageError("--source: it is empty; was a variable not set?")
    if address.startswith("boards:"):
        from edge.sources.boards import board_source

        return board_source(address)
    if address.startswith(WATCHED):
        from edge.sources.watched_folder import watched_folder

        return watched_folder(address, outbox=outbox, max_pixels=max_pixels)
    if address.startswith("camera:"):
        from edge.sources.camera import camera_source

        return camera_source(address)
    if address.startswith(("gst:", "csi:")):
        from edge.sources.camera import csi_source, gst_source

        return gst_source(address) if address.startswith("gst:") else csi_source(address)
    scheme, separator, rest = address.partition("://")
    if separator and scheme.lower() in ("rtsp", "rtsps"):
        from edge.sources.video import RtspSource

        return RtspSource(url=f"{scheme.lower()}://{rest}")
    return _file_source(address, max_pixels)


def _file_source(address: str, max_pixels: int) -> Source:
    from edge.sources.video import VIDEO_SUFFIXES, VideoFileSource

    path = Path(address)
    if path.is_dir():
        return folder_source(path, max_pixels=max_pixels)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in IMAGE_SUFFIXES:
        return image_source(path, max_pixels=max_pixels)
    if path.is_file() and suffix in VIDEO_SUFFIXES:
        return VideoFileSource(path=path)
    if path.exists():
        raise DataError(f"{path}: neither an image nor a video by its name ({suffix or 'no suffix'})")
    if "://" in address:
        raise UsageError(f"--source {without_secrets(address)}: of URLs only rtsp:// and rtsps:// are read")
    raise DataError(
        f"{without_secrets(address)}: no such folder or file (a source is a folder, a file, watch:FOLDER, camera:0, "
        "rtsp://..., gst:PIPELINE, csi:0 or boards:TEXTURE)"
    )
