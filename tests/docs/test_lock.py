"""The constraints that CI installs with name every dependency, and nothing of where they came from."""

from __future__ import annotations

import re

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import REPOSITORY

LOCK = (REPOSITORY / "requirements" / "ci.txt").read_text().splitlines()
EXTRAS = ("cpu", "train", "broker", "demo", "report", "dev")


def test_every_dependency_of_the_tests_is_pinned() -> None:
    project = msgspec.toml.decode((REPOSITORY / "pyproject.toml").read_bytes())["project"]
    wanted = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    # tomli is for Pythons older than the one that is pinned.
    names = {canonicalize_name(Requirement(text).name) for text in wanted} - {"tomli"}
    pins = {Requirement(line).name: Requirement(line) for line in LOCK[1:]}
    assert names <= pins.keys(), "run `make lock`, or add the line by hand"
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name in pins:
            (pin,) = pins[requirement.name].specifier
            assert requirement.specifier.contains(pin.version), f"{text} is pinned to {pin.version}"


def test_the_lock_says_only_versions_each_with_its_marker() -> None:
    assert len(LOCK) > 100
    for line in LOCK[1:]:
        assert re.fullmatch(r'[a-z0-9.-]+==[0-9][0-9a-z.]* ; python_version == "3\.\d+" and .+', line), line


def test_make_installs_with_the_lock() -> None:
    installs = re.findall(r"pip install .*-e .*", (REPOSITORY / "Makefile").read_text())
    assert len(installs) == 3
    assert [line for line in installs if "-c requirements/ci.txt" not in line] == [
        'pip install --upgrade --upgrade-strategy eager -e ".[cpu,train,broker,demo,report,dev]"'
    ]
