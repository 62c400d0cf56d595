"""What a site asks of its worker, and what it keeps of the answer; the same over MQTT and in a simulation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeflame.console import EventLog
from edgeflame.learning import Learning
from edgeflame.messages import Offer, StatisticsWanted
from edgeflame.transfer.codec import usable
from edgeflame.transfer.manifest import DEFAULT_CHUNK_BYTES, describe_file
from trainer.agent.memory import Finished, Memory, Outcome
from trainer.agent.orders import Done, FinishOrder, InitialOrder, StatisticsOrder, TrainOrder

log = EventLog("site")

NO_OUTCOME = Outcome(num_samples=0, metrics={})
"""Of the initial model, which nothing was trained for."""


def initial_order(memory: Memory) -> InitialOrder:
    """The order for the initial model."""
    return InitialOrder(out=str(memory.draft("initial")))


def train_order(memory: Memory, learning: Learning, site: str, *, run: str, number: int, base: Path) -> TrainOrder:
    """The order for a round's update; the same however often it is given."""
    history, private = memory.history(run, number), memory.private(run, before=number)
    # A worker that was killed may have left one behind.
    memory.draft("private").unlink(missing_ok=True)
    return TrainOrder(
        round=number,
        base=str(base.resolve()),
        history=None if history is None else str(history.resolve()),
        out=str(memory.draft("update")),
        seed=task_seed(learning.seed, site, number),
        private=None if private is None else str(private),
        private_out=str(memory.draft("private")),
    )


def statistics_order(memory: Memory, *, model: str, wanted: StatisticsWanted) -> StatisticsOrder:
    """The order for what the fleet is to have of the site's statistics; ``model`` is the final model's SHA-256."""
    return StatisticsOrder(
        model=str(memory.store.path(model).resolve()),
        model_sha256=model,
        wanted=wanted,
        out=str(memory.draft("statistics")),
    )


def finish_order(
    memory: Memory, *, run: str, model: Path, ledger: Mapping[str, Any], statistics: Path | None = None
) -> FinishOrder:
    """The order for the site's package; ``statistics`` are the fleet's, where it shares them."""
    private = memory.private(run)
    return FinishOrder(
        model=str(model.resolve()),
        out_dir=str(memory.finish_dir(run).resolve()),
        ledger=dict(ledger),
        private=None if private is None else str(private),
        statistics=None if statistics is None else str(statistics.resolve()),
    )


def read_ledger(memory: Memory, run: str, model: str, sha256: str | None) -> dict[str, Any]:
    """The ledger from the store; the little that is known anyway if it could not be had, or is unreadable."""
    if sha256 is not None:
        try:
            data = memory.store.path(sha256).read_bytes()
            ledger: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
            log.warning("ledger_unreadable", reason=str(exc))
        else:
            return ledger
    return {"run": run, "model_sha256": model}


def make_offer(
    path: Path,
    *,
    run: str,
    purpose: Literal["initial", "update", "statistics"],
    number: int,
    outcome: Outcome,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Offer:
    """The offer of a model that lies at ``path``."""
    return Offer(
        run=run,
        purpose=purpose,
        round=number,
        manifest=msgspec.structs.replace(describe_file(path, chunk_bytes=chunk_bytes), codec=outcome.codec),
        num_samples=outcome.num_samples,
        num_steps=outcome.num_steps,
        metrics=outcome.metrics,
    )


def keep_update(
    memory: Memory, done: Done, *, run: str, number: int, base: str | None = None, codec: str = "raw"
) -> None:
    """Keep what a train order gave; ``base`` is its base model's SHA-256, ``codec`` how the fleet wants it sent."""
    outcome = Outcome(
        num_samples=done.num_samples,
        num_steps=done.num_steps,
        metrics=done.metrics,
        base=base,
        codec="raw" if base is None else usable(codec),
    )
    memory.keep_private(run, number, memory.draft("private"))
    memory.keep_update(run, number, memory.draft("update"), outcome)
    log.info("trained", round=number, num_samples=done.num_samples, **done.metrics)


def keep_statistics(memory: Memory, done: Done, *, run: str, model: str | None = None) -> None:
    """Keep what a statistics order gave; ``model`` is the final model's SHA-256."""
    outcome = Outcome(num_samples=done.num_samples, metrics=done.metrics, base=model)
    memory.keep_statistics(run, memory.draft("statistics"), outcome)
    log.info("statistics_made", num_samples=done.num_samples, **done.metrics)


def keep_finished(memory: Memory, done: Done, *, run: str, model: str) -> None:
    """Keep what a finish order gave; ``model`` is the final model's SHA-256."""
    package = None if done.package is None else Path(done.package)
    finished = Finished(
        model=model,
        package=None if package is None else package.name,
        package_sha256=None if package is None else describe_file(package).sha256,
        summary=done.summary,
    )
    memory.keep_finished(run, finished)
    log.info("package_made", **done.summary)


def task_seed(seed: int, site: str, number: int) -> int:
    """The seed of a site's round: 32 bits, which every generator takes, and another for each site and round."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{site}:{number}".encode()).digest()[:4], "big")
