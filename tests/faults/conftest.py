"""Brokers shared by many faults, what an undisturbed run gives, and which faults run by default."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.brokers import BrokerProcess
from tests.support.faulty_run import Outcome, faulty_fleet, outcome


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only the representative faults, unless all are asked for (``make faults``)."""
    if os.environ.get("EDGEFLAME_FAULTS") == "all":
        return
    rest = [item for item in items if item.get_closest_marker("exhaustive")]
    if rest:
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if item not in rest]


@pytest.fixture(scope="session")
def broker_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], BrokerProcess]]:
    """A running broker of a kind; the same one for all tests that do not kill it."""
    running: dict[str, BrokerProcess] = {}

    def get(kind: str) -> BrokerProcess:
        if kind not in running:
            running[kind] = BrokerProcess(kind, tmp_path_factory.mktemp(kind))
        return running[kind]

    yield get
    for process in running.values():
        process.__exit__(None, None, None)


@pytest.fixture(scope="session")
def undisturbed(broker_of: Callable[[str], BrokerProcess], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a run gives in which nothing goes wrong."""
    with faulty_fleet(broker_of("embedded"), tmp_path_factory.mktemp("undisturbed")) as fleet:
        processes = [fleet.aggregator(), fleet.site("a"), fleet.site("b")]
        assert [process.wait() for process in processes] == [0, 0, 0]
        return outcome(fleet)
