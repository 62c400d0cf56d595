"""How our commands start others of our programs."""

from __future__ import annotations

import sys
from pathlib import Path

import edgeflame

_RUN = (
    "import sys; sys.path[:] = [*filter(None, sys.path), {root!r}]; "
    "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def program(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours with the Python that runs us.

    It is ``python -m MODULE``, but does not look for modules in the working directory: that is the user's, and may hold
    files of the same names as our packages.
    """
    root = Path(edgeflame.__file__).resolve().parent.parent
    return [sys.executable, "-c", _RUN.format(root=str(root), module=module), *arguments]
