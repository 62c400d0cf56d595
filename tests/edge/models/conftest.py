"""A stream of parts, and the package that a line begins with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeflame.package import Package, read_package
from tests.support.brokers import BrokerProcess
from tests.support.rollout_daemon import stream
from tests.support.small_package import bad_image, good_image


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """The embedded broker."""
    with BrokerProcess("embedded", tmp_path_factory.mktemp("embedded")) as broker:
        yield broker


PARTS = 12_000


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [good_image(seed) for seed in range(8)] + [bad_image(seed) for seed in range(2)]
    return stream(tmp_path_factory.mktemp("parts") / "parts", images, PARTS)


@pytest.fixture(scope="session")
def referenced(signed: Path) -> Package:
    return read_package(signed)
