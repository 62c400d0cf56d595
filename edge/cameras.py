"""All cameras of a daemon: the plan of cameras and products, overrides set by command, and reloads.

The plan, which cameras there are and which product each begins with, is made of the configuration and the command line.

A reload changes between two frames what can be changed while parts pass: the inspectors' configuration, their packages,
and sections for which another part of the daemon has registered (:meth:`Cameras.on_section_change`). Whatever else
differs in the file is reported as needing a restart.

Thresholds and products set by command outlive a restart; they are kept in one small file in the state folder. A
threshold is a raw distance of one model and means nothing to another, so it is kept by model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import msgspec

from edge.camera_worker import CameraWorker
from edge.config import INSPECTION_SECTIONS, CameraConfig, InspectConfig
from edge.config.outputs import ModbusConfig
from edge.delivery.outbox import OUTBOX_FILE
from edge.inspector import InspectorLoader, InspectorProtocol
from edge.parts.tracker import PartTracker
from edge.sources.locate import WATCHED, open_image_source
from edge.status import DEFAULT_CAMERA
from edge.teaching.no_model import NO_PRODUCT, NoModel
from edge.teaching.record import live_products
from edgeflame.errors import ConfigError, RuntimeUnavailableError, UsageError
from edgeflame.log import EventLog
from edgeflame.state import read_json, storage_errors, write_record


@dataclass(frozen=True, kw_only=True)
class CameraPlan:
    """One camera as planned.

    Attributes:
        name: the camera's name.
        source: address of its images, as after ``--source``.
        product: the product it begins with; ``NO_PRODUCT``: none, until one is taught.
        settings: the configuration, with the camera's own sections in place of those for all cameras.
        modbus: the PLC's registers for its verdicts; None: no PLC.
    """

    name: str
    source: str
    product: str
    settings: InspectConfig
    modbus: ModbusConfig | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cameras and products of a daemon."""

    config: InspectConfig
    products: Mapping[str, Path]
    cameras: tuple[CameraPlan, ...]


def plan_cameras(
    config: InspectConfig, *, model: Path | None, source: str | None, product_of: Callable[[Path], str]
) -> Plan:
    """Make the plan of the configuration and of ``--model`` and ``--source``, the short form for one camera.

    Args:
        config: the configuration file's.
        model: the only package, in place of ``[products]``.
        source: the only camera's source, in place of ``[cameras]``.
        product_of: reads the name of a package's product.

    Raises:
        UsageError: configuration and command line contradict each other, or there is no source, or neither a package
            nor a page on which to teach a product.
        ConfigError: a camera's product is not in ``[products]``.
    """
    if model is not None and config.products:
        raise UsageError("--model is for one product; the configuration has [products] (leave one of the two out)")
    if source is not None and config.cameras:
        raise UsageError("--source is for one camera; the configuration has [cameras] (leave one of the two out)")
    if source is not None:
        config = msgspec.structs.replace(config, cameras={DEFAULT_CAMERA: CameraConfig(source=source)})
    products = {name: Path(file) for name, file in config.products.items()}
    if not config.cameras:
        raise UsageError("--source: missing, and the configuration has no [cameras.NAME] with a source")
    if model is None and not products and config.web is None:
        raise UsageError(
            "--model: missing, and the configuration has no [products], and no [web] on which to teach one"
        )
    if model is not None:
        products = {product_of(model): model}
    cameras = tuple(
        CameraPlan(
            name=name,
            source=camera.source,
            product=_product(name, camera, products),
            settings=config.of_camera(name),
            modbus=_modbus(config, camera, index),
        )
        for index, (name, camera) in enumerate(config.cameras.items())
    )
    return Plan(config=config, products=products, cameras=cameras)


def _product(name: str, camera: CameraConfig, products: Mapping[str, Path]) -> str:
    if camera.product is None and not products:
        return NO_PRODUCT
    if camera.product is None and len(products) == 1:
        return next(iter(products))
    if camera.product is None:
        raise ConfigError(f"cameras.{name}.product: missing; [products] has {', '.join(products)}")
    if camera.product not in products:
        raise ConfigError(f"cameras.{name}.product: no product {camera.product!r}; there are {', '.join(products)}")
    return camera.product


def _modbus(config: InspectConfig, camera: CameraConfig, index: int) -> ModbusConfig | None:
    """A camera's own registers, or the block of its place after ``modbus.register``."""
    if camera.modbus is not None or config.modbus is None:
        return camera.modbus
    return msgspec.structs.replace(config.modbus, register=config.modbus.register + index * config.modbus.num_registers)


OVERRIDES_FILE = "commanded.json"


