"""Power cuts: the last writes of a state directory are gone, or not what was written.

Whatever is lost, the run ends with the same bits or with a clear refusal, never with a wrong model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from aggregator.config import AggregateConfig
from aggregator.events import (
    Event,
    InitialModelAccepted,
    InitialSiteChosen,
    ModelAggregated,
    RoundClosed,
    RoundStarted,
    RunStarted,
    RunState,
    SiteJoined,
    UpdateAccepted,
    apply_event,
    initial_state,
)
from aggregator.journal import Journal
from edgeflame.state import file_sha256
from edgeflame.transfer.store import BlobStore
from tests.support.brokers import BrokerProcess
from tests.support.faulty_run import FAULT_INJECTOR, NAMES, Outcome, faulty_fleet, outcome, start_all
from trainer.agent.state import FinishRecord, SiteState, UpdateRecord

pytestmark = pytest.mark.timeout(120)

RUN = "0" * 32
WAL_HEADER, FRAME = 32, 24 + 4096
"""Bytes; https://www.sqlite.org/fileformat2.html#the_write_ahead_log, at SQLite's default page size."""


def transactions() -> list[list[Event]]:
    def accepted(site: str, number: int) -> UpdateAccepted:
        figures = {"loss": 0.5}
        return UpdateAccepted(
            round=number, site=site, sha256=site * 64, num_samples=9, metrics=figures, relative_change=0.1
        )

    rounds: list[list[Event]] = []
    for number in (1, 2, 3):
        rounds += [
            [accepted("a", number)],
            [accepted("b", number), RoundClosed(round=number, left_out=())],
            [
                ModelAggregated(round=number, sha256="c" * 64, size_bytes=9),
                RoundStarted(round=number + 1, asked=("a", "b")),
            ],
        ]
    return [
        [RunStarted(run=RUN, config=AggregateConfig(rounds=9), time="2026-01-01T00:00:00Z")],
        [SiteJoined(site="a", install="1" * 32, initial="d" * 64)],
        [SiteJoined(site="b", install="2" * 32, initial="d" * 64), InitialSiteChosen(site="a")],
        [InitialModelAccepted(site="a", sha256="d" * 64, size_bytes=9), RoundStarted(round=1, asked=("a", "b"))],
        *rounds,
    ]


def test_a_journal_cut_anywhere_is_a_state_the_run_was_in(tmp_path: Path) -> None:
    states: list[RunState | None] = [None]
    (tmp_path / "whole").mkdir()
    with Journal(tmp_path / "whole" / "journal.sqlite") as journal:
        for facts in transactions():
            journal.append(RUN, facts)
            state = states[-1]
            for fact in facts:
                state = initial_state(fact) if isinstance(fact, RunStarted) else apply_event(state, fact)  # type: ignore[arg-type]
            states.append(state)
        main, wal = ((tmp_path / "whole" / name).read_bytes() for name in ("journal.sqlite", "journal.sqlite-wal"))
    frames = (len(wal) - WAL_HEADER) // FRAME
    assert frames >= len(transactions())
    cuts = [0, 10, WAL_HEADER]
    cuts += [WAL_HEADER + FRAME * frame + extra for frame in range(frames + 1) for extra in (-1, 0, 1, 2000)]
    reached = -1
    for number, cut in enumerate(sorted(cut for cut in cuts if 0 <= cut <= len(wal))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "journal.sqlite").write_bytes(main)
        (folder / "journal.sqlite-wal").write_bytes(wal[:cut])
        with Journal(folder / "journal.sqlite") as journal:
            index = states.index(journal.last_run())
            assert index >= reached
            reached = index
            # And it goes on from there.
            journal.append(RUN, transactions()[index] if index < len(transactions()) else [])
    assert reached == len(states) - 1


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def remembered(folder: Path) -> Path:
    """A site's state directory with all that can be in one."""
    memory = SiteState(folder)

    def draft(value: float) -> Path:
        path = memory.temporary_path("test")
        safetensors.numpy.save_file({"w": np.full(300, value, np.float32)}, path)
        return path

    memory.store_initial(RUN, draft(0.0))
    for number in (1, 2):
        trained = UpdateRecord(num_samples=number, metrics={"loss": 0.5}, base=str(number) * 64)
        memory.store_update(RUN, number, draft(number), trained)
    memory.store_statistics(RUN, draft(9.0), UpdateRecord(num_samples=3, metrics={}, base="3" * 64))
    package = memory.package_dir(RUN) / "site.edgeflame"
    package.write_bytes(b"package" * 100)
    sha256 = file_sha256(package)
    memory.store_finished(RUN, FinishRecord(model="a" * 64, package=package.name, package_sha256=sha256, summary={}))
    return folder


