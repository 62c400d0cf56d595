"""A plant's own broker, bridged to the one the aggregator is on, as docs/scaling.md sets it up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.timeout(90)


def bridge_lines(centre: BrokerProcess) -> str:
    """The bridge that the page shows, to this centre and for this fleet."""
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    block = next(part for part in page.split("```") if "connection centre" in part)
    lines = block.replace("centre.example:8883", f"127.0.0.1:{centre.port}").replace("FLEET", "test")
    return f"allow_anonymous true\n{lines}"


def test_sites_behind_a_bridge_make_the_same_model(tmp_path: Path, undisturbed_model: bytes) -> None:
    with (
        BrokerProcess("mosquitto", tmp_path) as centre,
        BrokerProcess("mosquitto", tmp_path, mosquitto_lines=bridge_lines(centre)) as plant,
        Fleet(centre, tmp_path) as fleet,
    ):
        aggregator = fleet.aggregator("--sites", "2", "--rounds", "2")
        near = fleet.site("a")
        fleet.broker = plant
        far = fleet.site("b")
        assert [process.wait() for process in (aggregator, near, far)] == [0, 0, 0]
        assert fleet.model() == undisturbed_model
