"""Decides whether what a site offers counts: the run's initial model, updates, statistics and memories.

Validation has two steps:

1. By the state of the run alone, before any byte is transferred. :func:`answer_from_state` gives the answer to an
   offer that does not depend on its blob: an offer that was accepted gets its receipt again, one that was refused its
   refusal, one that is late, stale or was not asked for is refused. :func:`validate_offer` refuses what cannot count
   whatever its bytes are: too large, or an implausible number of samples or steps. Both are pure. The same offer gets
   the same answer, however often it comes, so a site may repeat itself until it hears one.
2. By the blob, once it is in the store: :func:`validate_upload`. What an initial model or an update must be depends on
   what sites exchange (:mod:`aggregator.exchanges`); statistics must be of the final model's embeddings and have the
   form of those accepted before.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from aggregator.config import AggregateConfig
from aggregator.events import Round, RunState
from aggregator.exchanges import ValidationResult, message_without_path
from edgeflame.errors import DataError, NumericalError
from edgeflame.mqtt.messages import DownMessage, Offer, Receipt, Refusal, RefusalReason
from edgeflame.statistics.shared import StatisticsFile, header_difference
from edgeflame.transfer.compression import decode_update
from edgeflame.transfer.store import BlobStore

HEADER_SLACK_BYTES = 64 << 10
"""An update may be larger than expected by this much: safetensors headers differ by their metadata."""

MAX_REFUSALS_PER_ROUND = 5
"""After so many bad updates of a site in a round no further one is checked: it must not fill the journal."""


def answer_from_state(state: RunState, site: str, offer: Offer) -> DownMessage | None:
    """The answer to an offer by the state alone; None if it depends on the offer's size or blob."""
    if offer.run != state.run:
        return refusal_for(offer, "unknown_run", f"this run is {state.run}")
    if site not in state.members:
        return refusal_for(offer, "unknown_site", "not ready when it was offered")
    if (gone := state.left.get(site)) is not None and not _is_accepted(state, site, offer):
        return refusal_for(offer, "left", f"the site has left the run: {gone.detail}")
    return (
        _answer_initial(state, site, offer) if offer.purpose == "initial" else _answer_contribution(state, site, offer)
    )


def _is_accepted(state: RunState, site: str, offer: Offer) -> bool:
    entry = round_of_offer(state, offer)
    return entry is not None and site in entry.accepted and entry.accepted[site].sha256 == offer.manifest.sha256


def _answer_initial(state: RunState, site: str, offer: Offer) -> DownMessage | None:
    sha256 = offer.manifest.sha256
    if state.initial is not None:
        if (state.initial.site, state.initial.sha256) == (site, sha256):
            return receipt_for(offer)
        return refusal_for(offer, "late", "the run has its initial model")
    if (refused := state.refused_initial.get(site)) is not None:
        return refusal_for(offer, refused.reason, refused.detail)
    if state.phase != "initialise" or state.initial_sites_asked[-1] != site:
        return refusal_for(offer, "not_asked", "another site is asked for the initial model")
    return None


def _answer_contribution(state: RunState, site: str, offer: Offer) -> DownMessage | None:
    sha256 = offer.manifest.sha256
    asked = round_of_offer(state, offer)
    what = "the statistics phase" if offer.purpose == "statistics" else f"round {offer.round}"
    if asked is None or state.initial is None:
        return refusal_for(offer, "stale_round", f"{what} has not begun")
    if (accepted := asked.accepted.get(site)) is not None:
        if accepted.sha256 == sha256:
            return receipt_for(offer)
        return refusal_for(offer, "duplicate", f"{accepted.sha256} was accepted")
    if site not in asked.asked:
        return refusal_for(offer, "not_asked", f"{what} was given to {len(asked.asked)} other sites")
    # A run that was stopped leaves its round open.
    if asked.is_closed or state.ended is not None:
        reason: RefusalReason = "late" if asked is state.current_round else "stale_round"
        return refusal_for(offer, reason, f"{what} is closed")
    refused = asked.refused.get(site)
    if refused is not None and (
        refused.sha256 == sha256 or asked.num_refused[site] >= MAX_REFUSALS_PER_ROUND or refused.reason == "left"
    ):
        return refusal_for(offer, refused.reason, refused.detail)
    return None


def round_of_offer(state: RunState, offer: Offer) -> Round | None:
    """The round an update was trained in, or the statistics phase; None if there is no such round."""
    if offer.purpose == "statistics":
        return state.statistics if offer.round == 0 else None
    return next((r for r in state.rounds if r.number == offer.round), None)


