"""Memory that a line has freed goes back to the system.

Pictures that wait for a slow disk or network are freed in another order than they came. The C library keeps what lies
between those still in use, in an arena for each thread, so that a process holds the most that each thread ever needed,
and a little more with each such time. One arena for all threads (`mallopt` of glibc) holds the most they ever needed
together, and `malloc_trim` gives whole pages back; it takes a few milliseconds.
"""

from __future__ import annotations

import ctypes
import threading

from edgeflame.background import BackgroundThread

TRIM_EVERY_S = 60.0

_M_ARENA_MAX = -8  # <malloc.h>


def share_one_arena() -> bool:
    """Have all threads that are begun from now on allocate from one arena; False where the C library has no way to."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_ARENA_MAX, 1))


def trim_memory() -> bool:
    """Give freed memory back; False where the C library has no way to."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return False
    trim(ctypes.c_size_t(0))
    return True


def trimming() -> BackgroundThread:
    """A thread that does it every minute."""
    return BackgroundThread("memory", _trim_regularly, join_s=1.0)


def _trim_regularly(stop: threading.Event) -> None:
    while trim_memory() and not stop.wait(TRIM_EVERY_S):
        pass
