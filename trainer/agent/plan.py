"""A site's next step: a pure function of what was announced and of what the site has. No history, no I/O.

The aggregator's retained round state says what everyone is to do. The site compares it with its durable state and
takes the first step that is missing; when that is done, or the announcement changes, it plans again. A site that
crashed, or was off for half a run, therefore needs no special treatment: it plans, and continues.

    announced    missing                                   step
    ---------    -------                                   ----
    any          an initial model                          Prepare
    initialise   its receipt, if this site is asked        OfferInitial
    train        if this site is asked: the base model     Fetch
                 ... the update                            Train
                 ... the aggregator's answer to it         OfferUpdate
    statistics   if this site is asked: the final model    Fetch
                 its statistics                            Gather
                 ... the aggregator's answer to them       OfferStatistics
    finish       final model, ledger, pooled statistics    Fetch
                 package                                   Finish
                 the aggregator's answer to the report     Report
                 nothing                                   Leave
    done         the final model, if the aggregator is     Fetch
                 still there; its ledger
                 package, if the final model is here       Finish
                 the answer to the report, likewise        Report
                 nothing                                   Leave
    failed       -                                         Leave

Otherwise it waits. After a task has failed the step is TellFailure until the aggregator has answered it.

A step's ``wire_name`` is what heartbeats and metrics call it; it stays, whatever the class is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeflame.mqtt.messages import BlobManifest, Purpose, RoundState, StatisticsWanted


@dataclass(frozen=True, kw_only=True)
class PlanInput:
    """What the plan depends on.

    Attributes:
        site: the site's name.
        announced: the last round state; None before there is one.
        took_part: this site has begun with the announced run.
        initial: SHA-256 of the site's initial model in it.
        has_update: the announced round's update is trained.
        has_statistics: this site's part of the fleet's statistics is computed.
        blobs: SHA-256 of those of the announcement's blobs that are here.
        is_finished: the package is made of the announced final model.
        answered: purposes (and rounds) that the aggregator has receipted or refused in this run.
        failure: purpose of the task that failed, and why.
        aggregator_online: by its last presence message; None if none was received on this connection.
    """

    site: str
    announced: RoundState | None = None
    took_part: bool = False
    initial: str | None = None
    has_update: bool = False
    has_statistics: bool = False
    blobs: frozenset[str] = frozenset()
    is_finished: bool = False
    answered: frozenset[tuple[Purpose, int]] = frozenset()
    failure: tuple[Purpose, str] | None = None
    aggregator_online: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nothing to do until something is announced. ``why`` is for people."""

    wire_name: ClassVar[str] = "wait"
    why: str


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Write the initial model."""

    wire_name: ClassVar[str] = "prepare"
    run: str


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download a blob; of those that are here only the ones in ``keep`` are still needed."""

    wire_name: ClassVar[str] = "fetch"
    run: str
    manifest: BlobManifest
    keep: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a round's update from the global model ``base`` (SHA-256)."""

    wire_name: ClassVar[str] = "train"
    run: str
    round: int
    base: str


@dataclass(frozen=True, kw_only=True)
class OfferInitial:
    """Upload the initial model."""

    wire_name: ClassVar[str] = "offerinitial"
    run: str