def validate_offer(state: RunState, offer: Offer) -> ValidationResult | None:
    """The refusal of an offer that cannot count, whatever its bytes are; they are not fetched. None if it may count."""
    size, config = offer.manifest.size_bytes, state.config
    if offer.purpose != "initial" and not 1 <= offer.num_samples <= config.max_samples:
        return ValidationResult(reason="samples", detail=f"{offer.num_samples}; expected 1 to {config.max_samples}")
    if offer.purpose != "update":
        if size > config.max_model_bytes:
            detail = f"{size} bytes; at most {config.max_model_bytes} are taken"
            return ValidationResult(reason="too_large", detail=detail)
        return None
    if (problem := _implausible_step_count(offer, config)) is not None:
        return ValidationResult(reason="samples", detail=problem)
    initial_bytes = state.initial.size_bytes if state.initial is not None else 0
    expected = config.exchange.max_update_bytes(initial_bytes, config.learning)
    if size > expected + HEADER_SLACK_BYTES:
        return ValidationResult(reason="too_large", detail=f"{size} bytes; at most {expected} are expected")
    return None


def _implausible_step_count(offer: Offer, config: AggregateConfig) -> str | None:
    if offer.num_steps == 0:
        problem = f"the update does not say how many steps it took; {config.strategy_name} needs that"
        return problem if config.rule.needs_steps else None
    training = config.learning.training
    most = training.epochs * math.ceil(offer.num_samples / training.batch_size)
    if offer.num_steps > most:
        return f"{offer.num_steps} steps; {offer.num_samples} images allow at most {most}"
    return None


def receipt_for(offer: Offer) -> Receipt:
    """The answer to an offer that was accepted."""
    return Receipt(run=offer.run, purpose=offer.purpose, round=offer.round, sha256=offer.manifest.sha256)


def refusal_for(offer: Offer, reason: RefusalReason, detail: str) -> Refusal:
    """The answer to an offer that was refused."""
    return Refusal(
        run=offer.run,
        purpose=offer.purpose,
        round=offer.round,
        sha256=offer.manifest.sha256,
        reason=reason,
        detail=detail[:500],
    )


def validate_statistics(
    path: Path, *, config: AggregateConfig, model: str, num_samples: int, like: Path | None
) -> ValidationResult:
    """Whether a site's statistics can be pooled.

    Args:
        path: the blob.
        config: of the run; they must have the form that it asks for.
        model: SHA-256 of the final model; the statistics must be of its embeddings.
        num_samples: number of images by the offer.
        like: statistics that were accepted before, whose shape these must have; None for the first.
    """
    try:
        with StatisticsFile(path) as blob:
            header = blob.header
            if header.model != model:
                detail = f"statistics of the embeddings of model {header.model[:12]}; the final model is {model[:12]}"
                return ValidationResult(reason="space", detail=detail)
            if header.count != num_samples or header.sites:
                detail = f"statistics of {header.count} images of {len(header.sites) or 1} sites; {num_samples} offered"
                return ValidationResult(reason="samples", detail=detail)
            form, rank = config.statistics_form, config.statistics_rank
            if header.form != form or header.rank > rank:
                wanted = form if form == "moments" else f"{form} of rank {rank} at most"
                detail = f"statistics as {header.form} of rank {header.rank}; asked for was {wanted}"
                return ValidationResult(reason="schema", detail=detail)
            if like is not None:
                with StatisticsFile(like) as other:
                    if reason := header_difference(other.header, header):
                        return ValidationResult(reason="schema", detail=reason)
            blob.verify()
    except DataError as exc:
        return ValidationResult(reason="not_tensors", detail=message_without_path(exc, path))
    except NumericalError as exc:
        return ValidationResult(reason="impossible", detail=str(exc))
    return ValidationResult()


def validate_upload(state: RunState, offer: Offer, store: BlobStore) -> ValidationResult | None:
    """Check an offered blob that lies in the store; None if the offer belongs to no round of this run."""
    path, codec, exchange = store.path(offer.manifest.sha256), offer.manifest.codec, state.config.exchange
    if codec != "raw" and not (offer.purpose == "update" and exchange.compressible):
        return ValidationResult(reason="not_tensors", detail=f"encoded as {codec}; only updates of weights may be")
    if offer.purpose == "initial":
        return exchange.validate_initial(path)
    entry = round_of_offer(state, offer)
    if entry is None or entry.base_sha256 not in store:
        return None
    if entry.purpose == "statistics":
        like = next((store.path(part.sha256) for part in entry.accepted.values()), None)
        return validate_statistics(
            path, config=state.config, model=entry.base_sha256, num_samples=offer.num_samples, like=like
        )
    base, decoded = store.path(entry.base_sha256), None
    if codec != "raw":
        draft = store.draft_path("decoded")
        try:
            decode_update(codec, base, path, draft)
        except DataError as exc:
            return ValidationResult(reason="not_tensors", detail=message_without_path(exc, path))
        decoded = store.add(draft).sha256
        path = store.path(decoded)
    result = exchange.validate_update(path, base, num_samples=offer.num_samples, bounds=state.config)
    return replace(result, decoded=decoded)
