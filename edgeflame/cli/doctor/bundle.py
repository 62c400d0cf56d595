"""A zip for whoever helps: what the doctor found, what is installed, what the machine is. Nothing else goes in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import zipfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgeflame import __version__
from edgeflame.errors import StorageError
from edgeflame.findings import Finding


def write_bundle(path: Path, findings: Sequence[Finding]) -> None:
    """Write the zip: ``findings.json``, ``packages.txt``, ``machine.json``.

    No image, key, certificate, configuration, log or variable of the environment goes in; the user's home folder is
    written as ``~``.

    Raises:
        StorageError: it cannot be written.
    """
    packages = sorted(f"{item.metadata['Name']}=={item.version}" for item in importlib.metadata.distributions())
    machine = {
        "edgeflame": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    home = str(Path.home())
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in (
                ("findings.json", _pretty(findings)),
                ("machine.json", _pretty(machine)),
                ("packages.txt", "\n".join(packages) + "\n"),
            ):
                archive.writestr(name, data.replace(home, "~") if len(home) > 1 else data)
    except OSError as exc:
        msg = f"{path}: the bundle cannot be written ({exc.strerror})"
        raise StorageError(msg) from exc


def _pretty(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
