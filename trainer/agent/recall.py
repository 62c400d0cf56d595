"""What a site knows when it plans its next step: from what was announced, and what its state directory holds."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgeflame import __version__
from edgeflame.errors import ConfigError, EdgeFlameError
from edgeflame.learning import Learning
from edgeflame.messages import Purpose, Reason, RoundState
from trainer.agent.memory import Memory, Outcome
from trainer.agent.plan import Finish, Gather, Knowledge, Prepare, Step, Train

BAD_MODEL: tuple[Reason, ...] = ("corrupt", "not_tensors", "schema", "not_finite", "norm")
"""Refusals that say that the update itself is bad, not only that it does not count."""


def recall(
    memory: Memory,
    site: str,
    announced: RoundState | None,
    *,
    answered: frozenset[tuple[Purpose, int]] = frozenset(),
    failure: tuple[Purpose, str] | None = None,
    aggregator_online: bool | None = None,
) -> Knowledge:
    """What the plan depends on."""
    if announced is None:
        return Knowledge(site=site)
    run = announced.run
    initial = memory.initial(run)
    if announced.phase in ("waiting", "initialise") and initial is not None and initial not in memory.store:
        initial = None
    finished = memory.finished(run)
    manifests = (announced.base, announced.ledger, announced.statistics)
    named = [manifest.sha256 for manifest in manifests if manifest is not None]
    return Knowledge(
        site=site,
        announced=announced,
        took_part=memory.took_part(run),
        initial=initial,
        has_update=_fits(memory.update(run, announced.round), announced),
        has_statistics=_fits(memory.statistics(run), announced),
        blobs=frozenset(sha256 for sha256 in named if sha256 in memory.store),
        is_finished=finished is not None and announced.base is not None and finished.model == announced.base.sha256,
        answered=answered,
        failure=failure,
        aggregator_online=aggregator_online,
    )


def _fits(kept: tuple[Path, Outcome] | None, announced: RoundState) -> bool:
    """Whether something was made, and of the announced model."""
    made_of = None if kept is None else kept[1].base
    return kept is not None and (made_of is None or announced.base is None or made_of == announced.base.sha256)


def purpose_of(step: Step) -> Purpose:
    """What a step that failed was for."""
    purposes: dict[type[Step], Purpose] = {
        Prepare: "initial",
        Train: "update",
        Gather: "statistics",
        Finish: "finish",
    }
    return purposes.get(type(step), "update")


def announced_learning(announced: RoundState) -> Learning:
    """The learning a fleet is to do.

    Raises:
        ConfigError: this version does not know it.
    """
    try:
        return msgspec.json.decode(announced.learning, type=Learning)
    except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError) as exc:
        msg = f"the aggregator's learning configuration is not one this version ({__version__}) knows: {exc}"
        raise ConfigError(msg) from exc
