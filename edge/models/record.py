"""What was decided about each product's models, on the disk before it takes effect.

Pure transitions, one function each, from one :class:`ProductRecord` to the next; and :class:`RecordFile`, which
writes them whole or not at all. Whatever moment the power goes, the line starts with the last decision.

    (nothing) ──begin──> fetching ──advance──> shadow ──advance──> waiting        (a candidate)
                            │                    │                   │
                            └──────drop──────────┴───────────────────┤
                                                                     └──switch──> present, on trial
    present, on trial ──confirm──> present          present ──roll_back──> the one before, at last the file
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec

from edgeflame.errors import StorageError
from edgeflame.releases.messages import MAX_OUTCOMES, Disagreement, Fate, Outcome, Release, RunningModel, Stage
from edgeflame.statedir import write_durably

FORMAT = 1
MAX_DECIDED = 200
"""Releases remembered as dealt with, of a product; a broker that comes back from a backup may repeat old ones."""


class Version(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A released package that runs, or ran."""

    sha256: str
    release: str
    name: str
    since: datetime


class Pending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A release that does not run yet."""

    release: Release
    stage: Stage
    disagreement: Disagreement | None = None
    """Of the shadow run that it passed."""


class ProductRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One product."""

    configured: str
    """SHA-256 of the configuration's file when this was decided."""
    present: Version | None = None
    """None: the configuration's file."""
    previous: tuple[Version, ...] = ()
    """Newest first; after the last comes the configuration's file."""
    on_trial: bool = False
    candidate: Pending | None = None
    outcomes: tuple[Outcome, ...] = ()
    """Newest first."""
    decided: tuple[str, ...] = ()
    """Releases that were dealt with, newest first."""

    @property
    def present_sha256(self) -> str:
        return self.configured if self.present is None else self.present.sha256

    @property
    def needed(self) -> frozenset[str]:
        """Packages that must stay in the state folder."""
        versions = (*self.previous, *((self.present,) if self.present is not None else ()))
        held = {version.sha256 for version in versions}
        if self.candidate is not None and self.candidate.stage != "fetching":
            held.add(self.candidate.release.manifest.sha256)
        return frozenset(held)

    def running(self) -> RunningModel:
        """The present model, for others."""
        return _running(self.present, self.configured, on_trial=self.on_trial)

    def earlier(self) -> tuple[RunningModel, ...]:
        """What can be rolled back to, for others."""
        if self.present is None:
            return ()
        return (*(_running(one, "", on_trial=False) for one in self.previous), _running(None, self.configured))


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``record.json``."""

    format: int = FORMAT
    products: dict[str, ProductRecord] = {}


def begin(entry: ProductRecord, release: Release, now: datetime) -> ProductRecord:
    """Take a release up; one that was a candidate before gives way to it."""
    before = entry.candidate
    if before is not None and before.release.release != release.release:
        entry = drop(entry, "superseded", now, detail=f"by the release of {release.name or release.manifest.sha256}")
    return msgspec.structs.replace(entry, candidate=Pending(release=release, stage="fetching"))


def advance(entry: ProductRecord, stage: Stage, disagreement: Disagreement | None = None) -> ProductRecord:
    """The candidate is a step further."""
    assert entry.candidate is not None
    candidate = msgspec.structs.replace(entry.candidate, stage=stage, disagreement=disagreement)
    return msgspec.structs.replace(entry, candidate=candidate)


def drop(
    entry: ProductRecord,
    fate: Fate,
    now: datetime,
    *,
    reason: str | None = None,
    detail: str = "",
    disagreement: Disagreement | None = None,
) -> ProductRecord:
    """The candidate will not run."""
    assert entry.candidate is not None
    without = msgspec.structs.replace(entry, candidate=None)
    return decide(without, entry.candidate.release, fate, now, reason=reason, detail=detail, disagreement=disagreement)


def decide(
    entry: ProductRecord,
    release: Release,
    fate: Fate,
    now: datetime,
    *,
    reason: str | None = None,
    detail: str = "",
    disagreement: Disagreement | None = None,
) -> ProductRecord:
    """Note what became of a release; it is not taken up again."""
    outcome = Outcome(
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


def switch(entry: ProductRecord, now: datetime, *, keep: int, disagreement: Disagreement | None) -> ProductRecord:
    """The candidate is the present model from now on, on trial."""
    assert entry.candidate is not None
    release = entry.candidate.release
    before = () if entry.present is None else (entry.present,)
    version = Version(sha256=release.manifest.sha256, release=release.release, name=release.name, since=now)
    kept = tuple(one for one in (*before, *entry.previous) if one.sha256 != version.sha256)[:keep]
    entry = msgspec.structs.replace(entry, present=version, previous=kept, on_trial=True, candidate=None)
    return decide(entry, release, "running", now, disagreement=disagreement)


def confirm(entry: ProductRecord, now: datetime, disagreement: Disagreement | None) -> ProductRecord:
    """The trial is over, and well."""
    entry = msgspec.structs.replace(entry, on_trial=False)
    return _changed(entry, "confirmed", now, disagreement=disagreement)


def roll_back(
    entry: ProductRecord,
    now: datetime,
    *,
    fate: Fate = "rolled_back",
    reason: str,
    detail: str,
    to_file: bool = False,
    disagreement: Disagreement | None = None,
) -> ProductRecord:
    """Back to the model before, or to the configuration's file."""
    assert entry.present is not None
    entry = _changed(entry, fate, now, reason=reason, detail=detail, disagreement=disagreement)
    rest = () if to_file else entry.previous
    return msgspec.structs.replace(entry, present=rest[0] if rest else None, previous=rest[1:], on_trial=False)


