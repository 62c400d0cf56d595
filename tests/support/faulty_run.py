"""The run that all faults are injected into, and the part of its outcome that must not depend on them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet, Process

FAULT_INJECTOR = str(Path(__file__).with_name("fault_injector.py"))
ENV = {"TINY_ELEMENTS": "180000"}
"""720 kB: an update of three chunks."""
CONFIG = 'statistics = "federated"\nmin_available_sites = 2\nrounds = 2'
NAMES = {"aggregator": "aggregator", "site": "a"}
"""By role, the name of the process that faults are injected into."""

_numbers = itertools.count(1)


def faulty_fleet(broker: BrokerProcess, folder: Path) -> Fleet:
    """A fleet with a name of its own, so that many can be on one broker."""
    return Fleet(broker, folder, config=CONFIG, env=ENV, name=f"faults-{next(_numbers)}")


def start_all(fleet: Fleet) -> dict[str, Process]:
    """An aggregator and two sites."""
    return {"aggregator": fleet.aggregator(), "a": fleet.site("a"), "b": fleet.site("b")}


Outcome = tuple[bytes, Any]


def outcome(fleet: Fleet) -> Outcome:
    """What must not depend on faults: the model, bit for bit, and what the ledger says of how it came about."""
    ledger = fleet.ledger()
    return fleet.model(), (ledger["rounds"], ledger["statistics"], ledger["outcome"])
