"""The rollout of models: acceptance of a candidate after its shadow run, and switches and rollbacks on the cameras.

Order of every change: the new inspectors are opened and checked, then the state file is written, then the cameras use
them. A crash before the write leaves the old model in use, a crash after it the new one.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol, final

import msgspec

from edge.cameras import Cameras
from edge.config.outputs import ModelsConfig
from edge.inspector import Inspector, InspectorProtocol
from edge.models.shadow import Canary, Shadow, ShadowModel, slowdown_of
from edge.models.state import (
    ConfiguredProduct,
    ModelStateFile,
    ProductState,
    drop_candidate,
    promote_candidate,
    roll_back_present,
)
from edge.models.store import PackageStore, RefusedError, as_refusal
from edge.runtimes.interface import Runtime, check_runtime_fits
from edge.runtimes.load import open_runtime
from edgeflame.errors import EdgeFlameError, PackageError, UsageError
from edgeflame.log import EventLog
from edgeflame.mqtt.release_messages import Disagreement, ReleaseFate
from edgeflame.package import Package, read_package


class AcceptanceResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a shadow run that is over."""

    passed: bool
    reason: str = ""
    """One word for programs; empty if passed."""
    detail: str = ""
    """The reason for people."""


class LatencyBudget(msgspec.Struct, frozen=True, kw_only=True):
    """The present model's latency, and the limit for it."""

    latency_ms: float | None = None
    """95% quantile from capture to verdict; None: too few parts yet."""
    deadline_ms: float | None = None
    """Deadline of a part; None: there is none."""


def check_acceptance(
    found: Disagreement, *, needed: int, config: ModelsConfig, times: LatencyBudget
) -> AcceptanceResult | None:
    """Decide about a shadow run; None while it has to go on.

    A single failure of the candidate refuses it: in use, it would be a part without a verdict. A candidate that can no
    longer pass is refused before the end.

    Args:
        found: the comparison so far.
        needed: number of parts that both models have to inspect.
        config: section ``[models]`` with the limits.
        times: the present model's latency and the deadline.
    """
    if found.faults:
        detail = f"{found.faults} of {found.parts + found.faults} parts without a score, or with one that is not finite"
        return AcceptanceResult(passed=False, reason="faults", detail=detail)
    if found.slowdown is not None and (slow := _too_slow(found.slowdown, config, times)) is not None:
        return AcceptanceResult(passed=False, reason="too_slow", detail=slow)
    allowed = config.max_disagreement * needed
    if found.differing > allowed:
        detail = (
            f"other verdicts on {found.differing} of {found.parts} parts ({found.newly_failed} newly failed, "
            f"{found.newly_passed} newly passed); of {needed} at most {int(allowed)} may differ"
        )
        return AcceptanceResult(passed=False, reason="disagreement", detail=detail)
    return AcceptanceResult(passed=True) if found.parts >= needed else None


def _too_slow(slowdown: float, config: ModelsConfig, times: LatencyBudget) -> str | None:
    if slowdown > config.max_slowdown:
        return f"{slowdown:.2f} times the present model's computing time; {config.max_slowdown:g} are allowed"
    if times.latency_ms is not None and times.deadline_ms is not None and slowdown > 1:
        expected_ms = times.latency_ms * slowdown
        if expected_ms > times.deadline_ms:
            return (
                f"{slowdown:.2f} times the present model's computing time would be {expected_ms:.0f} ms a part; the "
                f"deadline is {times.deadline_ms:g} ms"
            )
    return None


