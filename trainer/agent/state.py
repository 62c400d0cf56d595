"""A site's durable state, across restarts and power cuts, and the plan's input made from it.

    STATE/install                                who we are: one id for the life of this directory
    STATE/blobs, STATE/partial                   global models and the ledger
    STATE/runs/<run>/initial.json                the SHA-256 of our initial model (in blobs)
    STATE/runs/<run>/round-<n>/update.safetensors, outcome.json
    STATE/runs/<run>/private-<n>.safetensors     what the learning keeps from round to round, and nobody else may see
    STATE/runs/<run>/statistics/statistics.safetensors, outcome.json
    STATE/runs/<run>/finish/...                  the package and the statistics in it
    STATE/runs/<run>/finish.json

A JSON file is written last and vouches for the file beside it, whose hash it holds: damage is found at the start, and
what is damaged is made again. Nothing here says what the aggregator has: it is asked again, and answers again.
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
from edgeflame.state import atomic_write, file_sha256, fsync_folder, read_json, storage_errors, write_record
from edgeflame.tensors import canonicalise
from edgeflame.transfer.compression import encode_update
from edgeflame.transfer.store import BlobStore
from trainer.agent.plan import Finish, Gather, PlanInput, PlanStep, Prepare, Train
from trainer.agent.tasks import TaskResult

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
    """A finished training, or the finished statistics; the file it describes lies beside it."""

    num_samples: int
    num_steps: int = 0
    metrics: dict[str, float]
    base: Sha256 | None = None
    """SHA-256 of the global model it was made from. An aggregator that lost its newest events may make that round's
    model anew, and different."""
    sha256: Sha256 | None = None
    """Of the file beside it."""
    codec: Codec = "raw"
    """In which form the update is sent; if not raw, the encoded file lies beside the update."""
    sent_sha256: Sha256 | None = None
    """Of the encoded update."""

    @classmethod
    def of(cls, result: TaskResult, *, base: Sha256, codec: Codec = "raw") -> UpdateRecord:
        """The record of a task's result, made from the global model ``base``."""
        return cls(
            num_samples=result.num_samples,
            num_steps=result.num_steps,
            metrics=result.metrics,
            base=base,
            codec=codec,
        )


class FinishRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A finished site: the package it made, and from which final model."""

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
        self.install = self._load_install_id()
        self._discard_damaged()

    def initial(self, run: str) -> str | None:
        """SHA-256 of our initial model in a run; None if it was not made, or is not in the store any more."""
        record = self._load(self._run(run) / "initial.json", _InitialRecord)
        return None if record is None else record.sha256

    def store_initial(self, run: str, draft: Path) -> None:
        """Move a new initial model into the blob store."""
        canonical = self.temporary_path("initial.canonical")
        canonicalise(draft, canonical)
        manifest = self.store.add(canonical)
        draft.unlink(missing_ok=True)
        self._save(self._run(run) / "initial.json", _InitialRecord(sha256=manifest.sha256))

    def update(self, run: str, number: int) -> tuple[Path, UpdateRecord] | None:
        """The update of a round as it is to be sent, if it was trained."""
        folder = self._round(run, number)
        record = self._load(folder / "outcome.json", UpdateRecord)
        if record is None:
            return None
        return folder / ("update.safetensors" if record.codec == "raw" else ENCODED_UPDATE_FILE), record

    def store_update(self, run: str, number: int, draft: Path, record: UpdateRecord) -> None:
        """Store the update of a round, encoded as its record says, and delete those no longer needed."""
        folder = self._round(run, number)
        with storage_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        self._store_model(draft, folder / "update.safetensors", record)
        for old in self._trained_rounds(run)[:-KEPT_ROUNDS]:
            shutil.rmtree(self._round(run, old), ignore_errors=True)

    def discard_update(self, run: str, number: int) -> None:
        """Delete an update that was refused for what it contains: it is no model to learn from either."""
        shutil.rmtree(self._round(run, number), ignore_errors=True)

    def previous_update(self, run: str, number: int) -> Path | None:
        """This site's own model of the last round before ``number`` it trained in."""
        earlier = [trained for trained in self._trained_rounds(run) if trained < number]
        return self._round(run, earlier[-1]) / "update.safetensors" if earlier else None

    def store_private_state(self, run: str, number: int, draft: Path) -> None:
        """Store the private state that a round's training left for the next, if any; before :meth:`store_update`.

        It is the update that makes the round count: a training that is repeated reads what earlier rounds left.
        """
        if not draft.exists():
            return
        canonical = self.temporary_path("private.canonical")
        canonicalise(draft, canonical)
        with storage_errors(self._run(run), "write into"):
            self._run(run).mkdir(parents=True, exist_ok=True)
            canonical.replace(self._private(run, number))
            fsync_folder(self._run(run))
        draft.unlink(missing_ok=True)
        for old in self._private_rounds(run)[:-KEPT_ROUNDS]:
            self._private(run, old).unlink(missing_ok=True)

    def private_state(self, run: str, *, before: int | None = None) -> Path | None:
        """The private state that the last round, or the last one before a round, left."""
        rounds = [number for number in self._private_rounds(run) if before is None or number < before]
        return self._private(run, rounds[-1]) if rounds else None

    def discard_private_state(self, run: str, number: int) -> None:
        """Delete the private state of a round whose update was refused."""
        self._private(run, number).unlink(missing_ok=True)

    def statistics(self, run: str) -> tuple[Path, UpdateRecord] | None:
        """This site's part of the fleet's statistics, if it was computed."""
        folder = self._run(run) / "statistics"
        record = self._load(folder / "outcome.json", UpdateRecord)
        return None if record is None else (folder / "statistics.safetensors", record)

    def store_statistics(self, run: str, draft: Path, record: UpdateRecord) -> None:
        """Store the statistics to be sent, until the run is over."""
        folder = self._run(run) / "statistics"
        with storage_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        self._store_model(draft, folder / "statistics.safetensors", record)

    def package_dir(self, run: str) -> Path:
        """The folder that the package is written into; created."""
        folder = self._run(run) / "finish"
        with storage_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self, run: str) -> FinishRecord | None:
        """The record of the package, if it was made."""
        return self._load(self._run(run) / "finish.json", FinishRecord)

    def store_finished(self, run: str, finished: FinishRecord) -> None:
        """Store the record of the package, which lies in :meth:`package_dir`."""
        with storage_errors(self.package_dir(run), "sync"):
            fsync_folder(self.package_dir(run))
        self._save(self._run(run) / "finish.json", finished)

    def has_joined(self, run: str) -> bool:
        """Whether this site has begun a run."""
        return self._run(run).is_dir()

    def discard_other_runs(self, run: str) -> None:
        """Delete the state of all other runs."""
        runs = self._root / "runs"
        if runs.is_dir():
            for folder in runs.iterdir():
                if folder.name != run:
                    shutil.rmtree(folder, ignore_errors=True)

    def leave_run(self, run: str) -> None:
        """Forget a run that the site left for good; from now on this directory is another install of the site."""
        shutil.rmtree(self._run(run), ignore_errors=True)
        with storage_errors(self._root / "install", "remove"):
            (self._root / "install").unlink(missing_ok=True)

    def temporary_path(self, name: str) -> Path:
        """A path for the worker to write to."""
        return self._root / f".{name}.draft"

    def _load_install_id(self) -> str:
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

    def _discard_damaged(self) -> None:
        """Delete the records of files that a power cut damaged: they are made again, with the same bits."""
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
                    is_sound = any(file_sha256(path) == sha256 for path in models) and (
                        loaded.codec == "raw" or file_sha256(record.parent / ENCODED_UPDATE_FILE) == loaded.sent_sha256
                    )
                case FinishRecord(package=str(name), package_sha256=sha256):
                    is_sound = file_sha256(record.parent / "finish" / name) == sha256
                case _:
                    is_sound = loaded is not None
            if not is_sound:
                log.warning("damaged_memory_dropped", file=str(record.relative_to(self._root)))
                record.unlink(missing_ok=True)

    def _store_model(self, draft: Path, path: Path, record: UpdateRecord) -> None:
        canonicalise(draft, path)
        draft.unlink(missing_ok=True)
        if record.codec != "raw":
            assert record.base is not None
            record = _encode_update(record, self.store.path(record.base), path)
        # Last: it vouches for the file beside it.
        self._save(path.parent / "outcome.json", msgspec.structs.replace(record, sha256=file_sha256(path)))

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
        write_record(path, record)


