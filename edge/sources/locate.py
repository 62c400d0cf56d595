"""From what stands after ``--source`` to a source."""

from __future__ import annotations

from pathlib import Path

from edge.sources.interface import Source
from edgeflame.errors import DataError, UsageError
from edgeflame.images import IMAGE_SUFFIXES


def open_source(address: str, *, outbox: Path | None = None) -> Source:
    """Find the source that an address names; cameras and streams are opened only when frames are read.

    Args:
        address: a folder, an image, a video file, ``camera:0``, ``rtsp://...``, ``gst:PIPELINE``, ``csi:0`` or
            ``boards:TEXTURE``, ``watch:FOLDER``; see docs/sources.md.
        outbox: SQLite file in which the results will be kept, if in any; a watched folder asks it what is done.

    Raises:
        UsageError: an address of no known kind.
        DataError: no such folder or file, or nothing to inspect in it.
    """
    if address.startswith("boards:"):
        from edge.sources.boards import board_source

        return board_source(address)
    if address.startswith("watch:"):
        from edge.sources.watch.folder import watched_folder

        return watched_folder(address, outbox=outbox)
    if address.startswith("camera:"):
        from edge.sources.camera import camera_source

        return camera_source(address)
    if address.startswith(("gst:", "csi:")):
        from edge.sources.gst import csi_source, gst_source

        return gst_source(address) if address.startswith("gst:") else csi_source(address)
    if address.startswith(("rtsp://", "rtsps://")):
        from edge.sources.video import RtspSource

        return RtspSource(url=address)
    return _file_source(address)


def _file_source(address: str) -> Source:
    from edge.sources.files import folder_source, image_source
    from edge.sources.video import VIDEO_SUFFIXES, VideoFileSource, without_password

    path = Path(address)
    if path.is_dir():
        return folder_source(path)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in IMAGE_SUFFIXES:
        return image_source(path)
    if path.is_file() and suffix in VIDEO_SUFFIXES:
        return VideoFileSource(name=str(path))
    if path.exists():
        msg = f"{path}: neither an image nor a video by its name ({suffix or 'no suffix'})"
        raise DataError(msg)
    if "://" in address:
        msg = f"--source {without_password(address)}: of URLs only rtsp:// and rtsps:// are read"
        raise UsageError(msg)
    msg = (
        f"{address}: no such folder or file (a source is a folder, a file, watch:FOLDER, camera:0, rtsp://..., "
        "gst:PIPELINE, csi:0 or boards:TEXTURE)"
    )
    raise DataError(msg)
