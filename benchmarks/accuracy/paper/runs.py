"""One run of an experiment: a simulation, or a peer on a simulation's images; done once, and kept under its name."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aggregator.simulation.config import SimulationConfig
from aggregator.simulation.engines import open_simulation_engine
from aggregator.simulation.run import simulate
from cli.simulate import answer_simulation_task
from edgeflame.config import load_config
from edgeflame.log import no_progress

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of one run.

    Attributes:
        simulation: as a configuration file would give it; its single-site data are what a peer sees.
        peer: a method of anomalib instead of ours.
    """

    simulation: dict[str, Any]
    peer: str | None = None

    @property
    def key(self) -> str:
        """Names the run's folder: the same settings are run once, whatever tables they stand in."""
        plain = msgspec.json.encode({"simulation": self.simulation, "peer": self.peer}, order="deterministic")
        return hashlib.sha256(plain).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a run.

    Attributes:
        figures: of the final global model; of sites that learn alone, their mean.
        classes: by defect class, in the same way.
        losses: mean training loss of each round, weighted as the sites are.
    """

    figures: Figures
    classes: dict[str, Figures]
    losses: list[float]


def outcome(run: Run, root: Path) -> Outcome | None:
    """The results of a run that is over; None if it is not."""
    metrics, ledger = root / run.key / "metrics.json", root / run.key / "ledger.json"
    if not metrics.exists() or (run.peer is None and not ledger.exists()):
        return None
    content = msgspec.json.decode(metrics.read_bytes())
    measured = [content["rounds"][-1]] if content["rounds"] else list(content["sites"].values())
    rounds = [] if run.peer is not None else msgspec.json.decode(ledger.read_bytes())["rounds"]
    return Outcome(
        figures=_mean([one["figures"] for one in measured]),
        classes={
            name: _mean([one["classes"][name] for one in measured if name in one["classes"]])
            for name in sorted({name for one in measured for name in one["classes"]})
        },
        losses=[
            sum(one["weight"] * one["metrics"].get("loss", 0.0) for one in entry["contributed"]) for entry in rounds
        ],
    )


def carry_out(run: Run, root: Path) -> None:
    """Start a run, or continue an interrupted one."""
    logging.getLogger("edgeflame").setLevel(logging.ERROR)
    out = root / run.key
    config = load_config(None, SimulationConfig, run.simulation)
    if run.peer is not None:
        from paper.peers import measure_peer

        measure_peer(run.peer, config, out)
        return
    with open_simulation_engine(config.engine, answer_simulation_task) as engine:
        simulate(config, out, engine, no_progress)


def _mean(figures: list[Figures]) -> Figures:
    names = set.intersection(*(set(one) for one in figures))
    return {name: sum(one[name] for one in figures) / len(figures) for name in sorted(names)}
