"""A site's durable state, across restarts and power cuts, and what the plan is told of it.

    STATE/install                                who we are: one id for the life of this directory
    STATE/blobs, STATE/partial                   global models and the ledger
    STATE/runs/<run>/initial.json                the SHA-256 of our initial model (in blobs)
    STATE/runs/<run>/round-<n>/update.safetensors, outcome.json
    STATE/runs/<run>/private-<n>.safetensors     what the learning keeps from round to round, and nobody else may see
    STATE/runs/<run>/statistics/statistics.safetensors, outcome.json
    STATE/runs/<run>/finish/...                  the package and what else the work wrote
    STATE/runs/<run>/finish.json
    STATE/work                                   the work's own

A JSON file is written last and stands for what lies beside it, whose hash it holds: what is damaged is found at the
start, and made again. Nothing here says what the aggregator has: that is
asked again, and answered again.
"""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeflame import __version__
from edgeflame.errors import ConfigError, DataError, EdgeFlameError, StorageError
from edgeflame.log import EventLog
from edgeflame.methods import Learning
from edgeflame.mqtt.messages import Codec, Purpose, RefusalReason, RoundState, Sha256
from edgeflame.state import atomic_write, fsync_folder, read_json, storage_errors, write_json
from edgeflame.tensors import canonicalise
from edgeflame.transfer.compression import encode_update
from edgeflame.transfer.store import BlobStore, sha256_of
from trainer.agent.plan import Finish, Gather, PlanInput, PlanStep, Prepare, Train

log = EventLog("site")

KEPT_ROUNDS = 2
"""The current round's update, and the one before: the historical model."""

ENCODED_UPDATE_FILE = "update.encoded"

CODEC_ERROR = "codec_error"
"""Metric: how far what is sent is from the update, over the update's change."""

_INSTALL_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)

T = TypeVar("T")


class _InitialRecord(msgspec.Struct, frozen=True, kw_only=True):
    sha256: Sha256


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A finished training; the model lies beside it."""

    num_samples: int
    num_steps: int = 0
    metrics: dict[str, float]
    base: Sha256 | None = None
    """The global model it is of. An aggregator that lost its newest facts may make that round's anew, and another."""
    sha256: Sha256 | None = None
    """Of the file beside it."""
    codec: Codec = "raw"
    """In which form the update is sent; if not raw, that lies beside the update."""
    sent_sha256: Sha256 | None = None
    """Of the encoded update."""


class FinishRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A finished site: what it made of which final model."""

    model: Sha256
    package: str | None
    """Path below the run's ``finish`` folder."""
    package_sha256: str | None
    summary: dict[str, float | str]


