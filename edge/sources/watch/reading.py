"""Files as the file system has them, their images, and their names as they may be shown."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edge.sources.watch.arrivals import Identity, Seen
from edgeflame.errors import DataError
from edgeflame.images import ImageU8, decode_image


def printable(name: str) -> str:
    """A file's name as it may be shown and sent: bytes that are no UTF-8, and control characters, in hexadecimal."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def look(path: Path | os.DirEntry[str]) -> Seen | None:
    """A file as it is now; None where there is none, or something else than a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        try:
            # A link to nothing is there, and will not be read.
            status = os.lstat(path)
        except OSError:
            return None
        return Seen(Identity(status.st_size, status.st_mtime_ns), status.st_ino)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Seen(Identity(status.st_size, status.st_mtime_ns), status.st_ino)


def read_complete(path: Path) -> tuple[Identity, ImageU8 | None, str]:
    """A file's image, or why there is none, and what the file was while it was read.

    Raises:
        FileNotFoundError: it is not there.
    """
    identity = Identity(-1, -1)
    try:
        with path.open("rb") as stream:
            identity = _identity(stream.fileno())
            data = stream.read()
            if _identity(stream.fileno()) != identity:
                return identity, None, "it changed while it was read"
        return identity, decode_image(data, printable(str(path))), ""
    except FileNotFoundError:
        raise
    except OSError as exc:
        status = look(path)
        return status.identity if status else identity, None, f"{printable(str(path))}: cannot be read ({exc.strerror})"
    except DataError as exc:
        return identity, None, str(exc)


def _identity(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return Identity(status.st_size, status.st_mtime_ns)
