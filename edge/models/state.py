"""The decisions about each product's models, written to disk before they take effect; and what a daemon starts with.

Each transition from one :class:`ProductState` to the next is a pure function; :class:`ModelStateFile` writes the states
atomically. Whenever the power fails, the line starts with the last decision.

    (nothing) ──begin──> fetching ──advance──> shadow ──advance──> waiting        (a candidate)
                            │                    │                   │
                            └──────drop──────────┴───────────────────┤
                                                                     └──promote──> present, on trial
    present, on trial ──confirm──> present          present ──roll back──> the one before, at last the file

At the start
------------
A daemon starts with its configuration's files or with the released models that were decided since, whichever is newer;
settling this writes nothing. A released model stays in use over restarts as long as the configuration's file is the
same as when the release was taken up; if the file has changed, it is used. A released package that is missing, damaged,
or not signed by a key that is trusted now is replaced by the one before it, and at last by the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from edge.models.store import PackageStore, RefusedError, TrustedKeys, read_trusted
from edgeflame.errors import StorageError
from edgeflame.log import EventLog
from edgeflame.mqtt.release_messages import (
    MAX_OUTCOMES,
    Disagreement,
    Release,
    ReleaseFate,
    ReleaseOutcome,
    ReleaseStage,
    RunningModel,
)
from edgeflame.state import write_json

FORMAT = 1
MAX_DECIDED = 200
"""Most decided releases remembered for each product; a broker restored from a backup may announce old ones again."""


class ReleasedVersion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A released package that runs, or ran."""

    sha256: str
    release: str
    name: str
    since: datetime


class PendingRelease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate: a release that is not in use yet."""

    release: Release
    stage: ReleaseStage
    disagreement: Disagreement | None = None
    """The comparison of the shadow run that it passed."""


class ProductState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The decisions about one product."""

    configured: str
    """SHA-256 of the configuration's file at the time of the decision."""
    present: ReleasedVersion | None = None
    """None: the configuration's file."""
    previous: tuple[ReleasedVersion, ...] = ()
    """Newest first; after the last comes the configuration's file."""
    on_trial: bool = False
    candidate: PendingRelease | None = None
    outcomes: tuple[ReleaseOutcome, ...] = ()
    """Newest first."""
    decided: tuple[str, ...] = ()
    """Ids of the releases that have been decided about, newest first."""

    @property
    def present_sha256(self) -> str:
        return self.configured if self.present is None else self.present.sha256

    @property
    def needed(self) -> frozenset[str]:
        """SHA-256 of the packages that must stay in the state folder."""
        versions = (*self.previous, *((self.present,) if self.present is not None else ()))
        held = {version.sha256 for version in versions}
        if self.candidate is not None and self.candidate.stage != "fetching":
            held.add(self.candidate.release.manifest.sha256)
        return frozenset(held)

    def running(self) -> RunningModel:
        """The present model, as published to the fleet."""
        return _running(self.present, self.configured, on_trial=self.on_trial)

    def earlier(self) -> tuple[RunningModel, ...]:
        """The models that can be rolled back to, as published to the fleet."""
        if self.present is None:
            return ()
        return (*(_running(one, "", on_trial=False) for one in self.previous), _running(None, self.configured))