class Deployment(Protocol):
    """Puts models on cameras; :class:`CameraDeployment` implements it."""

    def open(self, name: str, file: Path, sha256: str) -> Mapping[str, InspectorProtocol]:
        """Warmed-up inspectors, checked on the package's reference images, for each camera that has the product now.

        If no camera has it, the package is opened for the first camera, to check that it can be used here.

        Args:
            name: the product's name in the configuration.
            file: the package.
            sha256: the package's expected hash.

        Returns:
            The inspectors by camera.

        Raises:
            EdgeFlameError: the package cannot be used here.
        """
        ...

    def deploy(
        self, name: str, file: Path, inspectors: Mapping[str, InspectorProtocol]
    ) -> Mapping[str, InspectorProtocol]:
        """Use these inspectors from the next part on, and the package wherever the product is inspected later.

        Returns:
            The replaced inspectors, by camera.

        Raises:
            EdgeFlameError: a part being inspected does not come to an end.
        """
        ...

    def has_strays(self, name: str, sha256: str) -> bool:
        """Whether a camera inspects the product with another package."""
        ...

    def open_shadow(self, name: str, file: Path, present: Path) -> ShadowModel:
        """Open a package for a shadow run; called on the thread of the shadow run.

        Args:
            name: the product's name in the configuration.
            file: the package to be tried.
            present: the present model's package, to compare the computing time.

        Raises:
            EdgeFlameError: the package cannot be opened.
        """
        ...


@final
class CameraDeployment:
    """Deployment on the cameras of a daemon.

    Args:
        cameras: the daemon's.
    """

    def __init__(self, cameras: Cameras) -> None:
        self._cameras = cameras

    def open(self, name: str, file: Path, sha256: str) -> Mapping[str, InspectorProtocol]:
        workers = [
            worker for worker in self._cameras.workers if worker.inspector.product == name
        ] or self._cameras.workers[:1]
        inspectors = {worker.name: self._cameras.open_package(worker.name, name, file) for worker in workers}
        if any(not sha256.startswith(inspector.model_id) for inspector in inspectors.values()):
            raise PackageError(f"{file}: it is another package now than the one that was checked ({sha256[:12]})")
        return inspectors

    def deploy(
        self, name: str, file: Path, inspectors: Mapping[str, InspectorProtocol]
    ) -> Mapping[str, InspectorProtocol]:
        return self._cameras.use_package(name, file, inspectors)

    def has_strays(self, name: str, sha256: str) -> bool:
        return any(
            worker.inspector.product == name and not sha256.startswith(worker.inspector.model_id)
            for worker in self._cameras.workers
        )

    def open_shadow(self, name: str, file: Path, present: Path) -> ShadowModel:
        package = read_package(file)
        runtime = single_threaded(package)
        inspectors = {
            worker.name: Inspector(
                package, runtime, self._cameras.settings(worker.name), camera=worker.name, product=name
            )
            for worker in self._cameras.workers
        }
        return ShadowModel(inspectors=inspectors, slowdown=slowdown_of(runtime, single_threaded(read_package(present))))


def single_threaded(package: Package) -> Runtime:
    """A runtime on one CPU thread, whatever the cameras compute on, so that a shadow run takes little from them."""
    runtime = open_runtime(package.model_onnx, device="cpu", num_threads=1)
    check_runtime_fits(runtime, package.manifest)
    return runtime


log = EventLog("models")

LATENCIES = 500
"""Number of the present model's latencies kept for the quantile."""


def utc_now() -> datetime:
    """The present time, UTC."""
    return datetime.now(timezone.utc)


class RolloutSlot:
    """In-memory state of one product's rollout."""

    def __init__(self, configured: ConfiguredProduct) -> None:
        self.configured = configured
        self.shadow: Shadow | None = None
        self.canary: Canary | None = None
        self.inspectors: Mapping[str, InspectorProtocol] | None = None
        """The candidate's inspectors by camera, ready for use; None: not opened yet."""
        self.before: tuple[str, Mapping[str, InspectorProtocol]] | None = None
        """SHA-256 and inspectors of the model before, while the present one is on trial."""
        self.latencies: collections.deque[float] = collections.deque(maxlen=LATENCIES)


