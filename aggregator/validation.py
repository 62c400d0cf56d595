"""Decides whether what a site offers counts: the run's initial model, updates, statistics and memories.

Validation has two steps:

1. By the state of the run alone, before any byte is transferred. :func:`answer_from_state` gives the answer to an
   offer that needs no look at its blob: an offer that was accepted gets its receipt again, one that was refused its
   refusal, one that is late, stale or was not asked for is refused. :func:`validate_offer` refuses what cannot count
   whatever its bytes are: too large, or an implausible number of samples or steps. Both are pure. The same offer gets
   the same answer, however often it comes, so a site may repeat itself until it hears one.
2. By the blob, once it is in the store: :func:`validate_upload`. Weights must have the base model's schema, be finite
   and not be further from the base than allowed; statistics must be of the final model's embeddings and have the form
   of those accepted before; a memory (FedDyMem) must be of the run's embeddings, within bounds and above the privacy
   floor.

Files are read tensor by tensor, in blocks: the memory needed does not grow with the size of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aggregator.config import AggregateConfig
from aggregator.events import Round, RunState
from aggregator.strategies import STRATEGIES, resolve_strategy
from edgeflame.errors import DataError, NumericalError
from edgeflame.methods import METHODS
from edgeflame.mqtt.messages import DownMessage, Offer, Receipt, Refusal, RefusalReason
from edgeflame.statistics.memory import MAX_CHANNELS, MemoryBank, read_bank
from edgeflame.statistics.merge import StatisticsFile, header_difference
from edgeflame.tensors import TensorFile, schema_difference
from edgeflame.transfer.compression import decode_update
from edgeflame.transfer.store import BlobStore


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Whether a model counts.

    Attributes:
        reason: why not; None if it does.
        detail: the reason in words.
        relative_change: the distance to the base model over the base model's norm.
        decoded: SHA-256 of the update in the store, if it came encoded.
    """

    reason: RefusalReason | None = None
    detail: str = ""
    relative_change: float = 0.0
    decoded: str | None = None


HEADER_SLACK_BYTES = 64 << 10
"""An update may be so much larger than the initial model: safetensors headers differ by their metadata."""

MAX_REFUSALS_PER_ROUND = 5
"""So many updates of a site are looked at in a round, if each is bad: a site gone wrong must not fill the journal."""


def answer_from_state(state: RunState, site: str, offer: Offer) -> DownMessage | None:
    """The answer to an offer that needs no look at the blob; None if it does."""
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
    if (refused := state.refused_sources.get(site)) is not None:
        return refusal_for(offer, refused.reason, refused.detail)
    if state.phase != "initialise" or state.sources[-1] != site:
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
    if asked.is_closed:
        reason: RefusalReason = "late" if asked is state.gathering else "stale_round"
        return refusal_for(offer, reason, f"{what} is closed")
    refused = asked.refused.get(site)
    if refused is not None and (
        refused.sha256 == sha256 or asked.num_refused[site] >= MAX_REFUSALS_PER_ROUND or refused.reason == "left"
    ):
        return refusal_for(offer, refused.reason, refused.detail)
    return None


def round_of_offer(state: RunState, offer: Offer) -> Round | None:
    """The round an update was trained in, or the gathering of statistics; None if there is none such."""
    if offer.purpose == "statistics":
        return state.statistics if offer.round == 0 else None
    return next((r for r in state.rounds if r.number == offer.round), None)


def validate_offer(state: RunState, offer: Offer) -> ValidationResult | None:
    """The verdict on an offer that cannot count, whatever its bytes are; they need not come."""
    size, config = offer.manifest.size_bytes, state.config
    if offer.purpose == "initial":
        if size > config.max_model_bytes:
            return ValidationResult(
                reason="too_large", detail=f"{size} bytes; at most {config.max_model_bytes} are taken"
            )
        return None
    if not 1 <= offer.num_samples <= config.max_samples:
        return ValidationResult(reason="samples", detail=f"{offer.num_samples}; expected 1 to {config.max_samples}")
    if offer.purpose == "statistics":
        if size > config.max_model_bytes:
            return ValidationResult(
                reason="too_large", detail=f"{size} bytes; at most {config.max_model_bytes} are taken"
            )
        return None
    if (problem := _implausible_step_count(offer, config)) is not None:
        return ValidationResult(reason="samples", detail=problem)
    expected = state.initial.size_bytes if state.initial is not None else 0
    if METHODS[config.learning.method].exchange == "memory":
        # A run starts from an empty memory, which says nothing of how large they become.
        expected = config.learning.memory.prototypes * 4 * (MAX_CHANNELS + 3)
    if size > expected + HEADER_SLACK_BYTES:
        return ValidationResult(reason="too_large", detail=f"{size} bytes; at most {expected} are expected")
    return None