class ModelState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``record.json``."""

    format: int = FORMAT
    products: dict[str, ProductState] = {}


def begin_candidate(entry: ProductState, release: Release, now: datetime) -> ProductState:
    """Make a release the candidate; an earlier candidate is superseded."""
    before = entry.candidate
    if before is not None and before.release.release != release.release:
        entry = drop_candidate(
            entry, "superseded", now, detail=f"by the release of {release.name or release.manifest.sha256}"
        )
    return msgspec.structs.replace(entry, candidate=PendingRelease(release=release, stage="fetching"))


def advance_candidate(
    entry: ProductState, stage: ReleaseStage, disagreement: Disagreement | None = None
) -> ProductState:
    """Move the candidate to its next stage."""
    assert entry.candidate is not None
    candidate = msgspec.structs.replace(entry.candidate, stage=stage, disagreement=disagreement)
    return msgspec.structs.replace(entry, candidate=candidate)


def drop_candidate(
    entry: ProductState,
    fate: ReleaseFate,
    now: datetime,
    *,
    reason: str | None = None,
    detail: str = "",
    disagreement: Disagreement | None = None,
) -> ProductState:
    """Drop the candidate, with its outcome."""
    assert entry.candidate is not None
    without = msgspec.structs.replace(entry, candidate=None)
    return record_outcome(
        without, entry.candidate.release, fate, now, reason=reason, detail=detail, disagreement=disagreement
    )


def record_outcome(
    entry: ProductState,
    release: Release,
    fate: ReleaseFate,
    now: datetime,
    *,
    reason: str | None = None,
    detail: str = "",
    disagreement: Disagreement | None = None,
) -> ProductState:
    """Record the outcome of a release; it will not be taken up again."""
    outcome = ReleaseOutcome(
        release=release.release,
        sha256=release.manifest.sha256,
        name=release.name,
        fate=fate,
        reason=reason,
        detail=detail[:500],
        at=now,
        disagreement=disagreement,
    )
    return _noted(entry, outcome)


def promote_candidate(
    entry: ProductState, now: datetime, *, keep: int, disagreement: Disagreement | None
) -> ProductState:
    """Make the candidate the present model, on trial."""
    assert entry.candidate is not None
    release = entry.candidate.release
    before = () if entry.present is None else (entry.present,)
    version = ReleasedVersion(sha256=release.manifest.sha256, release=release.release, name=release.name, since=now)
    kept = tuple(one for one in (*before, *entry.previous) if one.sha256 != version.sha256)[:keep]
    entry = msgspec.structs.replace(entry, present=version, previous=kept, on_trial=True, candidate=None)
    return record_outcome(entry, release, "running", now, disagreement=disagreement)


def confirm_present(entry: ProductState, now: datetime, disagreement: Disagreement | None) -> ProductState:
    """End the trial of the present model with success."""
    entry = msgspec.structs.replace(entry, on_trial=False)
    return _changed(entry, "confirmed", now, disagreement=disagreement)


def roll_back_present(
    entry: ProductState,
    now: datetime,
    *,
    fate: ReleaseFate = "rolled_back",
    reason: str,
    detail: str,
    to_file: bool = False,
    disagreement: Disagreement | None = None,
) -> ProductState:
    """Make the model before the present one, or the configuration's file."""
    assert entry.present is not None
    entry = _changed(entry, fate, now, reason=reason, detail=detail, disagreement=disagreement)
    rest = () if to_file else entry.previous
    return msgspec.structs.replace(entry, present=rest[0] if rest else None, previous=rest[1:], on_trial=False)


def use_configured_file(entry: ProductState, configured: str) -> ProductState:
    """Return to the configuration's file, because it has changed since the decision."""
    return msgspec.structs.replace(entry, configured=configured, present=None, previous=(), on_trial=False)


def reconsider_release(entry: ProductState, release: Release) -> ProductState:
    """Forget that a release was decided about, so that it is taken up again."""
    return msgspec.structs.replace(entry, decided=tuple(one for one in entry.decided if one != release.release))


def _changed(
    entry: ProductState,
    fate: ReleaseFate,
    now: datetime,
    *,
    reason: str | None = None,
    detail: str = "",
    disagreement: Disagreement | None = None,
) -> ProductState:
    assert entry.present is not None
    present = entry.present
    before = next((one for one in entry.outcomes if one.release == present.release), None)
    measured = disagreement or (before.disagreement if before is not None else None)
    outcome = ReleaseOutcome(
        release=present.release,
        sha256=present.sha256,
        name=present.name,
        fate=fate,
        reason=reason,
        detail=detail[:500],
        at=now,
        disagreement=measured,
    )
    return _noted(entry, outcome)


