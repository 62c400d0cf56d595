"""A fleet of real processes that learns a head: marked at one site, caught at the other."""

from __future__ import annotations

import json
import shlex
import sys
import urllib.request
from pathlib import Path

import pytest

from cli.pages.fleet_report import what_became_of_the_head
from edgeflame.marks import MarkStore
from edgeflame.package import read_package
from tests.support.brokers import BrokerProcess
from tests.support.fleet_processes import Fleet
from tests.support.part_images import part_image
from tests.support.ports import free_port
from tests.support.waiting import wait_for

# Two sites import PyTorch and export their network.
pytestmark = pytest.mark.timeout(900)
PATIENCE_S = 400.0

CONFIG = """
rounds = 3
min_available_sites = 2
[learning]
method = "feedback"
[learning.backbone]
name = "test_efficientnet"
stages = [1, 2]
weights = "random"
[learning.input]
height = 64
width = 64
[learning.scoring]
rank = 6
smoothing_sigma = 1.0
"""
WORKER = shlex.join([sys.executable, "-m", "cli.train_worker"])


def metric(port: int, name: str) -> float | None:
    """What a process serves on Prometheus' page of metrics; None if there is none yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    except OSError:
        return None
    return next((float(value) for label, _, value in (line.rpartition(" ") for line in lines) if label == name), None)


@pytest.mark.parametrize("broker", ["embedded"], indirect=True)
def test_a_defect_marked_at_one_site_is_known_at_the_other(
    broker: BrokerProcess, tmp_path: Path, parts_folder: Path
) -> None:
    store = MarkStore(tmp_path / "line" / "marks")
    for number in range(12):
        store.add(f"bad-{number}", part_image(200 + number, hole=True), "bad", kind="hole")
    ports = [free_port(), free_port()]
    common = ("--data", str(parts_folder), "--worker", WORKER, "--product", "plate")
    with Fleet(broker, tmp_path, config=CONFIG) as fleet:
        aggregator = fleet.aggregator("--metrics", f"127.0.0.1:{ports[0]}")
        east = fleet.site("east", *common)
        teacher = fleet.site("west", *common, "--marks", str(tmp_path / "line"), "--metrics", f"127.0.0.1:{ports[1]}")
        # Killed in the middle, it goes on from where it was.
        wait_for(lambda: " trained " in teacher.log, "a round is trained", timeout_s=PATIENCE_S)
        teacher.kill()
        teacher.start()
        # Rounds and the package are still to come.
        for port, name, value in (
            (ports[0], 'edgeflame_aggregator_marks_used{site="west"}', 12),
            (ports[0], 'edgeflame_aggregator_marks_used{site="east"}', 0),
            (ports[1], "edgeflame_site_marks_used", 12),
        ):
            wait_for(lambda port=port, name=name, value=value: metric(port, name) == value, name, timeout_s=PATIENCE_S)
        assert metric(ports[1], "edgeflame_site_marks_left_out") == 0
        for process in (east, teacher, aggregator):
            wait_for(lambda one=process: one.exit_code is not None, f"{process.name} ends", timeout_s=PATIENCE_S)
            assert process.exit_code == 0, process.log[-3000:]
        ledger = fleet.ledger()
        marked = [
            {one["site"]: one["metrics"]["num_marked_bad"] for one in entry["contributed"]}
            for entry in ledger["rounds"]
        ]
        assert marked == [{"east": 0.0, "west": 12.0}] * 3
        package = read_package(tmp_path / "east.edgeflame")
        told = package.manifest.provenance["statistics"]["head"]
        assert (told["num_bad_marks"], told["weight_chosen_by"]) == (0, "default"), told
        assert package.head is not None
        assert what_became_of_the_head(ledger) == [
            "1 of 2 sites have marked bad parts: 12 photographs.",
            "The head counts at 2 of 2 sites.",
        ]
        # No picture has gone over the broker: a head is all that is larger than messages.
        assert json.dumps(ledger).count("hole") == 0
        assert len(fleet.model()) < 100_000