class CameraOverrides(msgspec.Struct, frozen=True, kw_only=True):
    """What was set by command for one camera."""

    product: str | None = None
    thresholds: dict[str, float] = {}
    """Raw distances by the model's id."""


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    cameras: dict[str, CameraOverrides] = {}


@final
class Overrides:
    """What was set by command for all cameras, and its file. Not thread-safe.

    Args:
        folder: the state folder; None: nothing is kept beyond this run.

    Raises:
        StorageError: the file exists and cannot be read or decoded.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / OVERRIDES_FILE
        self._cameras: dict[str, CameraOverrides] = {}
        if self._file is not None:
            advice = "delete it to go on with the thresholds and products of the configuration"
            document = read_json(self._file, _Document, advice=advice)
            self._cameras = dict(document.cameras) if document is not None else {}

    def get(self, camera: str) -> CameraOverrides:
        """The overrides of a camera."""
        return self._cameras.get(camera, CameraOverrides())

    def set_threshold(self, camera: str, model: str, value: float | None) -> None:
        """Keep a model's threshold, raw distance, or forget it (None).

        Raises:
            StorageError: it cannot be written; nothing is changed then.
        """
        thresholds = {**self.get(camera).thresholds}
        thresholds.pop(model, None)
        if value is not None:
            thresholds[model] = value
        self._save(camera, msgspec.structs.replace(self.get(camera), thresholds=thresholds))

    def set_product(self, camera: str, product: str | None) -> None:
        """Keep a camera's product, or forget it (None); raises as :meth:`set_threshold`."""
        self._save(camera, msgspec.structs.replace(self.get(camera), product=product))

    def _save(self, camera: str, entry: CameraOverrides) -> None:
        cameras = {**self._cameras, camera: entry}
        if self._file is not None:
            with storage_errors(self._file.parent, "keep what was changed by command"):
                self._file.parent.mkdir(parents=True, exist_ok=True)
            write_record(self._file, _Document(cameras=cameras))
        self._cameras = cameras


log = EventLog("inspect")

_CAMERA_SECTIONS = tuple(name for name in CameraConfig.__struct_fields__ if name not in ("source", "product"))


class ReloadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload of the configuration changed."""

    changed: tuple[str, ...]
    """Keys that changed; in force from the next part on."""
    needs_restart: tuple[str, ...]
    """Keys that differ in the file but need a restart; still as before."""


@final
class Cameras:
    """All cameras of a plan, opened but not yet running.

    Args:
        plan: cameras and products.
        loader: opens packages.
        overrides: what was set by command before.
        state: the state folder; watched folders look up in its outbox which files are done, and products that were
            taught at the line are kept there.

    Raises:
        EdgeFlameError: a package cannot be used here, or there is no such source.
    """

    def __init__(self, plan: Plan, loader: InspectorLoader, overrides: Overrides, state: Path | None = None) -> None:
        self._outbox = None if state is None else state / OUTBOX_FILE
        self._loader = loader
        self._overrides = overrides
        self._taught = {name: file for name, file in live_products(state).items() if name not in plan.products}
        self._products = {**plan.products, **self._taught}
        self._settings = {camera.name: camera.settings for camera in plan.cameras}
        self._configured: dict[str, str] = {}
        """SHA-256 of the packages opened as the configuration names them, by product. A file may be replaced under its
        name, and the package in use may since have come from the fleet."""
        self._takers: dict[str, Callable[[Any], None]] = {}
        self.plan = plan
        """The plan in force: after a reload, what needs a restart is still as before."""
        self.workers = tuple(self._open(camera) for camera in plan.cameras)

    @property
    def products(self) -> Mapping[str, Path]:
        """Package files by name."""
        return self._products

    def open_inspector(self, camera: str, product: str) -> InspectorProtocol:
        """Open an inspector of a product for a camera; it is not in use yet.

        Raises:
            EdgeFlameError: the package cannot be used here.
        """
        worker = next(worker for worker in self.workers if worker.name == camera)
        return self._load(camera, product, self._products.get(product), self._settings[camera], is_live=worker.is_live)

    def set_taught(self, product: str, file: Path | None) -> None:
        """Add a product that was taught at this line, replace its package, or forget it (None)."""
        self._loader.forget()
        if file is None:
            self._taught.pop(product, None)
            self._products.pop(product, None)
        else:
            self._taught[product] = self._products[product] = file

    def settings(self, camera: str) -> InspectConfig:
        """The configuration of a camera, with its own sections."""
        return self._settings[camera]

    def open_package(self, camera: str, product: str, file: Path) -> InspectorProtocol:
        """As :meth:`open_inspector`, with another package of the product."""
        is_live = next(worker.is_live for worker in self.workers if worker.name == camera)
        return self._loader.open(file, self._settings[camera], camera=camera, product=product, is_live=is_live)

    def use_package(
        self, product: str, file: Path, inspectors: Mapping[str, InspectorProtocol]
    ) -> Mapping[str, InspectorProtocol]:
        """Inspect a product with another package from the next part on, and whenever a camera is switched to it later.

        Args:
            product: the product's name.
            file: the package.
            inspectors: from :meth:`open_package`, by camera; one is opened for every other camera that needs it.

        Returns:
            The replaced inspectors, by camera.

        Raises:
            EdgeFlameError: an inspector cannot be opened, or a part being inspected does not come to an end; every
                camera keeps its inspector then.
        """
        self._loader.forget()
        switches: list[tuple[CameraWorker, InspectorProtocol]] = []
        for worker in self.workers:
            if worker.inspector.product != product:
                continue
            inspector = inspectors.get(worker.name) or self.open_package(worker.name, product, file)
            if inspector.model_id == worker.inspector.model_id:
                continue
            # The configuration may have changed since it was opened.
            switches.append((worker, inspector.reconfigured(self._settings[worker.name])))
        replaced = self._switch(switches)
        self._products[product] = file
        for worker, inspector in switches:
            before = replaced[worker.name]
            log.warning(
                "model_switched",
                camera=worker.name,
                product=product,
                before=before.model_id,
                now=inspector.model_id,
                threshold_before=before.threshold,
                threshold=inspector.threshold,
            )
        return replaced

    def _switch(self, switches: Sequence[tuple[CameraWorker, InspectorProtocol]]) -> dict[str, InspectorProtocol]:
        """Give cameras other inspectors, all of them or none; returns the ones before, by camera.

        A camera whose part in hand does not come to an end refuses. The others go back to their inspectors then: no
        camera is made to wait for another.

        Raises:
            RuntimeUnavailableError: a camera refuses.
        """
        replaced: dict[str, InspectorProtocol] = {}
        were_set = {worker.name: worker.status().threshold_set for worker, _ in switches}
        try:
            for worker, inspector in switches:
                threshold = self._overrides.get(worker.name).thresholds.get(inspector.model_id)
                replaced[worker.name] = worker.replace_inspector(inspector, threshold=threshold)
        except RuntimeUnavailableError:
            for worker, _ in switches[: len(replaced)]:
                before = replaced[worker.name]
                try:
                    worker.replace_inspector(before, threshold=before.threshold if were_set[worker.name] else None)
                except RuntimeUnavailableError as exc:
                    log.error("inspector_not_put_back", camera=worker.name, reason=str(exc))
            raise
        return replaced

    def on_section_change(self, name: str, taker: Callable[[Any], None]) -> None:
        """Call ``taker`` with the new section of this name, ``images`` for instance, when a reload changes it."""
        self._takers[name] = taker

    def reload(self, plan: Plan) -> ReloadReport:
        """Change what can be changed to the new plan.

        Raises:
            EdgeFlameError: a package of the new plan cannot be used here, or a part being inspected does not come to
                an end; nothing is changed then.
        """
        self._loader.forget()
        changed: list[str] = []
        restart: list[str] = []
        inspectors: list[tuple[CameraWorker, InspectorProtocol]] = []
        new = {camera.name: camera for camera in plan.cameras}
        old = {camera.name: camera for camera in self.plan.cameras}
        restart += [f"cameras.{name}" for name in (*(new.keys() - old.keys()), *(old.keys() - new.keys()))]
        configured = {name: self._digest(file) for name, file in plan.products.items() if name in self._configured}
        replaced = {name for name, digest in configured.items() if digest != self._configured[name]}
        products = self._new_products(plan, replaced, changed, restart)
        running = []
        for worker in self.workers:
            before, after = old[worker.name], new.get(worker.name, old[worker.name])
            inspector, now = self._prepare(worker, before, after, products, replaced, changed, restart)
            if inspector is not None:
                inspectors.append((worker, inspector))
            running.append(now)
        sections = [
            name
            for name in InspectConfig.__struct_fields__
            if name not in ("products", "cameras", *_CAMERA_SECTIONS)
            and getattr(plan.config, name) != getattr(self.plan.config, name)
        ]
        # Everything has been opened successfully; the changes take effect from here on.
        self._switch(inspectors)
        for name in sections:
            if name in self._takers:
                self._takers[name](getattr(plan.config, name))
                changed.append(name)
            else:
                restart.append(name)
        config = msgspec.structs.replace(
            self.plan.config, **{name: getattr(plan.config, name) for name in sections if name in self._takers}
        )
        self._configured.update(configured)
        self._products = products
        self._settings = {camera.name: camera.settings for camera in running}
        self.plan = Plan(config=config, products={**products, **plan.products}, cameras=tuple(running))
        return ReloadReport(changed=tuple(sorted(set(changed))), needs_restart=tuple(sorted(set(restart))))

    def _new_products(
        self, plan: Plan, replaced: Collection[str], changed: list[str], restart: list[str]
    ) -> dict[str, Path]:
        """The new plan's products, and those that cameras still use; released packages from the fleet stay in use."""
        products = {**self._taught, **plan.products}
        for name in {worker.inspector.product for worker in self.workers} - products.keys():
            if name in self._products:
                products[name] = self._products[name]
                restart.append(f"products.{name}")
        for name in plan.products:
            before = self.plan.products.get(name)
            if name in self._products and name not in replaced and self._products[name] != before:
                products[name] = self._products[name]
            elif name in replaced or before != products[name]:
                changed.append(f"products.{name}")
        changed += [f"products.{name}" for name in self._products.keys() - products.keys()]
        return products

    def _prepare(
        self,
        worker: CameraWorker,
        before: CameraPlan,
        after: CameraPlan,
        products: Mapping[str, Path],
        replaced: Collection[str],
        changed: list[str],
        restart: list[str],
    ) -> tuple[InspectorProtocol | None, CameraPlan]:
        """The inspector that a camera needs for the new plan, None for the present one; and the camera as it will run.

        Adds the keys concerned to ``changed`` and ``restart``.
        """
        name = worker.name
        different = [
            section
            for section in _CAMERA_SECTIONS
            if getattr(before.settings, section) != getattr(after.settings, section)
        ]
        ruled = {section: getattr(after.settings, section) for section in different if section in INSPECTION_SECTIONS}
        restart += [f"cameras.{name}.{section}" for section in different if section not in INSPECTION_SECTIONS]
        if before.source != after.source:
            restart.append(f"cameras.{name}.source")
        if before.modbus != after.modbus:
            restart.append(f"cameras.{name}.modbus")
        settings = msgspec.structs.replace(before.settings, **ruled)
        changed += [f"cameras.{name}.{section}" for section in ruled]
        product = worker.inspector.product
        if before.product != after.product and self._overrides.get(name).product is None:
            product = after.product
            changed.append(f"cameras.{name}.product")
        now = CameraPlan(
            name=name, source=before.source, product=after.product, settings=settings, modbus=before.modbus
        )
        if product != worker.inspector.product or product in replaced:
            return self._load(name, product, products.get(product), settings, is_live=worker.is_live), now
        return (worker.inspector.reconfigured(settings) if ruled else None), now

    def _open(self, camera: CameraPlan) -> CameraWorker:
        tracker = PartTracker(camera.name, camera.settings.trigger, camera.settings.parts)
        opener = tracker.source_opener(
            partial(
                open_image_source,
                camera.source,
                outbox=self._outbox,
                max_pixels=camera.settings.capture.max_pixels,
            ),
            self.plan.config.mqtt,
        )
        # The source first: a folder that is not there is reported before a model is loaded.
        is_live = opener().is_live
        product = self._first_product(camera)
        inspector = self._load(camera.name, product, self._products.get(product), camera.settings, is_live=is_live)
        own = inspector.threshold
        capture = tracker.capture_config(camera.settings.capture, is_live=is_live)
        waits = camera.source.startswith(WATCHED)
        worker = CameraWorker(camera.name, opener, inspector, capture, tracker=tracker, waits=waits)
        threshold = self._overrides.get(camera.name).thresholds.get(inspector.model_id)
        if threshold is not None:
            worker.set_threshold(threshold)
            log.warning("threshold_set_by_command", camera=camera.name, own=own, now=threshold)
        status = worker.status()
        log.info(
            "inspecting",
            camera=camera.name,
            source=status.source,
            product=status.product,
            model=status.model,
            threshold=status.threshold,
            provider=status.provider,
        )
        return worker

    def _first_product(self, camera: CameraPlan) -> str:
        commanded = self._overrides.get(camera.name).product
        if commanded is None or commanded == camera.product:
            return camera.product
        if commanded not in self._products:
            log.warning("commanded_product_gone", camera=camera.name, product=commanded, now=camera.product)
            return camera.product
        log.warning("product_set_by_command", camera=camera.name, configured=camera.product, now=commanded)
        return commanded

    def _load(
        self, camera: str, product: str, file: Path | None, settings: InspectConfig, *, is_live: bool
    ) -> InspectorProtocol:
        if file is None:
            return NoModel(camera)
        inspector = self._loader.open(file, settings, camera=camera, product=product, is_live=is_live)
        if file == self.plan.products.get(product):
            self._configured.setdefault(product, self._digest(file))
        return inspector

    def _digest(self, file: Path) -> str:
        return self._loader.package(file).sha256
