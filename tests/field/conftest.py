"""Keys and signed packages for the tests of models in the field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import BROKERS, BrokerProcess
from daemon import stream
from keys import Keys
from small_model import bad_image, good_image, with_references

from edgeflame.package import Package, read_package
from edgeflame.signing import sign_package, write_keys


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Those a line trusts."""
    folder = tmp_path_factory.mktemp("keys")
    write_keys(folder)
    return Keys(folder)


@pytest.fixture(scope="session")
def signed(package: Package, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small package with reference images, signed."""
    path = with_references(package, tmp_path_factory.mktemp("signed") / "signed.edgeflame")
    sign_package(path, keys.private)
    return path


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """The embedded broker."""
    with BrokerProcess("embedded", tmp_path_factory.mktemp("embedded")) as broker:
        yield broker


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerProcess]:
    """Each kind of broker."""
    with BrokerProcess(request.param, tmp_path) as process:
        yield process


PARTS = 60_000


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [good_image(seed) for seed in range(8)] + [bad_image(seed) for seed in range(2)]
    return stream(tmp_path_factory.mktemp("parts") / "parts", images, PARTS)


@pytest.fixture(scope="session")
def referenced(signed: Path) -> Package:
    return read_package(signed)