@final
class Rollouts:
    """The rollouts of all products; used by one thread.

    Args:
        products: the configuration's products by their names in the fleet.
        deployment: puts models on the cameras.
        store: the packages on the disk.
        state_file: the decisions.
        keep: number of released models kept to roll back to.
        clock: returns the time, UTC.

    Raises:
        StorageError: a decision cannot be written, or the disk fails; so in every method that decides.
    """

    def __init__(
        self,
        products: Mapping[str, ConfiguredProduct],
        *,
        deployment: Deployment,
        store: PackageStore,
        state_file: ModelStateFile,
        keep: int,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.slots = {product: RolloutSlot(configured) for product, configured in products.items()}
        self.by_model: Mapping[str, RolloutSlot] = {}
        """Slots by the present model's id; replaced as a whole, so that other threads may read it."""
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        """Number of releases since the start by product, as the configuration names it, and fate."""
        self._deployment = deployment
        self._store = store
        self._state_file = state_file
        self._keep = keep
        self._clock = clock
        self._index()
        self.prune()

    def state_of(self, product: str) -> ProductState:
        """The state of a product, by its name in the fleet."""
        known = self._state_file.state.products.get(product)
        return known or ProductState(configured=self.slots[product].configured.sha256)

    def known(self, product: str) -> ProductState:
        """The state of a product, by its name in the fleet or in the configuration; raises as :meth:`find`."""
        return self.state_of(self.find(product))

    def find(self, name: str) -> str:
        """A product's name in the fleet, found by that name or by the one in the configuration.

        Raises:
            UsageError: there is no such product.
        """
        for product, slot in self.slots.items():
            if name in (product, slot.configured.name):
                return product
        raise UsageError(f"no product {name!r}; there are {', '.join(self.slots)}")

    def save(self, product: str, entry: ProductState) -> None:
        """Write a product's new state, durably."""
        before = self.state_of(product)
        self._state_file.save(product, entry)
        if entry.outcomes[:1] != before.outcomes[:1]:
            self.outcomes[self.slots[product].configured.name, entry.outcomes[0].fate] += 1
        self._index()

    def _index(self) -> None:
        self.by_model = {self.state_of(product).present_sha256[:12]: slot for product, slot in self.slots.items()}

    def _path_of(self, slot: RolloutSlot, entry: ProductState) -> Path:
        return Path(slot.configured.file) if entry.present is None else self._store.path(entry.present.sha256)

    def file(self, slot: RolloutSlot) -> Path:
        """The present model's package."""
        return self._path_of(slot, self.state_of(slot.configured.product))

    def open(self, slot: RolloutSlot, path: Path, sha256: str) -> Mapping[str, InspectorProtocol]:
        """Inspectors of a package, checked and warm.

        Raises:
            RefusedError: the package cannot be used here.
        """
        try:
            return self._deployment.open(slot.configured.name, path, sha256)
        except EdgeFlameError as exc:
            raise as_refusal(exc) from exc

    def _deploy(
        self, slot: RolloutSlot, path: Path, inspectors: Mapping[str, InspectorProtocol]
    ) -> Mapping[str, InspectorProtocol]:
        try:
            return self._deployment.deploy(slot.configured.name, path, inspectors)
        except EdgeFlameError as exc:
            # A part being inspected does not come to an end; the next poll tries again.
            log.error("model_not_in_use_yet", product=slot.configured.product, reason=str(exc))
            return {}

    def stop_shadow(self, product: str) -> None:
        """End a shadow run or canary phase; its comparison is discarded."""
        slot = self.slots[product]
        if slot.shadow is not None:
            slot.shadow.close()
        slot.shadow = slot.canary = None

    def drop(
        self, product: str, fate: ReleaseFate, reason: str | None, detail: str, found: Disagreement | None = None
    ) -> None:
        """Drop the candidate, with its outcome."""
        entry = self.state_of(product)
        assert entry.candidate is not None
        release = entry.candidate.release
        if entry.candidate.stage == "shadow":
            self.stop_shadow(product)
        self.slots[product].inspectors = None
        self.save(
            product,
            drop_candidate(entry, fate, self._clock(), reason=reason, detail=detail, disagreement=found),
        )
        log.error(
            "release_dropped",
            product=product,
            sha256=release.manifest.sha256[:12],
            fate=fate,
            reason=reason,
            detail=detail,
        )
        self._store.forget_partial(release.manifest.sha256)
        self.prune()

    def promote(self, product: str, found: Disagreement | None) -> None:
        """Switch to the candidate from the next part on; if it cannot be opened, drop it."""
        entry, slot = self.state_of(product), self.slots[product]
        assert entry.candidate is not None
        sha256 = entry.candidate.release.manifest.sha256
        before = entry.present_sha256
        path = self._store.path(sha256)
        self.stop_shadow(product)
        try:
            inspectors = slot.inspectors or self.open(slot, path, sha256)
        except RefusedError as exc:
            self.drop(product, "refused", exc.reason, str(exc), found)
            return
        slot.inspectors = None
        entry = promote_candidate(entry, self._clock(), keep=self._keep, disagreement=found)
        self.save(product, entry)
        slot.latencies.clear()
        slot.before = (before, self._deploy(slot, path, inspectors))
        log.warning("model_released", product=product, before=before[:12], now=sha256[:12])
        self.prune()

    def roll_back(
        self,
        product: str,
        fate: ReleaseFate,
        reason: str,
        detail: str,
        *,
        to_file: bool = False,
        found: Disagreement | None = None,
    ) -> None:
        """Switch to the model before from the next part on.

        Raises:
            RefusedError: neither that model nor an earlier one can be opened; the present one stays in use.
        """
        entry, slot = self.state_of(product), self.slots[product]
        bad, failure = entry.present_sha256, None
        while True:
            entry = roll_back_present(
                entry, self._clock(), fate=fate, reason=reason, detail=detail, to_file=to_file, disagreement=found
            )
            path = self._path_of(slot, entry)
            if slot.before is not None and slot.before[0] == entry.present_sha256:
                # Its inspectors are still open: no time is lost before the bad model is replaced.
                inspectors = slot.before[1]
                break
            try:
                inspectors = self.open(slot, path, entry.present_sha256)
                break
            except RefusedError as exc:
                failure = failure or exc
                log.error("earlier_model_refused", product=product, sha256=entry.present_sha256[:12], reason=str(exc))
                if entry.present is None:
                    raise failure from exc
                reason, detail, found = exc.reason, str(exc), None
        self.stop_shadow(product)
        self.save(product, entry)
        slot.latencies.clear()
        self._deploy(slot, path, inspectors)
        slot.before = None
        log.warning("model_rolled_back", product=product, before=bad[:12], now=entry.present_sha256[:12], reason=reason)
        self.prune()

    def fix_stray_cameras(self, product: str, slot: RolloutSlot) -> None:
        """Give the present model to a camera that was switched to the product while its model changed."""
        name, sha256 = slot.configured.name, self.state_of(product).present_sha256
        if not self._deployment.has_strays(name, sha256):
            return
        try:
            self._deploy(slot, self.file(slot), self.open(slot, self.file(slot), sha256))
        except EdgeFlameError as exc:
            log.error("camera_has_another_model", product=product, expected=sha256[:12], reason=str(exc))

    def prune(self) -> None:
        """Delete packages and reports that are not needed any more."""
        keep: set[str] = set()
        reports: set[str] = set()
        for product in self.slots:
            entry = self.state_of(product)
            keep |= entry.needed
            reports |= {outcome.sha256 for outcome in entry.outcomes}
            if entry.candidate is not None:
                keep.add(entry.candidate.release.manifest.sha256)
                reports.add(entry.candidate.release.manifest.sha256)
        self._store.prune(keep, reports)
