"""A package published to a running daemon: taken, tried, switched to; refused where it is not what it should be."""

from __future__ import annotations

from pathlib import Path

import pytest
from brokers import BrokerProcess, wait_for
from daemon import Daemon, variant
from keys import Keys

from edgeflame.package import Package, read_package
from edgeflame.releases.publisher import describe_package

pytestmark = pytest.mark.timeout(90)


def test_a_model_is_taken_tried_and_switched_to_without_a_gap(
    broker: BrokerProcess, signed: Path, referenced: Package, keys: Keys, parts: Path, tmp_path: Path
) -> None:
    new = variant(referenced, tmp_path / "new.edgeflame", keys.private)
    sha256 = read_package(new).sha256
    with Daemon(
        tmp_path / "line", broker=broker, model=signed, key=keys.public, source=parts, models="shadow_parts = 50"
    ) as daemon:
        daemon.wait_until_announced()
        (standing,) = daemon.publish(new, describe_package(new, keys.public))
        assert (standing.word, standing.is_good) == ("running", True), standing
        said = daemon.said()
        assert said is not None
        assert (said.present.sha256, said.present.origin, said.present.on_trial) == (sha256, "release", True)
        assert said.previous[-1].sha256 == referenced.sha256
        found = said.outcomes[0].disagreement
        assert found is not None
        assert found.parts >= 50
        assert (found.differing, found.faults) == (0, 0)
        assert found.correlation == pytest.approx(1.0)
        wait_for(lambda: daemon.results()[-1]["model"] == sha256[:12], "the new model judges")
        assert daemon.stop() in (0, 130)
        results = daemon.results()
    assert [one["sequence"] for one in results] == list(range(len(results))), "no part is missing"
    models = [one["model"] for one in results]
    first = models.index(sha256[:12])
    assert set(models[:first]) == {referenced.sha256[:12]}
    assert set(models[first:]) == {sha256[:12]}, "from one part to the next, and not back"
    assert {one["verdict"] for one in results} == {"pass", "fail"}
