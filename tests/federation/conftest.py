"""Brokers, and what an undisturbed run gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import BROKERS, BrokerProcess
from fleet import Fleet


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
