"""Every error EdgeFlame raises on purpose, and the exit code of each family.

    EdgeFlameError
    ├── NegativeAnswerError      1   the command worked and the answer is "no"
    ├── UsageError               2   the command line, or an argument of it, makes no sense
    ├── DataError                3   a data set, an image or a groups file
    ├── PackageError             4   a model package: corrupt, foreign, of another format
    ├── ConfigError              5   a configuration file or one of its keys
    ├── MissingDependencyError   6   an optional part is not installed
    ├── LinkError                7   the broker or the connection to it
    ├── FederationError          8   a peer, a round or an update breaks the protocol
    ├── RuntimeUnavailableError  9   no inference runtime can do what was asked
    ├── StorageError            10   disk or state directory
    ├── NumericalError          11   NaN, Inf or a degenerate matrix where a number was expected
    └── CrashLoopError          12   a part of a daemon failed unexpectedly again and again

A message says what was expected, what came, and what to do. Errors of other libraries are translated where
they enter, with ``raise ... from exc``. The command line prints the message as one line and exits with
``exit_code``; a traceback on the terminal is always a defect of EdgeFlame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, the shell's convention for SIGINT."""


class EdgeFlameError(Exception):
    """Base of all expected errors; never raised itself."""

    exit_code: ClassVar[int] = 70


class NegativeAnswerError(EdgeFlameError):
    """The command did its work and the answer is "no": a bar missed, a quorum not reached, parity failed."""

    exit_code = 1


class UsageError(EdgeFlameError):
    """Arguments that contradict each other or name something that does not exist."""

    exit_code = 2


class DataError(EdgeFlameError):
    """A data set, an image or a groups file cannot be used."""

    exit_code = 3


class PackageError(EdgeFlameError):
    """A model package is corrupt, foreign, or of a format this version does not read."""

    exit_code = 4


class ConfigError(EdgeFlameError):
    """A configuration file or one of its keys is wrong."""

    exit_code = 5


class MissingDependencyError(EdgeFlameError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    exit_code = 6


class LinkError(EdgeFlameError):
    """The broker cannot be reached, refuses us, or the link broke for good."""

    exit_code = 7


class FederationError(EdgeFlameError):
    """A peer, a round or an update breaks the protocol."""

    exit_code = 8


class RuntimeUnavailableError(EdgeFlameError):
    """No inference runtime here can do what was asked."""

    exit_code = 9


class StorageError(EdgeFlameError):
    """Disk full, state directory unwritable or in use, file vanished."""

    exit_code = 10


class NumericalError(EdgeFlameError):
    """NaN, Inf or a degenerate matrix where a finite number was expected."""

    exit_code = 11


class CrashLoopError(EdgeFlameError):
    """A part of a daemon failed unexpectedly again and again, or hangs; a new start may cure it."""

    exit_code = 12


@contextlib.contextmanager
def require_extra(extra: str, purpose: str) -> Iterator[None]:
    """Import an optional library inside this block: if it is missing, the error says how to install it.

    Args:
        extra: the extra of EdgeFlame that installs the library.
        purpose: what needs which library, as in ``reading video needs PyAV``.

    Raises:
        MissingDependencyError: an import failed.
    """
    try:
        yield
    except ImportError as exc:
        raise MissingDependencyError(f"{purpose} ({exc}): pip install 'edgeflame[{extra}]'") from exc
