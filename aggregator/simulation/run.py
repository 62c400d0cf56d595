"""A simulated run: the round state machine, with sites that are asked in turn instead of over MQTT.

What the service does when a message arrives, this does when a site has answered: it tells the state machine, writes
the resulting events to the journal, and acts on them. The clock is stopped, so no deadline passes. Killed at any moment
and started again, it continues from the journal and the sites' state directories, to the same bits.

::

    OUT/simulation.json          the configuration, and which site has which parts
    OUT/data                     the sites' images (:mod:`aggregator.simulation.data`)
    OUT/state, OUT/sites/<site>  state directories of the aggregator and the sites
    OUT/figures/round-<n>.json, site-<site>.json   measured metrics, each measured once and kept
    OUT/ledger.json, OUT/global-model.safetensors
    OUT/metrics.json             all measured metrics together
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from aggregator.events import RunState
from aggregator.journal import Journal
from aggregator.outputs import ReceiveUpload, RoundOutput, SendToSite
from aggregator.run import LEDGER_FILE, Run, RunResult, open_run, write_results
from aggregator.simulation.config import SimulationConfig
from aggregator.simulation.data import SiteData, SiteLayout, prepare_site_data
from aggregator.simulation.engines import SimulationEngine
from aggregator.validation import validate_upload
from boards.surface import derive_seed
from edgeflame.errors import ConfigError, FederationError
from edgeflame.log import EventLog, Progress
from edgeflame.methods import resized_as_begun
from edgeflame.mqtt.messages import FinishReport, Offer, Refusal, TaskFailed, decode_up, encode_message
from edgeflame.simulation import MeasureAnswer, MeasureTask, SiteAnswer, SiteTask
from edgeflame.state import link_or_copy, locked_state_dir, read_json, storage_errors, write_json
from edgeflame.transfer.store import BlobStore

log = EventLog("simulation")

METRICS_FILE = "metrics.json"
RECORD_FILE = "simulation.json"
STOPPED_CLOCK_S = 0.0
"""The clock is stopped: no deadline passes in a simulation."""


class MeasuredMetrics:
    """The measured metrics of a simulation, one file each.

    Raises:
        StorageError: here and in every method, when the disk fails or a file is damaged.
    """

    def __init__(self, out_dir: Path) -> None:
        self._out_dir = out_dir
        self._folder = out_dir / "figures"
        with storage_errors(self._folder, "create"):
            self._folder.mkdir(exist_ok=True)

    def has_round(self, number: int) -> bool:
        """Whether the global model of a round is measured; 0 is the initial one."""
        return self._round(number).exists()

    def save_round(self, number: int, answer: MeasureAnswer) -> None:
        self._save(self._round(number), answer)

    def has_site(self, site: str) -> bool:
        """Whether a site's final model is measured."""
        return self._site(site).exists()

    def save_site(self, answer: MeasureAnswer) -> None:
        self._save(self._site(answer.name), answer)

    def write_all(self, sites: Sequence[str]) -> None:
        """Write ``metrics.json``: the rounds in order, then the sites."""
        rounds = sorted(int(path.stem[6:]) for path in self._folder.glob("round-*.json"))
        every = {
            "rounds": [{"round": number, **self._read(self._round(number))} for number in rounds],
            "sites": {site: self._read(self._site(site)) for site in sites if self.has_site(site)},
        }
        write_json(self._out_dir / METRICS_FILE, every, indent=1)

    def _round(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.json"

    def _site(self, site: str) -> Path:
        return self._folder / f"site-{site}.json"

    def _save(self, path: Path, answer: MeasureAnswer) -> None:
        write_json(path, {"figures": answer.figures, "classes": answer.classes})

    def _read(self, path: Path) -> dict[str, Any]:
        figures = read_json(path, dict[str, Any], advice="delete it to have it measured again")
        assert figures is not None, path
        return figures


def simulate(config: SimulationConfig, out_dir: Path, engine: SimulationEngine, report: Progress) -> RunResult:
    """Run a simulation to its end: a new one, or the one that ``out_dir`` holds.

    Args:
        config: must be the same, apart from the engine, when an interrupted run continues.
        out_dir: the simulation's folder; used by one process at a time.
        engine: carries out the sites' work.
        report: called with the steps of a phase that are done.

    Raises:
        ConfigError: another configuration than before, or too few parts for the sites.
        EdgeFlameError: a site's task, the data or the disk failed.
    """
    with ExitStack() as stack:
        stack.enter_context(locked_state_dir(out_dir, kind="simulation"))
        config = _as_begun(config, out_dir)
        layout = prepare_site_data(config, out_dir, report)
        _write_record(config, layout, out_dir)
        if config.alone is not None:
            return _run_solo(config, layout, out_dir.resolve(), engine, report)
        state_dir = out_dir / "state"
        with storage_errors(state_dir, "create"):
            state_dir.mkdir(exist_ok=True)
        journal = stack.enter_context(Journal(state_dir / "journal.sqlite"))
        simulation = _Simulation(config, layout, out_dir, journal, engine, report)
        try:
            return simulation.run()
        finally:
            simulation.close()


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    config: dict[str, Any]


def _as_begun(config: SimulationConfig, out_dir: Path) -> SimulationConfig:
    """The configuration, which must be the one that the simulation was begun with, if it was."""
    record = read_json(out_dir / RECORD_FILE, _Record, advice="simulate into another folder")
    if record is None:
        return config
    # Keys that it does not have, because an earlier version wrote it, are at their defaults.
    try:
        begun = msgspec.convert(record.config, SimulationConfig)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{out_dir} holds a simulation of another version ({exc}); choose another folder") from exc
    learning = resized_as_begun(config.fleet.learning, begun.fleet.learning)
    config = msgspec.structs.replace(config, fleet=msgspec.structs.replace(config.fleet, learning=learning))
    before, now = begun.without_engine(), config.without_engine()
    if before != now:
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        raise ConfigError(
            f"{out_dir} holds a simulation with another configuration ({', '.join(changed)}); choose another folder"
        )
    return config


def _write_record(config: SimulationConfig, layout: SiteLayout, out_dir: Path) -> None:
    record = {"config": config.without_engine(), "sites": layout.sites}
    write_json(out_dir / RECORD_FILE, record, indent=1)


def _run_solo(
    config: SimulationConfig, layout: SiteLayout, out_dir: Path, engine: SimulationEngine, report: Progress
) -> RunResult:
    """Have every site learn by itself, without rounds, and measure it."""
    metrics = MeasuredMetrics(out_dir)
    tasks = [
        MeasureTask(
            name=place.site,
            learning=config.solo_learning(),
            seed=derive_seed(config.fleet.learning.seed, "alone", place.site) >> 32,
            train=(str(out_dir / place.data),),
            test=str(out_dir / place.test),
        )
        for place in layout.sites
        if not metrics.has_site(place.site)
    ]
    for done, answer in enumerate(run_measurements(engine, tasks), start=1):
        metrics.save_site(answer)
        report(done, len(tasks), "sites alone")
    metrics.write_all([place.site for place in layout.sites])
    ledger = {"outcome": "done", "method": config.alone, "members": list(config.site_names), "rounds": []}
    write_json(out_dir / LEDGER_FILE, ledger, indent=2)
    return RunResult(succeeded=True, reason="", ledger=ledger, ledger_path=out_dir / LEDGER_FILE, model_path=None)


def run_measurements(engine: SimulationEngine, tasks: Sequence[MeasureTask]) -> Iterator[MeasureAnswer]:
    """The measurements, in the order in which they are done."""
    for answer in engine.run(tasks):
        assert isinstance(answer, MeasureAnswer)
        yield answer


class _Simulation:
    def __init__(
        self,
        config: SimulationConfig,
        layout: SiteLayout,
        out_dir: Path,
        journal: Journal,
        engine: SimulationEngine,
        report: Progress,
    ) -> None:
        self._config = config
        self._layout = layout
        self._out_dir = out_dir.resolve()
        self._state_dir = self._out_dir / "state"
        self._engine = engine
        self._report = report
        self._store = BlobStore(self._state_dir)
        self._metrics = MeasuredMetrics(self._out_dir)
        self._run = Run(
            open_run(journal, config.aggregate_config()),
            journal=journal,
            store=self._store,
            clock=lambda: STOPPED_CLOCK_S,
            handle=self._handle,
        )
        self._machine = self._run.machine
        self._offered: Path | None = None
        """The blob that the current site offers."""

    def close(self) -> None:
        self._run.publisher.close()

    def run(self) -> RunResult:
        """Ask the sites for what the run waits for, phase by phase."""
        machine = self._machine
        self._run.execute(machine.restart(STOPPED_CLOCK_S))
        while machine.state.ended is None:
            self._measure_models()
            before = machine.state
            tasks = self._tasks()
            number = 0 if machine.state.latest_round is None else machine.state.latest_round.number
            for done, answer in enumerate(self._engine.run(tasks), start=1):
                assert isinstance(answer, SiteAnswer)
                self._on_answer(answer)
                self._report(done, len(tasks), f"{before.phase} {number or ''}".strip())
            if machine.state == before:
                raise FederationError(f"the simulation does not go on from phase {before.phase}")
        self._measure_models()
        if self._config.evaluation.sites and machine.state.ended.succeeded:
            self._measure_sites()
        self._metrics.write_all([place.site for place in self._layout.sites])
        return write_results(machine.state, self._store, self._out_dir)

    # Sites.

    def _tasks(self) -> list[SiteTask]:
        state = self._machine.state
        announced = msgspec.Raw(encode_message(self._run.round_state()))
        return [
            SiteTask(
                site=place.site,
                data=str(self._out_dir / place.data),
                marks=self._marks(place),
                state=str(self._site_dir(place.site)),
                blobs=str(self._store.path("x").parent),
                shared=str(self._state_dir),
                announced=announced,
                refused={e.number: e.refused[place.site].reason for e in state.rounds if place.site in e.refused},
            )
            for place in self._layout.sites
            if place.site in self._sites_awaited(state)
        ]

    def _sites_awaited(self, state: RunState) -> set[str]:
        """The sites whose answer the run waits for."""
        match state.phase:
            case "waiting":
                return set(self._config.site_names) - state.members.keys()
            case "initialise":
                return set(state.initial_sites_asked[-1:])
            case "train" | "statistics" if state.current_round is not None:
                return set(state.current_round.open_sites)
            case "finish":
                return set(self._machine.available_sites()) - state.finished.keys() - state.not_finished.keys()
            case _:
                return set()

    def _marks(self, place: SiteData) -> str | None:
        return None if place.marks is None else str(self._out_dir / place.marks)

    def _site_dir(self, site: str) -> Path:
        folder = self._out_dir / "sites" / site
        with storage_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _on_answer(self, answer: SiteAnswer) -> None:
        machine, site = self._machine, answer.site
        if machine.state.phase == "waiting" and answer.initial is not None:
            self._run.execute(
                machine.site_ready(site, install=answer.install, initial=answer.initial, now=STOPPED_CLOCK_S)
            )
        if answer.said is None:
            return
        match decode_up(answer.said.encode()):
            case Offer() as offer:
                assert answer.blob is not None
                self._offered = Path(answer.blob)
                self._run.execute(machine.offer_received(site, offer, STOPPED_CLOCK_S))
            case FinishReport() as finished:
                self._run.execute(machine.finish_report_received(site, finished, STOPPED_CLOCK_S))
            case TaskFailed() as failed:
                self._run.execute(machine.task_failed(site, failed, STOPPED_CLOCK_S))
            case other:
                raise FederationError(f"{site} says {other.__struct_config__.tag}, which nobody asked for")

    def _handle(self, output: RoundOutput) -> None:
        """Log refusals and receive offers; sites are asked in turn, so other outputs need nothing here."""
        match output:
            case SendToSite(site=site, message=Refusal() as refusal):
                log.warning("refused", site=site, reason=refusal.reason, detail=refusal.detail)
            case ReceiveUpload():
                self._receive(output)
            case _:
                pass

    def _receive(self, output: ReceiveUpload) -> None:
        assert self._offered is not None
        if output.offer.manifest.sha256 not in self._store:
            draft = self._store.draft_path("blob")
            link_or_copy(self._offered, draft)
            self._store.add(draft)
        result = validate_upload(self._run.state, output.offer, self._store)
        if result is not None:
            self._run.execute(self._machine.upload_validated(output.site, output.offer, result, STOPPED_CLOCK_S))

    # Measured metrics.

    def _measure_models(self) -> None:
        """Measure the newest global model, if its figures are wanted and not there yet."""
        state, every = self._machine.state, self._config.evaluation.every
        if state.model is None or state.model not in self._store:
            return
        number = state.rounds_done
        is_last = state.is_trained or state.ended is not None
        if not (is_last or (every and number % every == 0)) or self._metrics.has_round(number):
            return
        task = MeasureTask(
            name=str(number),
            learning=state.config.learning,
            model=str(self._store.path(state.model)),
            train=tuple(str(self._out_dir / place.data) for place in self._layout.sites),
            test=str(self._out_dir / self._layout.common),
        )
        for answer in run_measurements(self._engine, [task]):
            self._metrics.save_round(number, answer)

    def _measure_sites(self) -> None:
        state = self._machine.state
        assert state.model is not None
        tasks = [
            MeasureTask(
                name=place.site,
                learning=state.config.learning,
                model=str(self._store.path(state.model)),
                train=(str(self._out_dir / place.data),),
                marks=self._marks(place),
                test=str(self._out_dir / place.test),
            )
            for place in self._layout.sites
            if place.site in state.finished and not self._metrics.has_site(place.site)
        ]
        for done, answer in enumerate(run_measurements(self._engine, tasks), start=1):
            self._metrics.save_site(answer)
            self._report(done, len(tasks), "measuring the sites' models")
