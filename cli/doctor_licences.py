"""``edgeflame doctor --licences``: all that is installed, weights included, and its licence."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from cli.output import cell, echo, print_json

WEIGHT_FILES = (".pth", ".safetensors")
"""Those in a package's folder; beside the packages a ``.pth`` is a list of places that Python imports from."""
UNKNOWN = "not stated"
_MAX_NAME_CHARS = 120


class Licensed(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is installed, and its licence."""

    kind: str
    """``package``; ``weights``: a package of pretrained weights, or those that a model package was made from."""
    name: str
    version: str
    licence: str
    """As its own metadata or licence file calls it; ``not stated`` if neither does."""
    files: Sequence[str]
    """Its licence files, those of what is bundled into it as well: where they are on this machine."""


def installed() -> Sequence[Licensed]:
    """All Python packages of this environment, by name."""
    found: dict[str, Licensed] = {}
    for distribution in importlib.metadata.distributions():
        # Of two of a name Python imports the first.
        found.setdefault(distribution.metadata["Name"].lower(), _of(distribution))
    return [found[name] for name in sorted(found)]


def weights_of(path: Path, packages: Sequence[Licensed]) -> Licensed:
    """The weights that a model package was made from.

    Raises:
        PackageError: it cannot be read.
    """
    from edgeflame.package import read_package

    source = read_package(path).manifest.weights.source
    kind, _, rest = source.partition(" ")
    name, _, version = rest.partition(" ")
    licence = UNKNOWN
    if kind == "package":
        licence = next((one.licence for one in packages if one.name.lower() == name.lower()), UNKNOWN)
    return Licensed(kind="weights", name=f"{path.name}: {source}", version=version, licence=licence, files=[])


def print_licences(model: Path | None, *, as_json: bool) -> None:
    """Print everything that is installed, and of a model package the weights it was made from.

    Raises:
        PackageError: the model package cannot be read.
    """
    found = installed()
    if model is not None:
        found = [*found, weights_of(model, found)]
    if as_json:
        print_json(found)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("name", "version", "licence", ""):
        table.add_column(heading, overflow="fold")
    for one in found:
        table.add_row(cell(one.name), cell(one.version), cell(one.licence), "weights" if one.kind == "weights" else "")
    Console(width=max(Console().width, 100)).print(table)
    unstated = sum(one.licence == UNKNOWN for one in found)
    echo(f"{len(found)} in all, {unstated} whose licence is not stated; --json names the licence files of each")


def _of(distribution: importlib.metadata.Distribution) -> Licensed:
    files = distribution.files or ()
    paths = [
        str(distribution.locate_file(file))
        for file in files
        if re.match(r"(licen[cs]e|copying|notice|third.?party)", file.name, re.IGNORECASE)
        and file.suffix not in {".py", ".pyc"}
    ]
    return Licensed(
        kind="weights" if any(file.suffix in WEIGHT_FILES and len(file.parts) > 1 for file in files) else "package",
        name=distribution.metadata["Name"],
        version=distribution.version,
        licence=next(_names(distribution, paths), UNKNOWN),
        files=paths,
    )


def _names(distribution: importlib.metadata.Distribution, paths: Sequence[str]) -> Iterator[str]:
    """What a licence is called, the most exact first."""
    metadata = distribution.metadata
    for key in ("License-Expression", "License"):
        text = " ".join(metadata.get_all(key) or ()).strip()
        # Old metadata may have the whole text of the licence in place of its name.
        if text and text.upper() != "UNKNOWN" and "\n" not in text and len(text) <= _MAX_NAME_CHARS:
            yield text
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith("License ::")]
    names = [text.rpartition(" :: ")[2] for text in classifiers if text.count(" :: ") > 1 or "Approved" not in text]
    if names := [name for name in names if not name.endswith("approved")]:
        yield " and ".join(names)
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        yield from (line.strip()[:_MAX_NAME_CHARS] for line in lines if re.search(r"\w{3}", line))