class SiteState:
    """A site's state directory, used by one process.

    Raises:
        StorageError: here and in every method, when the disk fails or a file of ours is damaged.
    """

    def __init__(self, root: Path) -> None:
        self._root = root = root.resolve()
        self.store = BlobStore(root)
        self.work_dir = root / "work"
        with storage_errors(root, "create"):
            self.work_dir.mkdir(exist_ok=True)
        self.install = self._install()
        self._drop_damaged()

    def initial(self, run: str) -> str | None:
        """SHA-256 of our initial model in a run; None if it was not made, or is not in the store any more."""
        record = self._load(self._run(run) / "initial.json", _InitialRecord)
        return None if record is None else record.sha256

    def keep_initial(self, run: str, draft: Path) -> None:
        """Take a new initial model into the store."""
        canonical = self.draft("initial.canonical")
        canonicalise(draft, canonical)
        manifest = self.store.add(canonical)
        draft.unlink(missing_ok=True)
        self._save(self._run(run) / "initial.json", _InitialRecord(sha256=manifest.sha256))

    def update(self, run: str, number: int) -> tuple[Path, UpdateRecord] | None:
        """The update of a round as it is to be sent, if it was trained."""
        folder = self._round(run, number)
        outcome = self._load(folder / "outcome.json", UpdateRecord)
        if outcome is None:
            return None
        return folder / ("update.safetensors" if outcome.codec == "raw" else ENCODED_UPDATE_FILE), outcome

    def keep_update(self, run: str, number: int, draft: Path, outcome: UpdateRecord) -> None:
        """Keep the update of a round, encoded as its outcome says, and forget those no longer needed."""
        folder = self._round(run, number)
        with storage_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        self._keep_model(draft, folder / "update.safetensors", outcome)
        for old in self._trained_rounds(run)[:-KEPT_ROUNDS]:
            shutil.rmtree(self._round(run, old), ignore_errors=True)

    def forget_update(self, run: str, number: int) -> None:
        """An update was refused for what it is: it is no model to learn from either."""
        shutil.rmtree(self._round(run, number), ignore_errors=True)

    def history(self, run: str, number: int) -> Path | None:
        """This site's own model of the last round before ``number`` it trained in."""
        earlier = [trained for trained in self._trained_rounds(run) if trained < number]
        return self._round(run, earlier[-1]) / "update.safetensors" if earlier else None

    def keep_private(self, run: str, number: int, draft: Path) -> None:
        """Keep what a round's training left for the next, if it did; call it before :meth:`keep_update`.

        That is what makes the round count: a training that is repeated reads what the rounds before it left.
        """
        if not draft.exists():
            return
        canonical = self.draft("private.canonical")
        canonicalise(draft, canonical)
        with storage_errors(self._run(run), "write into"):
            self._run(run).mkdir(parents=True, exist_ok=True)
            canonical.replace(self._private(run, number))
            fsync_folder(self._run(run))
        draft.unlink(missing_ok=True)
        for old in self._private_rounds(run)[:-KEPT_ROUNDS]:
            self._private(run, old).unlink(missing_ok=True)

    def private(self, run: str, *, before: int | None = None) -> Path | None:
        """What the last round, or the last before a round, left."""
        rounds = [number for number in self._private_rounds(run) if before is None or number < before]
        return self._private(run, rounds[-1]) if rounds else None

    def forget_private(self, run: str, number: int) -> None:
        """An update does not count: nor does what its training left."""
        self._private(run, number).unlink(missing_ok=True)

    def statistics(self, run: str) -> tuple[Path, UpdateRecord] | None:
        """What the fleet is to have of our statistics, if it was made."""
        folder = self._run(run) / "statistics"
        outcome = self._load(folder / "outcome.json", UpdateRecord)
        return None if outcome is None else (folder / "statistics.safetensors", outcome)

    def keep_statistics(self, run: str, draft: Path, outcome: UpdateRecord) -> None:
        """Keep them until the run is over."""
        folder = self._run(run) / "statistics"
        with storage_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        self._keep_model(draft, folder / "statistics.safetensors", outcome)

    def finish_dir(self, run: str) -> Path:
        """Where the work writes the package; exists."""
        folder = self._run(run) / "finish"
        with storage_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self, run: str) -> FinishRecord | None:
        return self._load(self._run(run) / "finish.json", FinishRecord)

    def keep_finished(self, run: str, finished: FinishRecord) -> None:
        with storage_errors(self.finish_dir(run), "sync"):
            fsync_folder(self.finish_dir(run))
        self._save(self._run(run) / "finish.json", finished)

    def took_part(self, run: str) -> bool:
        """Whether this site has begun with a run."""
        return self._run(run).is_dir()

    def forget_other_runs(self, run: str) -> None:
        """Delete what belongs to runs before this one."""
        runs = self._root / "runs"
        if runs.is_dir():
            for folder in runs.iterdir():
                if folder.name != run:
                    shutil.rmtree(folder, ignore_errors=True)

    def forget_membership(self, run: str) -> None:
        """This site has left a run: whoever uses this directory next is another install of it."""
        shutil.rmtree(self._run(run), ignore_errors=True)
        with storage_errors(self._root / "install", "remove"):
            (self._root / "install").unlink(missing_ok=True)

    def draft(self, name: str) -> Path:
        """A path for the worker to write to."""
        return self._root / f".{name}.draft"

    def _install(self) -> str:
        path = self._root / "install"
        if path.exists():
            with storage_errors(path, "read"):
                install = path.read_text("ascii", "replace").strip()
            if _INSTALL_ID.fullmatch(install):
                return install
            log.warning("damaged_memory_dropped", file=path.name)
        install = uuid.uuid4().hex
        atomic_write(path, install.encode())
        return install

    def _drop_damaged(self) -> None:
        """Forget what a power cut may have damaged: it is made again, with the same bits."""
        for record in sorted(self._root.glob("runs/*/**/*.json")):
            kinds: dict[str, Any] = {
                "initial.json": _InitialRecord,
                "outcome.json": UpdateRecord,
                "finish.json": FinishRecord,
            }
            kind = kinds.get(record.name)
            if kind is None or record.parent.name == "finish":
                continue
            try:
                loaded = self._load(record, kind)
            except StorageError:
                loaded = None
            match loaded:
                case UpdateRecord(sha256=str(sha256)):
                    models = record.parent.glob("*.safetensors")
                    is_sound = any(sha256_of(path) == sha256 for path in models) and (
                        loaded.codec == "raw" or sha256_of(record.parent / ENCODED_UPDATE_FILE) == loaded.sent_sha256
                    )
                case FinishRecord(package=str(name), package_sha256=sha256):
                    is_sound = sha256_of(record.parent / "finish" / name) == sha256
                case _:
                    is_sound = loaded is not None
            if not is_sound:
                log.warning("damaged_memory_dropped", file=str(record.relative_to(self._root)))
                record.unlink(missing_ok=True)

    def _keep_model(self, draft: Path, path: Path, outcome: UpdateRecord) -> None:
        canonicalise(draft, path)
        draft.unlink(missing_ok=True)
        if outcome.codec != "raw":
            assert outcome.base is not None
            outcome = _encode_kept_update(outcome, self.store.path(outcome.base), path)
        # Last: it stands for the model beside it.
        self._save(path.parent / "outcome.json", msgspec.structs.replace(outcome, sha256=sha256_of(path)))

    def _run(self, run: str) -> Path:
        return self._root / "runs" / run

    def _round(self, run: str, number: int) -> Path:
        return self._run(run) / f"round-{number:06d}"

    def _private(self, run: str, number: int) -> Path:
        return self._run(run) / f"private-{number:06d}.safetensors"

    def _private_rounds(self, run: str) -> list[int]:
        return sorted(int(path.stem[8:]) for path in self._run(run).glob("private-*.safetensors"))

    def _trained_rounds(self, run: str) -> list[int]:
        return sorted(int(path.parent.name[6:]) for path in self._run(run).glob("round-*/outcome.json"))

    def _load(self, path: Path, kind: type[T]) -> T | None:
        return read_json(path, kind, advice=f"remove {path.parent} to begin this part again")

    def _save(self, path: Path, record: msgspec.Struct) -> None:
        with storage_errors(path.parent, "create"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def _encode_kept_update(outcome: UpdateRecord, base: Path, update: Path) -> UpdateRecord:
    """Encode an update, into a file beside it; unless that makes it no smaller."""
    sent = update.with_name(ENCODED_UPDATE_FILE)
    try:
        error = encode_update(outcome.codec, base, update, sent)
    except DataError as exc:
        # Not finite, or of other shapes: the aggregator is to say so, of the file as it is.
        log.warning("update_not_encoded", codec=outcome.codec, reason=str(exc))
        return msgspec.structs.replace(outcome, codec="raw")
    if sent.stat().st_size >= update.stat().st_size:
        sent.unlink()
        return msgspec.structs.replace(outcome, codec="raw")
    metrics = {**outcome.metrics, CODEC_ERROR: error}
    return msgspec.structs.replace(outcome, metrics=metrics, sent_sha256=sha256_of(sent))


BAD_UPDATE_REASONS: tuple[RefusalReason, ...] = ("corrupt", "not_tensors", "schema", "not_finite", "norm")
"""Refusals that say that the update itself is bad, not only that it does not count."""


def plan_input(
    memory: SiteState,
    site: str,
    announced: RoundState | None,
    *,
    answered: frozenset[tuple[Purpose, int]] = frozenset(),
    failure: tuple[Purpose, str] | None = None,
    aggregator_online: bool | None = None,
) -> PlanInput:
    """What the plan depends on."""
    if announced is None:
        return PlanInput(site=site)
    run = announced.run
    initial = memory.initial(run)
    if announced.phase in ("waiting", "initialise") and initial is not None and initial not in memory.store:
        initial = None
    finished = memory.finished(run)
    manifests = (announced.base, announced.ledger, announced.statistics)
    named = [manifest.sha256 for manifest in manifests if manifest is not None]
    return PlanInput(
        site=site,
        announced=announced,
        took_part=memory.took_part(run),
        initial=initial,
        has_update=_is_of_announced_model(memory.update(run, announced.round), announced),
        has_statistics=_is_of_announced_model(memory.statistics(run), announced),
        blobs=frozenset(sha256 for sha256 in named if sha256 in memory.store),
        is_finished=finished is not None and announced.base is not None and finished.model == announced.base.sha256,
        answered=answered,
        failure=failure,
        aggregator_online=aggregator_online,
    )


def _is_of_announced_model(kept: tuple[Path, UpdateRecord] | None, announced: RoundState) -> bool:
    """Whether something was made, and of the announced model."""
    made_of = None if kept is None else kept[1].base
    return kept is not None and (made_of is None or announced.base is None or made_of == announced.base.sha256)


def step_purpose(step: PlanStep) -> Purpose:
    """What a step that failed was for."""
    purposes: dict[type[PlanStep], Purpose] = {
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
        raise ConfigError(
            f"the aggregator's learning configuration is not one this version ({__version__}) knows: {exc}"
        ) from exc