@dataclass(frozen=True, kw_only=True)
class OfferUpdate:
    """Upload a round's update."""

    wire_name: ClassVar[str] = "offerupdate"
    run: str
    round: int


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Compute this site's part of the fleet's statistics under the final model (SHA-256)."""

    wire_name: ClassVar[str] = "gather"
    run: str
    model: str
    wanted: StatisticsWanted


@dataclass(frozen=True, kw_only=True)
class OfferStatistics:
    """Upload this site's part of the fleet's statistics."""

    wire_name: ClassVar[str] = "offerstatistics"
    run: str


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Make the package. ``ledger`` is None where it could not be had any more, ``statistics`` where none are shared."""

    wire_name: ClassVar[str] = "finish"
    run: str
    model: str
    ledger: str | None
    statistics: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report that the package is made, until the aggregator answers."""

    wire_name: ClassVar[str] = "report"
    run: str
    model: str


@dataclass(frozen=True, kw_only=True)
class TellFailure:
    """Report that a task failed, until the aggregator answers."""

    wire_name: ClassVar[str] = "tellfailure"
    run: str
    round: int
    purpose: Purpose
    detail: str


@dataclass(frozen=True, kw_only=True)
class Leave:
    """The run is over for this site; ``problem`` says what went wrong, if anything did."""

    wire_name: ClassVar[str] = "leave"
    run: str
    problem: str | None = None
    run_failed: bool = False


PlanStep = (
    Wait
    | Prepare
    | Fetch
    | Train
    | OfferInitial
    | OfferUpdate
    | Gather
    | OfferStatistics
    | Finish
    | Report
    | TellFailure
    | Leave
)


def plan(known: PlanInput) -> PlanStep:
    """The step to take now."""
    announced = known.announced
    if announced is None:
        return Wait(why="no run is announced")
    run = announced.run
    if announced.phase in ("done", "failed"):
        return _plan_ended(known, announced)
    if known.failure is not None:
        purpose, detail = known.failure
        number = announced.round if purpose == "update" else 0
        if (purpose, number) in known.answered:
            return Leave(run=run, problem=detail)
        return TellFailure(run=run, round=number, purpose=purpose, detail=detail)
    if known.initial is None:
        return Prepare(run=run)
    match announced.phase:
        case "initialise" if known.site in announced.asked:
            if ("initial", 0) not in known.answered:
                return OfferInitial(run=run)
        case "train" if known.site in announced.asked and announced.base is not None:
            return _plan_round(known, announced, announced.base)
        case "statistics" if known.site in announced.asked and announced.base is not None:
            return _plan_statistics(known, announced, announced.base)
        case "finish" if announced.base is not None:
            return _plan_finish(known, announced, announced.base)
        case _:
            pass
    return Wait(why="others are at work")


def _plan_round(known: PlanInput, announced: RoundState, base: BlobManifest) -> PlanStep:
    run, number = announced.run, announced.round
    if ("update", number) in known.answered:
        return Wait(why="others are at work")
    if known.has_update:
        return OfferUpdate(run=run, round=number)
    if base.sha256 not in known.blobs:
        return Fetch(run=run, manifest=base, keep=known.blobs)
    return Train(run=run, round=number, base=base.sha256)


def _plan_statistics(known: PlanInput, announced: RoundState, model: BlobManifest) -> PlanStep:
    run = announced.run
    if ("statistics", 0) in known.answered or announced.wanted is None:
        return Wait(why="others are at work")
    if known.has_statistics:
        return OfferStatistics(run=run)
    if model.sha256 not in known.blobs:
        return Fetch(run=run, manifest=model, keep=known.blobs)
    return Gather(run=run, model=model.sha256, wanted=announced.wanted)


def _plan_finish(known: PlanInput, announced: RoundState, model: BlobManifest) -> PlanStep:
    run = announced.run
    if known.is_finished:
        # With its package made and noted a site has nothing to wait for: from here a run does not fail.
        return Leave(run=run) if ("finish", 0) in known.answered else Report(run=run, model=model.sha256)
    for manifest in (announced.ledger, announced.statistics, model):
        if manifest is not None and manifest.sha256 not in known.blobs:
            return Fetch(run=run, manifest=manifest, keep=known.blobs)
    statistics = _sha256(announced.statistics)
    return Finish(run=run, model=model.sha256, ledger=_sha256(announced.ledger), statistics=statistics)


def _plan_ended(known: PlanInput, announced: RoundState) -> PlanStep:
    run = announced.run
    if not known.took_part:
        # The broker keeps the last run's end until the next run begins.
        return Wait(why=f"run {run[:8]} is over; waiting for the next")
    if known.failure is not None:
        return Leave(run=run, problem=known.failure[1])
    if announced.phase == "failed":
        return Leave(run=run, problem=f"the run failed: {announced.detail}", run_failed=True)
    model = announced.base
    if known.is_finished:
        if model is not None and known.aggregator_online and ("finish", 0) not in known.answered:
            return Report(run=run, model=model.sha256)
        return Leave(run=run)
    statistics = _sha256(announced.statistics)
    needed = {_sha256(model), statistics} - {None}
    if model is not None and (known.blobs.issuperset(needed) or known.aggregator_online):
        for manifest in (announced.ledger, announced.statistics, model) if known.aggregator_online else ():
            if manifest is not None and manifest.sha256 not in known.blobs:
                return Fetch(run=run, manifest=manifest, keep=known.blobs)
        ledger = _sha256(announced.ledger)
        return Finish(
            run=run, model=model.sha256, ledger=ledger if ledger in known.blobs else None, statistics=statistics
        )
    if model is not None and known.aggregator_online is None:
        return Wait(why="the run is over; does the aggregator still hand out its model?")
    return Leave(run=run, problem="the run ended before this site had its final model; its deadline had passed")


def _sha256(manifest: BlobManifest | None) -> str | None:
    return None if manifest is None else manifest.sha256
