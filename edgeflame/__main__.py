"""``python -m edgeflame`` is ``edgeflame``."""

from __future__ import annotations

import os
import sys


def _forget_working_directory() -> None:
    """Take the working directory, which ``python -m`` puts first, off the module path.

    A user's own ``cli.py``, ``fleet.py`` or ``trainer.py`` there would be imported in place of our package of that
    name. Whoever runs EdgeFlame out of its source folder needs the entry.
    """
    # Nothing is imported for this but what Python has loaded before.
    try:
        folder = os.getcwd()  # noqa: PTH109
    except OSError:  # it was deleted, with all that lay in it
        return
    sources = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120
    if sys.path[:1] == [folder] and folder != sources:
        del sys.path[0]


_forget_working_directory()

from cli import main  # noqa: E402 - not before the path is mended

main()