def _implausible_step_count(offer: Offer, config: AggregateConfig) -> str | None:
    if offer.num_steps == 0:
        rule = resolve_strategy(config.strategy, config.learning.method)
        needed = STRATEGIES[rule].needs_steps
        return f"the update does not say how many steps it took; {rule} needs that" if needed else None
    training = config.learning.training
    most = training.epochs * math.ceil(offer.num_samples / training.batch_size)
    if offer.num_steps > most:
        return f"{offer.num_steps} steps; {offer.num_samples} images allow at most {most}"
    return None


def receipt_for(offer: Offer) -> Receipt:
    """What a site gets for an offer that was accepted."""
    return Receipt(run=offer.run, purpose=offer.purpose, round=offer.round, sha256=offer.manifest.sha256)


def refusal_for(offer: Offer, reason: RefusalReason, detail: str) -> Refusal:
    """What a site gets for one that was not."""
    return Refusal(
        run=offer.run,
        purpose=offer.purpose,
        round=offer.round,
        sha256=offer.manifest.sha256,
        reason=reason,
        detail=detail[:500],
    )


def validate_initial_model(path: Path) -> ValidationResult:
    """Whether a file can start a run: tensors, finite."""
    try:
        with TensorFile(path) as model:
            for name, spec in model.schema.items():
                for block in model.blocks(name):
                    if spec.is_float and not np.isfinite(block).all():
                        return ValidationResult(
                            reason="not_finite", detail=f"tensor {name!r} holds NaN or infinite values"
                        )
    except DataError as exc:
        return ValidationResult(reason="not_tensors", detail=message_without_path(exc, path))
    return ValidationResult()


def validate_update(path: Path, base: Path, *, max_relative_change: float) -> ValidationResult:
    """Whether an update fits its base model: schema, finite, not further away than allowed."""
    try:
        with TensorFile(base) as before, TensorFile(path) as after:
            if difference := schema_difference(before.schema, after.schema):
                return ValidationResult(reason="schema", detail=difference)
            change = norm = 0.0
            for name, spec in after.schema.items():
                if not spec.is_float:
                    continue
                for old, new in zip(before.blocks(name), after.blocks(name), strict=True):
                    values = new.astype(np.float64)
                    if not np.isfinite(values).all():
                        return ValidationResult(
                            reason="not_finite", detail=f"tensor {name!r} holds NaN or infinite values"
                        )
                    if name.endswith(".running_var") and (values < 0).any():
                        # Its root is taken: every score of the model would be NaN.
                        return ValidationResult(
                            reason="schema", detail=f"tensor {name!r}, a variance, holds negative values"
                        )
                    reference = old.astype(np.float64)
                    norm += float(np.dot(reference, reference))
                    values -= reference
                    # Near the top of float64 the square overflows to infinity, which is beyond any bound.
                    with np.errstate(over="ignore"):
                        change += float(np.dot(values, values))
    except DataError as exc:
        return ValidationResult(reason="not_tensors", detail=message_without_path(exc, path))
    # A base of zeros has no scale of its own; then the bound is absolute.
    relative = math.sqrt(change) / (math.sqrt(norm) or 1.0)
    if not relative <= max_relative_change:
        detail = f"{relative:.3g} times the base model's norm away from it; {max_relative_change:g} is allowed"
        return ValidationResult(reason="norm", detail=detail, relative_change=relative)
    return ValidationResult(relative_change=relative)