def _encode_update(record: UpdateRecord, base: Path, update: Path) -> UpdateRecord:
    """Encode an update into a file beside it, unless that makes it no smaller."""
    sent = update.with_name(ENCODED_UPDATE_FILE)
    try:
        error = encode_update(record.codec, base, update, sent)
    except DataError as exc:
        # Not finite, or of other shapes: the aggregator is to say so, of the file as it is.
        log.warning("update_not_encoded", codec=record.codec, reason=str(exc))
        return msgspec.structs.replace(record, codec="raw")
    if sent.stat().st_size >= update.stat().st_size:
        sent.unlink()
        return msgspec.structs.replace(record, codec="raw")
    metrics = {**record.metrics, CODEC_ERROR: error}
    return msgspec.structs.replace(record, metrics=metrics, sent_sha256=file_sha256(sent))


BAD_UPDATE_REASONS: tuple[RefusalReason, ...] = ("corrupt", "not_tensors", "schema", "not_finite", "norm")
"""Reasons that say that the update itself is bad, not only that it does not count."""


def plan_input(
    state: SiteState,
    site: str,
    announced: RoundState | None,
    *,
    answered: frozenset[tuple[Purpose, int]] = frozenset(),
    failure: tuple[Purpose, str] | None = None,
    aggregator_online: bool | None = None,
) -> PlanInput:
    """Collect what the plan depends on."""
    if announced is None:
        return PlanInput(site=site)
    run = announced.run
    initial = state.initial(run)
    if announced.phase in ("waiting", "initialise") and initial is not None and initial not in state.store:
        initial = None
    finished = state.finished(run)
    manifests = (announced.base, announced.ledger, announced.statistics)
    named = [manifest.sha256 for manifest in manifests if manifest is not None]
    return PlanInput(
        site=site,
        announced=announced,
        took_part=state.has_joined(run),
        initial=initial,
        has_update=_is_of_announced_model(state.update(run, announced.round), announced),
        has_statistics=_is_of_announced_model(state.statistics(run), announced),
        blobs=frozenset(sha256 for sha256 in named if sha256 in state.store),
        is_finished=finished is not None and announced.base is not None and finished.model == announced.base.sha256,
        answered=answered,
        failure=failure,
        aggregator_online=aggregator_online,
    )


def _is_of_announced_model(stored: tuple[Path, UpdateRecord] | None, announced: RoundState) -> bool:
    """Whether there is such a file, made from the announced model."""
    made_of = None if stored is None else stored[1].base
    return stored is not None and (made_of is None or announced.base is None or made_of == announced.base.sha256)


def step_purpose(step: PlanStep) -> Purpose:
    """The purpose of a step, to be named when it fails."""
    purposes: dict[type[PlanStep], Purpose] = {
        Prepare: "initial",
        Train: "update",
        Gather: "statistics",
        Finish: "finish",
    }
    return purposes.get(type(step), "update")


def announced_learning(announced: RoundState) -> Learning:
    """The learning configuration of the announced run.

    Raises:
        ConfigError: this version does not know it.
    """
    try:
        return msgspec.json.decode(announced.learning, type=Learning)
    except (msgspec.DecodeError, UnicodeDecodeError, EdgeFlameError, RecursionError) as exc:
        raise ConfigError(
            f"the aggregator's learning configuration is not one this version ({__version__}) knows: {exc}"
        ) from exc