def use_file(entry: ProductRecord, configured: str) -> ProductRecord:
    """The configuration names another file than when this was decided: the newer decision counts."""
    return msgspec.structs.replace(entry, configured=configured, present=None, previous=(), on_trial=False)


def _changed(
    entry: ProductRecord,
    fate: Fate,
    now: datetime,
    *,
    reason: str | None = None,
    detail: str = "",
    disagreement: Disagreement | None = None,
) -> ProductRecord:
    assert entry.present is not None
    present = entry.present
    before = next((one for one in entry.outcomes if one.release == present.release), None)
    measured = disagreement or (before.disagreement if before is not None else None)
    outcome = Outcome(
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


def _noted(entry: ProductRecord, outcome: Outcome) -> ProductRecord:
    others = tuple(one for one in entry.outcomes if one.release != outcome.release)
    known = tuple(one for one in entry.decided if one != outcome.release)
    return msgspec.structs.replace(
        entry,
        outcomes=(outcome, *others)[:MAX_OUTCOMES],
        decided=(outcome.release, *known)[:MAX_DECIDED],
    )


def _running(version: Version | None, configured: str, *, on_trial: bool = False) -> RunningModel:
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


class RecordFile:
    """The record on disk.

    Args:
        path: of the file.

    Raises:
        StorageError: it cannot be read, is damaged, or of another version; here and, for the disk, in :meth:`write`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.record = Record()
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as exc:
            msg = f"{path}: cannot be read ({exc.strerror})"
            raise StorageError(msg) from exc
        advice = f"without it the line runs its configuration's files: move {path.name} away if that is what you want"
        try:
            found = msgspec.json.decode(data, type=_Head).format
            if found != FORMAT:
                msg = f"{path}: format {found}, this version reads {FORMAT}; {advice}"
                raise StorageError(msg)
            self.record = msgspec.json.decode(data, type=Record)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            msg = f"{path}: damaged ({exc}); {advice}"
            raise StorageError(msg) from exc

    def write(self, product: str, entry: ProductRecord) -> None:
        """Change one product, durably."""
        record = msgspec.structs.replace(self.record, products={**self.record.products, product: entry})
        write_durably(self._path, msgspec.json.format(msgspec.json.encode(record), indent=1))
        self.record = record
