"""Crash equivalence at every step: whoever is killed, and wherever, the run ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.brokers import BROKERS, BrokerProcess
from tests.support.faulty_run import FAULT_INJECTOR, NAMES, Outcome, faulty_fleet, outcome, start_all
from tests.support.protocol_steps import BROKER_KILLS, KILLS, REPRESENTATIVE, STEPS
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(120)


def table(who: str, moments: list[tuple[str, str]]) -> list[object]:
    return [
        pytest.param(
            role,
            moment,
            kind,
            marks=[] if (who, role, moment, kind) in REPRESENTATIVE else pytest.mark.exhaustive,
            id=f"{kind}-{role}-{moment.replace(' ', '_')}",
        )
        for kind in BROKERS
        for role, moment in moments
    ]


def test_the_table_is_complete(broker_of: Callable[[str], BrokerProcess], tmp_path: Path, undisturbed: Outcome) -> None:
    with faulty_fleet(broker_of("embedded"), tmp_path) as fleet:
        for role, name in NAMES.items():
            fleet.programs[name] = [FAULT_INJECTOR, role, "-", f"trace:{tmp_path / role}.steps"]
        assert [process.wait() for process in start_all(fleet).values()] == [0, 0, 0]
        assert outcome(fleet) == undisturbed
    for role, steps in STEPS.items():
        seen = {
            line.removeprefix("before ")
            for line in (tmp_path / f"{role}.steps").read_text().splitlines()
            if line[0] == "b"
        }
        assert seen - set(steps) <= {"hearing done"}, "steps that are not in the table"
        assert set(steps) - seen <= {"hearing heartbeat-not-ready", "saying heartbeat-not-ready"}


@pytest.mark.parametrize(("role", "moment", "kind"), table("kill", KILLS))
def test_killed(
    role: str,
    moment: str,
    kind: str,
    broker_of: Callable[[str], BrokerProcess],
    tmp_path: Path,
    undisturbed: Outcome,
) -> None:
    with faulty_fleet(broker_of(kind), tmp_path) as fleet:
        fleet.programs[NAMES[role]] = [FAULT_INJECTOR, role, moment, "kill"]
        processes = start_all(fleet)
        victim = processes[NAMES[role]]
        assert victim.wait() == -9, "the step was not reached"
        victim.start()
        assert {name: process.wait() for name, process in processes.items()} == dict.fromkeys(processes, 0)
        assert outcome(fleet) == undisturbed


@pytest.mark.parametrize(("role", "moment", "kind"), table("broker", BROKER_KILLS))
def test_broker_killed(role: str, moment: str, kind: str, tmp_path: Path, undisturbed: Outcome) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    with BrokerProcess(kind, tmp_path) as broker, faulty_fleet(broker, tmp_path) as fleet:
        fleet.programs[NAMES[role]] = [FAULT_INJECTOR, role, moment, f"hold:{gate}"]
        processes = start_all(fleet)
        victim = processes[NAMES[role]]
        wait_for(lambda: (gate / "held").exists() or victim.exit_code is not None, f"{moment} is reached")
        assert victim.exit_code is None, "the step was not reached"
        broker.kill()
        broker.start()
        (gate / "go").touch()
        assert {name: process.wait() for name, process in processes.items()} == dict.fromkeys(processes, 0)
        assert outcome(fleet) == undisturbed