def _noted(entry: ProductState, outcome: ReleaseOutcome) -> ProductState:
    others = tuple(one for one in entry.outcomes if one.release != outcome.release)
    known = tuple(one for one in entry.decided if one != outcome.release)
    return msgspec.structs.replace(
        entry,
        outcomes=(outcome, *others)[:MAX_OUTCOMES],
        decided=(outcome.release, *known)[:MAX_DECIDED],
    )


def _running(version: ReleasedVersion | None, configured: str, *, on_trial: bool = False) -> RunningModel:
    if version is None:
        return RunningModel(sha256=configured, origin="file")
    return RunningModel(
        sha256=version.sha256,
        origin="release",
        name=version.name,
        release=version.release,
        since=version.since,
        on_trial=on_trial,
    )


class _Head(msgspec.Struct):
    format: int = 0


class ModelStateFile:
    """The file of the decisions, ``record.json``.

    Args:
        path: the file; it need not exist.

    Raises:
        StorageError: it cannot be read, is damaged, or has another format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.state = ModelState()
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StorageError(f"{path}: cannot be read ({exc.strerror})") from exc
        advice = f"without it the line runs its configuration's files: move {path.name} away if that is what you want"
        try:
            found = msgspec.json.decode(data, type=_Head).format
            if found != FORMAT:
                raise StorageError(f"{path}: format {found}, this version reads {FORMAT}; {advice}")
            self.state = msgspec.json.decode(data, type=ModelState)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise StorageError(f"{path}: damaged ({exc}); {advice}") from exc

    def save(self, product: str, entry: ProductState) -> None:
        """Change one product, durably.

        Raises:
            StorageError: the disk fails; nothing is changed then.
        """
        state = msgspec.structs.replace(self.state, products={**self.state.products, product: entry})
        write_json(self._path, state, indent=1)
        self.state = state


class ConfiguredProduct(msgspec.Struct, frozen=True, kw_only=True):
    """A product as the configuration has it."""

    name: str
    """Its name in the configuration."""
    product: str
    """Its name in its packages, and in the fleet."""
    file: str
    sha256: str
    release_number: int = 0
    """Of the package, if a trusted key vouches for it; 0: none."""


log = EventLog("models")


def settle_at_start(
    state: ModelState, products: Mapping[str, ConfiguredProduct], *, store: PackageStore, keys: TrustedKeys
) -> dict[str, ProductState]:
    """The state of each product at the start of a daemon.

    Args:
        state: the decisions of the last process.
        products: the configuration's products by their names in the fleet.
        store: the packages on the disk.
        keys: the trusted keys.
    """
    settled = {}
    for product, configured in products.items():
        entry = state.products.get(product, ProductState(configured=configured.sha256))
        if entry.configured != configured.sha256:
            if entry.present is not None:
                log.warning(
                    "model_from_file",
                    product=product,
                    file=configured.file,
                    reason="the configuration names another package than when the released one was taken",
                    instead_of=entry.present.sha256[:12],
                )
            entry = use_configured_file(entry, configured.sha256)
        while (present := entry.present) is not None:
            try:
                read_trusted(store.path(present.sha256), sha256=present.sha256, product=product, keys=keys)
            except RefusedError as exc:
                entry = fall_back(entry, product, exc.reason, str(exc))
            else:
                log.warning(
                    "model_from_release",
                    product=product,
                    sha256=present.sha256[:12],
                    name=present.name,
                    instead_of=configured.file,
                    back="edgeflame line rollback --to-file, or another file in the configuration",
                )
                break
        settled[product] = entry
    return settled


def fall_back(entry: ProductState, product: str, reason: str, detail: str) -> ProductState:
    """Roll back to the model before, because the present one cannot be used at the start."""
    log.error("released_model_not_used", product=product, reason=reason, detail=detail)
    return roll_back_present(entry, datetime.now(timezone.utc), reason=reason, detail=f"at the start: {detail}")


def package_files(
    settled: Mapping[str, ProductState], products: Mapping[str, ConfiguredProduct], store: PackageStore
) -> dict[str, Path]:
    """Package files by the configuration's names of products."""
    return {
        configured.name: Path(configured.file)
        if (present := settled[product].present) is None
        else store.path(present.sha256)
        for product, configured in products.items()
    }
