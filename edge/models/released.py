"""A daemon's released models: which packages it starts with, and the fetcher and manager while it runs."""

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
from edgeflame.mqtt.release_messages import ProductModels
from edgeflame.state import file_sha256

log = EventLog("models")


def open_released_models(plan: Plan, loader: InspectorLoader, state: Path | None) -> ReleasedModels | None:
    """The released models of a daemon; None without section ``[models]``.

    Raises:
        ConfigError: the section lacks something, or contradicts other sections.
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
    keys = TrustedKeys(config.models.public_keys)
    products: dict[str, ConfiguredProduct] = {}
    for name, file in plan.products.items():
        package = loader.package(file)
        product = package.manifest.product
        if product in products:
            raise ConfigError(
                f"products.{products[product].name} and products.{name} are both packages of the product {product!r}; "
                "with [models] each product is there once, or a release would be for both"
            )
        products[product] = ConfiguredProduct(
            name=name,
            product=product,
            file=str(file),
            sha256=package.sha256,
            release_number=keys.release_number(package),
        )
    return products, keys, state / MODELS_FOLDER


def check_thresholds(plan: Plan) -> None:
    """Refuse a configured threshold: it would also hold for models that it was not made for.

    Raises:
        ConfigError: a camera has one.
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
        plan: the configured plan.
        products: the plan's products by their names in the fleet.
        keys: the trusted keys.
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
        """Whether the decisions are those of the state file; before, they are those settled at the start."""
        self._settled: dict[str, ProductState] = settle_at_start(
            self._state_file.state, products, store=self._store, keys=self._keys
        )

    def open_cameras(self, opener: Callable[[Plan], Cameras]) -> Cameras:
        """Open the cameras with the decided models or, if these cannot be opened here any more, with earlier ones.

        Args:
            opener: opens the cameras of a plan.

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
        """The plan of a configuration that was read again, with the decided packages in place of its files.

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
        """Fetch, try and switch models while the block runs. The state folder must be locked by this process.

        Args:
            cameras: the cameras on which models are switched.
            on_change: called after every change of a product's models.

        Raises:
            EdgeFlameError: the decisions cannot be written, or the broker's settings are wrong.
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
        """Switch to the candidate that waits for a person's decision.

        Raises:
            UsageError: there is no such product, or no candidate waits.
        """
        return self._decide(name, ModelManager.promote)

    def allow_older(self, name: str) -> ProductModels:
        """Take the release that was refused because its number is lower than one seen before.

        Raises:
            UsageError: there is no such product, or no such release.
        """
        assert self._fetcher is not None
        fetcher = self._fetcher
        return self._decide(name, lambda manager, product: fetcher.offer(manager.allow_older(product)))

    def status_of(self, name: str) -> ProductModels | None:
        """The models of a product of the configuration, as published to the fleet; None if it is not known there."""
        models = () if self._fetcher is None else self._fetcher.models
        names = {product: one.name for product, one in self._configured.items()}
        return next((one for one in models if names.get(one.product) == name), None)

    def metrics(self) -> RolloutStatus:
        """For metrics."""
        return RolloutStatus() if self._fetcher is None else self._fetcher.manager.metrics()

    def _decide(self, name: str, decide: Callable[[ModelManager, str], None]) -> ProductModels:
        """Run a decision about a product on the fetcher's thread."""
        assert self._fetcher is not None
        fetcher, manager = self._fetcher, self._fetcher.manager
        product = manager.find(name)
        fetcher.call(lambda: decide(manager, product))
        return manager.status_of(product)

    def _apply_decisions(self, plan: Plan) -> Plan:
        decided = {**self._settled, **self._state_file.state.products} if self._is_running else self._settled
        files = package_files(decided, self._configured, self._store)
        return replace(plan, products={name: files.get(name, file) for name, file in plan.products.items()})
