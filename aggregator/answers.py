"""What an offer is worth by the state of the run alone, before its bytes are looked at. Pure.

The same offer gets the same answer, however often it comes; so a site may repeat itself until it hears one.
"""

from __future__ import annotations

import math

from aggregator.config import AggregateConfig
from aggregator.facts import Round, RunState
from aggregator.models import Verdict
from aggregator.strategies import STRATEGIES, rule_name
from edgeflame.learning import METHODS
from edgeflame.memory_bank import MAX_CHANNELS
from edgeflame.messages import DownMessage, Offer, Reason, Receipt, Refusal

HEADER_SLACK_BYTES = 64 << 10
"""An update may be so much larger than the initial model: safetensors headers differ by their metadata."""

MAX_REFUSED = 5
"""So many updates of a site are looked at in a round, if each is bad: a site gone wrong must not fill the journal."""


def known_answer(state: RunState, site: str, offer: Offer) -> DownMessage | None:
    """The answer to an offer that needs no look at the blob; None if it does."""
    if offer.run != state.run:
        return refusal(offer, "unknown_run", f"this run is {state.run}")
    if site not in state.members:
        return refusal(offer, "unknown_site", "not ready when it was offered")
    if (gone := state.left.get(site)) is not None and not _accepted(state, site, offer):
        return refusal(offer, "left", f"the site has left the run: {gone.detail}")
    return _known_initial(state, site, offer) if offer.purpose == "initial" else _known_gathered(state, site, offer)


def _accepted(state: RunState, site: str, offer: Offer) -> bool:
    entry = round_of(state, offer)
    return entry is not None and site in entry.accepted and entry.accepted[site].sha256 == offer.manifest.sha256


def _known_initial(state: RunState, site: str, offer: Offer) -> DownMessage | None:
    sha256 = offer.manifest.sha256
    if state.initial is not None:
        if (state.initial.site, state.initial.sha256) == (site, sha256):
            return receipt(offer)
        return refusal(offer, "late", "the run has its initial model")
    if (refused := state.refused_sources.get(site)) is not None:
        return refusal(offer, refused.reason, refused.detail)
    if state.phase != "initialise" or state.sources[-1] != site:
        return refusal(offer, "not_asked", "another site is asked for the initial model")
    return None


def _known_gathered(state: RunState, site: str, offer: Offer) -> DownMessage | None:
    sha256 = offer.manifest.sha256
    asked = round_of(state, offer)
    what = "the statistics phase" if offer.purpose == "statistics" else f"round {offer.round}"
    if asked is None or state.initial is None:
        return refusal(offer, "stale_round", f"{what} has not begun")
    if (accepted := asked.accepted.get(site)) is not None:
        if accepted.sha256 == sha256:
            return receipt(offer)
        return refusal(offer, "duplicate", f"{accepted.sha256} was accepted")
    if site not in asked.asked:
        return refusal(offer, "not_asked", f"{what} was given to {len(asked.asked)} other sites")
    if asked.is_closed:
        reason: Reason = "late" if asked is state.gathering else "stale_round"
        return refusal(offer, reason, f"{what} is closed")
    refused = asked.refused.get(site)
    if refused is not None and (
        refused.sha256 == sha256 or asked.num_refused[site] >= MAX_REFUSED or refused.reason == "left"
    ):
        return refusal(offer, refused.reason, refused.detail)
    return None


def round_of(state: RunState, offer: Offer) -> Round | None:
    """The round an update was trained in, or the gathering of statistics; None if there is none such."""
    if offer.purpose == "statistics":
        return state.statistics if offer.round == 0 else None
    return next((r for r in state.rounds if r.number == offer.round), None)


def implausible(state: RunState, offer: Offer) -> Verdict | None:
    """The verdict on an offer that cannot count, whatever its bytes are; they need not come."""
    size, config = offer.manifest.size_bytes, state.config
    if offer.purpose == "initial":
        if size > config.max_model_bytes:
            return Verdict(reason="too_large", detail=f"{size} bytes; at most {config.max_model_bytes} are taken")
        return None
    if not 1 <= offer.num_samples <= config.max_samples:
        return Verdict(reason="samples", detail=f"{offer.num_samples}; expected 1 to {config.max_samples}")
    if offer.purpose == "statistics":
        if size > config.max_model_bytes:
            return Verdict(reason="too_large", detail=f"{size} bytes; at most {config.max_model_bytes} are taken")
        return None
    if (problem := _implausible_steps(offer, config)) is not None:
        return Verdict(reason="samples", detail=problem)
    expected = state.initial.size_bytes if state.initial is not None else 0
    if METHODS[config.learning.method].exchange == "memory":
        # A run starts from an empty memory, which says nothing of how large they become.
        expected = config.learning.memory.prototypes * 4 * (MAX_CHANNELS + 3)
    if size > expected + HEADER_SLACK_BYTES:
        return Verdict(reason="too_large", detail=f"{size} bytes; at most {expected} are expected")
    return None


def _implausible_steps(offer: Offer, config: AggregateConfig) -> str | None:
    if offer.num_steps == 0:
        rule = rule_name(config.strategy, config.learning.method)
        needed = STRATEGIES[rule].needs_steps
        return f"the update does not say how many steps it took; {rule} needs that" if needed else None
    training = config.learning.training
    most = training.epochs * math.ceil(offer.num_samples / training.batch_size)
    if offer.num_steps > most:
        return f"{offer.num_steps} steps; {offer.num_samples} images allow at most {most}"
    return None


def receipt(offer: Offer) -> Receipt:
    """What a site gets for an offer that was accepted."""
    return Receipt(run=offer.run, purpose=offer.purpose, round=offer.round, sha256=offer.manifest.sha256)


def refusal(offer: Offer, reason: Reason, detail: str) -> Refusal:
    """What a site gets for one that was not."""
    return Refusal(
        run=offer.run,
        purpose=offer.purpose,
        round=offer.round,
        sha256=offer.manifest.sha256,
        reason=reason,
        detail=detail[:500],
    )
