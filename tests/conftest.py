"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.brokers import BROKERS, BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import REPOSITORY
from tests.support.signing_keys import Keys

if TYPE_CHECKING:
    from edgeflame.package import Package


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """The Magnetic Tile Defects photographs; tests that need them are skipped where the folder is missing."""
    named = os.environ.get("EDGEFLAME_MAGNETIC_TILE")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "magnetic-tile"
    if not (folder / "train" / "good").is_dir():
        pytest.skip("the magnetic-tile photographs are not here (set EDGEFLAME_MAGNETIC_TILE)")
    return folder


@pytest.fixture(scope="session")
def package_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real package with a model small enough for tests; see ``small_package``."""
    from tests.support.small_package import write_small_package

    return write_small_package(tmp_path_factory.mktemp("package") / "small.edgeflame")


@pytest.fixture(scope="session")
def package(package_file: Path) -> Package:
    """The same, in memory."""
    from edgeflame.package import read_package

    return read_package(package_file)


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerProcess]:
    """Each kind of broker, fresh."""
    with BrokerProcess(request.param, tmp_path) as process:
        yield process


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[BrokerProcess]:
    """The embedded broker, fresh."""
    with BrokerProcess("embedded", tmp_path) as process:
        yield process


@pytest.fixture(scope="session")
def undisturbed_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The final global model of two sites and two rounds when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with BrokerProcess("embedded", folder) as broker, Fleet(broker, folder) as fleet:
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        sites = [fleet.site("a"), fleet.site("b")]
        assert [process.wait() for process in (aggregator, *sites)] == [0, 0, 0]
        return fleet.model()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """A key pair that a line trusts."""
    from edgeflame.signing import write_keys

    folder = tmp_path_factory.mktemp("keys")
    write_keys(folder)
    return Keys(folder)


@pytest.fixture(scope="session")
def signed(package: Package, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small package with reference images, signed."""
    from edgeflame.signing import sign_package
    from tests.support.small_package import with_references

    path = with_references(package, tmp_path_factory.mktemp("signed") / "signed.edgeflame")
    sign_package(path, keys.private)
    return path