def parts(memory: SiteState) -> dict[str, bytes]:
    """What a site would use or send, as bytes."""
    found: dict[str, bytes] = {}
    for number in (1, 2):
        if (update := memory.update(RUN, number)) is not None:
            found[f"update {number}"] = update[0].read_bytes()
    if (statistics := memory.statistics(RUN)) is not None:
        found["statistics"] = statistics[0].read_bytes()
    if (finished := memory.finished(RUN)) is not None and finished.package is not None:
        found["package"] = (memory.package_dir(RUN) / finished.package).read_bytes()
    if (initial := memory.initial(RUN)) is not None and initial in memory.store:
        found["initial"] = memory.store.path(initial).read_bytes()
    return found


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_site_still_has_after_a_power_cut_is_what_it_had(damage: str, tmp_path: Path) -> None:
    whole = remembered(tmp_path / "whole")
    sound = parts(SiteState(whole))
    assert len(sound) == 5
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        DAMAGES[damage](folder / name)
        memory = SiteState(folder)
        left = parts(memory)
        assert left.items() <= sound.items(), f"{name} {damage}: something else than was kept"
        assert len(left) >= len(sound) - 1, f"{name} {damage}: more is lost than was damaged"
        assert len(memory.install) == 32


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_blob_is_no_blob(damage: str, tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    names = []
    for value in (b"one", b"two" * 1000):
        path = tmp_path / "draft"
        path.write_bytes(value)
        names.append(store.add(path).sha256)
    DAMAGES[damage](store.path(names[0]))
    again = BlobStore(tmp_path)
    assert [name in again for name in names] == [False, True]


def cut_the_wal(state: Path, frames: int) -> bool:
    """Take so many frames off the end of the journal's log; whether there were so many."""
    wal = state / "journal.sqlite-wal"
    left = wal.stat().st_size - frames * FRAME
    if left < WAL_HEADER:
        return False
    with wal.open("r+b") as stream:
        stream.truncate(left)
    return True


REFUSALS = (3, 8, 10)


def cases(every: Collection[object], *, representative: object) -> list[object]:
    """All of them, but one only in every run of the test suite."""
    return [one if one == representative else pytest.param(one, marks=pytest.mark.exhaustive) for one in every]


MOMENTS_OF_LOSS = (
    "after journalling initial_accepted round_started-update-1",
    "after journalling update_accepted-update-1",
    "after journalling update_accepted-update-1 round_closed-update-1",
    "after journalling model_made-1 round_started-update-2",
    "after pruning blobs",
    "after journalling update_accepted-statistics-0",
    "after journalling statistics_made",
)


@pytest.mark.parametrize("moment", cases(MOMENTS_OF_LOSS, representative=MOMENTS_OF_LOSS[3]))
@pytest.mark.parametrize("frames", cases((1, 2, 3, 4, 6, 8, 12), representative=4))
def test_an_aggregator_that_lost_its_newest_facts(
    moment: str,
    frames: int,
    broker_of: Callable[[str], BrokerProcess],
    tmp_path: Path,
    undisturbed: Outcome,
) -> None:
    with faulty_fleet(broker_of("embedded"), tmp_path) as fleet:
        fleet.programs["aggregator"] = [FAULT_INJECTOR, "aggregator", moment, "kill"]
        processes = start_all(fleet)
        aggregator = processes["aggregator"]
        assert aggregator.wait() == -9
        if not cut_the_wal(tmp_path / "aggregator", frames):
            pytest.skip(f"the journal's log has fewer than {frames} frames here")
        aggregator.start()
        ended = aggregator.wait()
        if ended == 0:
            assert outcome(fleet) == undisturbed
            assert [processes[name].wait() for name in "ab"] == [0, 0]
        else:
            assert ended in REFUSALS
            assert "Traceback" not in aggregator.log
            assert not (tmp_path / "aggregator" / "global-model.safetensors").exists()


FILES = {
    "site": [
        "install", "blobs/*", "runs/*/initial.json", "runs/*/round-000001/outcome.json",
        "runs/*/round-000001/update.safetensors", "runs/*/round-000002/outcome.json",
        "runs/*/round-000002/update.safetensors",
    ],
    "aggregator": ["blobs/*", "partial/*/*", "journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"],
}  # fmt: skip
MOMENTS = {"site": "before saying offer-update-2", "aggregator": "before journalling update_accepted-update-2"}


@pytest.mark.parametrize("damage", cases(DAMAGES, representative="zeros"))
@pytest.mark.parametrize(
    ("role", "pattern"),
    [
        pytest.param(role, name, marks=[] if name.endswith("2/update.safetensors") else pytest.mark.exhaustive)
        for role, names in FILES.items()
        for name in names
    ],
)
def test_damaged_files(
    role: str,
    pattern: str,
    damage: str,
    broker_of: Callable[[str], BrokerProcess],
    tmp_path: Path,
    undisturbed: Outcome,
) -> None:
    with faulty_fleet(broker_of("embedded"), tmp_path) as fleet:
        moment = "before storing a chunk#2" if pattern.startswith("partial") else MOMENTS[role]
        fleet.programs[NAMES[role]] = [FAULT_INJECTOR, role, moment, "kill"]
        processes = start_all(fleet)
        victim = processes[NAMES[role]]
        assert victim.wait() == -9
        state = tmp_path / ("aggregator" if role == "aggregator" else "state-a")
        damaged = [path for path in state.glob(pattern) if path.is_file()]
        if not damaged:
            pytest.skip(f"there is no {pattern} at this moment")
        for path in damaged:
            DAMAGES[damage](path)
        victim.start()
        ended = victim.wait()
        if ended != 0:
            assert ended in REFUSALS
            assert "Traceback" not in victim.log
            assert victim.log.rstrip().splitlines()[-1].startswith("edgeflame: ")
            return
        assert {name: process.wait() for name, process in processes.items()} == dict.fromkeys(processes, 0)
        assert outcome(fleet) == undisturbed