def validate_statistics(path: Path, *, model: str, num_samples: int, like: Path | None) -> ValidationResult:
    """Whether a site's statistics can be pooled.

    Args:
        path: the blob.
        model: SHA-256 of the final model, whose embeddings they must be of.
        num_samples: what the offer says.
        like: statistics that were accepted before, of which these must have the shape; None for the first.
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


def message_without_path(error: DataError, path: Path) -> str:
    """What is wrong with a file, for the site to read: not where the aggregator keeps it."""
    return str(error).removeprefix(f"{path}: ")


COUNT_TOLERANCE = 1e-4
"""Of effective counts, which travel as float32."""


def validate_initial_memory(path: Path) -> ValidationResult:
    """Whether a file can start a run: a memory bank, and an empty one, since no site has learnt yet."""
    bank = _read_memory(path)
    if isinstance(bank, ValidationResult):
        return bank
    if len(bank):
        return ValidationResult(
            reason="schema", detail=f"an initial memory is empty; this one has {len(bank)} prototypes"
        )
    return ValidationResult()


def validate_memory(path: Path, base: Path, config: AggregateConfig, *, num_samples: int) -> ValidationResult:
    """Whether a site's memory can be merged: of the run's embeddings, within bounds, above the privacy floor."""
    bank, settings = _read_memory(path), config.learning.memory
    if isinstance(bank, ValidationResult):
        return bank
    before = read_bank(base)
    if bank.space != before.space:
        detail = f"a memory of the embeddings {bank.space[:12]}; this run's are {before.space[:12]}: another backbone?"
        return ValidationResult(reason="space", detail=detail)
    if bank.num_channels != before.num_channels or not 1 <= len(bank) <= settings.prototypes:
        detail = (
            f"{len(bank)} prototypes of {bank.num_channels} channels; expected 1 to {settings.prototypes} of "
            f"{before.num_channels}"
        )
        return ValidationResult(reason="schema", detail=detail)
    if bank.count != num_samples:
        return ValidationResult(reason="samples", detail=f"a memory of {bank.count} images; {num_samples} were offered")
    for name, values, least in (
        ("patches", bank.effective_patches, settings.min_group),
        ("images", bank.effective_images, settings.min_images),
    ):
        if float(values.min()) < least * (1 - COUNT_TOLERANCE):
            detail = f"a prototype is worth {values.min():.3g} {name}; the privacy floor is {least:g}"
            return ValidationResult(reason="floor", detail=detail)
    if not len(before):
        return ValidationResult()
    size, reference = (float(np.sqrt(np.square(one.prototypes.astype(np.float64)).mean())) for one in (bank, before))
    most = 1 + config.max_relative_change
    if not size <= most * reference:
        detail = f"prototypes {size / reference:.3g} times as long as the fleet's; {most:g} are allowed"
        return ValidationResult(reason="norm", detail=detail)
    return ValidationResult()


def _read_memory(path: Path) -> MemoryBank | ValidationResult:
    try:
        return read_bank(path)
    except DataError as exc:
        # The site should read what is wrong, not where the aggregator keeps it.
        return _invalid("not_tensors", str(exc).removeprefix(f"{path}: "))
    except NumericalError as exc:
        return _invalid("not_finite", str(exc))


def _invalid(reason: RefusalReason, detail: str) -> ValidationResult:
    return ValidationResult(reason=reason, detail=detail)


def validate_upload(state: RunState, offer: Offer, store: BlobStore) -> ValidationResult | None:
    """What the checks say of an offered model that lies in the store; None if the offer is of no round of this run."""
    path, codec = store.path(offer.manifest.sha256), offer.manifest.codec
    shares_memory = METHODS[state.config.learning.method].exchange == "memory"
    if codec != "raw" and (offer.purpose != "update" or shares_memory):
        return ValidationResult(reason="not_tensors", detail=f"encoded as {codec}; only updates of weights may be")
    if offer.purpose == "initial":
        return validate_initial_memory(path) if shares_memory else validate_initial_model(path)
    entry = round_of_offer(state, offer)
    if entry is None or entry.base not in store:
        return None
    if entry.purpose == "statistics":
        like = next((store.path(part.sha256) for part in entry.accepted.values()), None)
        return validate_statistics(path, model=entry.base, num_samples=offer.num_samples, like=like)
    if shares_memory:
        return validate_memory(path, store.path(entry.base), state.config, num_samples=offer.num_samples)
    base, decoded = store.path(entry.base), None
    if codec != "raw":
        draft = store.draft("decoded")
        try:
            decode_update(codec, base, path, draft)
        except DataError as exc:
            return ValidationResult(reason="not_tensors", detail=message_without_path(exc, path))
        decoded = store.add(draft).sha256
        path = store.path(decoded)
    verdict = validate_update(path, base, max_relative_change=state.config.max_relative_change)
    return replace(verdict, decoded=decoded)
