"""Under which ids the fleet's members are known to a broker: none can be made of what they publish."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeflame.mqtt.messages import decode_presence
from edgeflame.mqtt.session import Session
from edgeflame.mqtt.topics import Topics
from edgeflame.mqtt.url import parse_broker_url
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet

pytestmark = pytest.mark.timeout(120)


def test_an_id_says_nothing_that_others_could_know(tmp_path: Path) -> None:
    topics = Topics(fleet="test")
    filters = [topics.aggregator_presence, topics.all_site_presences()]
    with BrokerProcess("mosquitto", tmp_path) as broker, Fleet(broker, tmp_path) as fleet:
        aggregator, site = fleet.aggregator(), fleet.site("left")
        for process in (aggregator, site):
            process.wait_for_log("broker_connected")
        aggregator.wait_for_log("site_joined")
        with Session(parse_broker_url(broker.url), name="look", filters=filters, connect_timeout_s=10) as session:
            presences = [decode_presence(message.payload) for message in session.retained()]
        ids = re.findall(r" as (edgeflame-\S+) \(", broker.log)
    known = [word for presence in presences for word in (presence.boot, presence.install, presence.run) if word]
    assert len(presences) == 2
    assert {one.split("-")[1] for one in ids} == {"aggregator", "site", "look"}
    assert not any(word[:8] in one for word in known for one in ids)
    assert all(re.search(r"-[0-9a-f]{24}$", one) for one in ids)
