"""Released models put together for a daemon: what it starts with, and the thread that looks after them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import final

from edge.cameras import Cameras, Plan
from edge.delivery.mqtt import broker_url
from edge.inspector import InspectorLoader
from edge.models.fetch import ReleaseFetcher
from edge.models.manager import ModelManager
from edge.models.rollout import CameraDeployment
from edge.models.state import ConfiguredProduct, ModelStateFile, ProductState, fall_back, package_files, settle_at_start
from edge.models.store import MODELS_FOLDER, RECORD_FILE, PackageStore, TrustedKeys
from edge.status import RolloutStatus
from edgeflame.errors import ConfigError, NegativeAnswerError, PackageError, RuntimeUnavailableError
from edgeflame.log import EventLog
from edgeflame.mqtt.messages import ProductModels
from edgeflame.state import file_sha256

log = EventLog("models")


def open_released_models(plan: Plan, loader: InspectorLoader, state: Path | None) -> ReleasedModels | None:
    """What section ``[models]`` asks for; None where there is none.

    Raises:
        ConfigError: it lacks something, or contradicts other sections.
        EdgeFlameError: keys, packages or the state folder cannot be read.
    """
    if plan.config.models is None:
        return None
    products, keys, folder = read_models_settings(plan, loader, state)
    return ReleasedModels(plan, products, keys, folder)


def read_models_settings(
    plan: Plan, loader: InspectorLoader, state: Path | None
) -> tuple[dict[str, ConfiguredProduct], TrustedKeys, Path]:
    """The plan's products by their names in the fleet, the trusted keys, and the folder for packages and decisions.

    Nothing is written. Raises as :func:`open_released_models`.
    """
    config = plan.config
    assert config.models is not None
    if state is None or config.mqtt is None:
        raise ConfigError(
            "[models] needs the section [mqtt], where models are announced, and --state DIR, where they are kept"
        )
    check_thresholds(plan)
    products: dict[str, ConfiguredProduct] = {}
    for name, file in plan.products.items():
        package = loader.package(file)
        product = package.manifest.product
        if product in products:
            raise ConfigError(
                f"products.{products[product].name} and products.{name} are both packages of the product {product!r}; "
                "with [models] each product is there once, or a release would be for both"
            )
        products[product] = ConfiguredProduct(name=name, product=product, file=str(file), sha256=package.sha256)
    return products, TrustedKeys(config.models.public_keys), state / MODELS_FOLDER


def check_thresholds(plan: Plan) -> None:
    """Whether a threshold would hold for models it was not made for.

    Raises:
        ConfigError: it would.
    """
    if any(camera.settings.verdict.threshold is not None for camera in plan.cameras):
        raise ConfigError(
            "[models] and a threshold of the configuration (verdict.threshold or --threshold): a threshold is a raw "
            "distance of one model, and would hold for every later one; put it into the package: edgeflame calibrate"
        )


@final
class ReleasedModels:
    """The released models of a daemon.

    Args:
        plan: as configured.
        products: the plan's, by their names in the fleet.
        keys: whose packages are taken.
        folder: for packages and decisions.

    Raises:
        EdgeFlameError: the folder cannot be read.
    """

    def __init__(self, plan: Plan, products: dict[str, ConfiguredProduct], keys: TrustedKeys, folder: Path) -> None:
        assert plan.config.models is not None
        self._config = plan.config.models
        self._configured = products
        self._keys = keys
        self._store = PackageStore(folder)
        self._state_file = ModelStateFile(folder / RECORD_FILE)
        self._plan = plan
        self._fetcher: ReleaseFetcher | None = None
        self._is_running = False
        """The state file has what was decided; before, that is what was settled at the start."""
        self._settled: dict[str, ProductState] = settle_at_start(
            self._state_file.state, products, store=self._store, keys=self._keys
        )

    def open_cameras(self, opener: Callable[[Plan], Cameras]) -> Cameras:
        """The cameras with what was decided or, where that cannot be opened here any more, what was before.

        Raises:
            EdgeFlameError: they cannot be opened with the configuration's files either.
        """
        while True:
            try:
                return opener(self._apply_decisions(self._plan))
            except (NegativeAnswerError, PackageError, RuntimeUnavailableError) as exc:
                released = {product: entry for product, entry in self._settled.items() if entry.present is not None}
                if not released:
                    raise
                for product, entry in released.items():
                    self._settled[product] = fall_back(entry, product, "not_opened", str(exc))

    def with_decisions(self, plan: Plan) -> Plan:
        """A configuration that was read again, with what was decided in place of its files.

        Raises:
            ConfigError: it contradicts section ``[models]``.
        """
        check_thresholds(plan)
        for configured in self._configured.values():
            file = plan.products.get(configured.name)
            if file is not None and file_sha256(file) != configured.sha256:
                log.warning(
                    "product_file_needs_restart",
                    product=configured.name,
                    file=str(file),
                    reason="with [models], another file of a product is taken at the next start",
                )
        return self._apply_decisions(plan)

    @contextlib.contextmanager
    def running(self, cameras: Cameras, *, on_change: Callable[[], object]) -> Iterator[None]:
        """Look after models meanwhile. The state folder is this process's alone.

        Args:
            cameras: on which models are switched.
            on_change: called after anything was done that others may want to show.

        Raises:
            EdgeFlameError: what was decided cannot be written, or the broker's settings make no sense.
        """
        mqtt = self._plan.config.mqtt
        assert mqtt is not None
        for product, entry in self._settled.items():
            if self._state_file.state.products.get(product) != entry:
                self._state_file.save(product, entry)
        self._is_running = True
        deadlines = [one.deadline_ms for one in (camera.settings.parts for camera in self._plan.cameras)]
        fetcher = ReleaseFetcher(
            lambda wake: ModelManager(
                self._config,
                line=mqtt.line,
                products=self._configured,
                deployment=CameraDeployment(cameras),
                store=self._store,
                state_file=self._state_file,
                keys=self._keys,
                deadline_ms=min((one for one in deadlines if one is not None), default=None),
                wake=wake,
            ),
            store=self._store,
            broker=broker_url(mqtt),
            fleet=mqtt.fleet,
            line=mqtt.line,
            on_change=on_change,
        )
        with fetcher:
            for worker in cameras.workers:
                worker.add_listener(fetcher.manager)
            self._fetcher = fetcher
            yield

    def roll_back(self, name: str, *, to_file: bool) -> ProductModels:
        """Go back to the model before, or to the configuration's file.

        Raises:
            UsageError: there is no such product, or nothing to go back to.
            EdgeFlameError: nothing earlier can be opened.
        """
        return self._decide(name, lambda manager, product: manager.roll_back(product, to_file=to_file))

    def promote(self, name: str) -> ProductModels:
        """Switch to the candidate that waits for this word.

        Raises:
            UsageError: there is no such product, or none waits.
        """
        return self._decide(name, ModelManager.promote)

    def status_of(self, name: str) -> ProductModels | None:
        """The models of a product of the configuration, as published to the fleet; None where there are none for it."""
        models = () if self._fetcher is None else self._fetcher.models
        names = {product: one.name for product, one in self._configured.items()}
        return next((one for one in models if names.get(one.product) == name), None)

    def metrics(self) -> RolloutStatus:
        """For metrics."""
        return RolloutStatus() if self._fetcher is None else self._fetcher.manager.metrics()

    def _decide(self, name: str, decide: Callable[[ModelManager, str], None]) -> ProductModels:
        """Have something decided about a product, on the thread that decides."""
        assert self._fetcher is not None
        fetcher, manager = self._fetcher, self._fetcher.manager
        product = manager.find(name)
        fetcher.call(lambda: decide(manager, product))
        return manager.status_of(product)

    def _apply_decisions(self, plan: Plan) -> Plan:
        decided = {**self._settled, **self._state_file.state.products} if self._is_running else self._settled
        files = package_files(decided, self._configured, self._store)
        return replace(plan, products={name: files.get(name, file) for name, file in plan.products.items()})
