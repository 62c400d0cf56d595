"""Which cameras a daemon has and which product each begins with, from the configuration and the command line. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge.config import CameraConfig, InspectConfig
from edge.plc.config import ModbusConfig
from edge.status import DEFAULT_CAMERA
from edgeflame.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class CameraPlan:
    """One camera.

    Attributes:
        name: of the camera.
        source: its address, as after ``--source``.
        product: what it begins with.
        settings: with the camera's own sections in place of those for all.
        modbus: where its verdicts go; None: to no PLC.
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


def make_plan(
    config: InspectConfig, *, model: Path | None, source: str | None, product_of: Callable[[Path], str]
) -> Plan:
    """Put the configuration and the command line's short form together.

    Args:
        config: of everything.
        model: the one package, in place of ``[products]``.
        source: of the one camera, in place of ``[cameras]``.
        product_of: the name of a package's product.

    Raises:
        UsageError: the two contradict each other, or there is nothing to inspect, or nothing to inspect it with.
        ConfigError: a camera's product is not there.
    """
    if model is not None and config.products:
        msg = "--model is for one product; the configuration has [products] (leave one of the two out)"
        raise UsageError(msg)
    if source is not None and config.cameras:
        msg = "--source is for one camera; the configuration has [cameras] (leave one of the two out)"
        raise UsageError(msg)
    if source is not None:
        config = msgspec.structs.replace(config, cameras={DEFAULT_CAMERA: CameraConfig(source=source)})
    products = {name: Path(file) for name, file in config.products.items()}
    if not config.cameras:
        msg = "--source: missing, and the configuration has no [cameras.NAME] with a source"
        raise UsageError(msg)
    if model is None and not products:
        msg = "--model: missing, and the configuration has no [products]"
        raise UsageError(msg)
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
    if camera.product is None and len(products) == 1:
        return next(iter(products))
    if camera.product is None:
        msg = f"cameras.{name}.product: missing; [products] has {', '.join(products)}"
        raise ConfigError(msg)
    if camera.product not in products:
        msg = f"cameras.{name}.product: no product {camera.product!r}; there are {', '.join(products)}"
        raise ConfigError(msg)
    return camera.product


def _modbus(config: InspectConfig, camera: CameraConfig, index: int) -> ModbusConfig | None:
    """A camera's own registers, or the block of its place after ``modbus.register``."""
    if camera.modbus is not None or config.modbus is None:
        return camera.modbus
    return msgspec.structs.replace(config.modbus, register=config.modbus.register + index * config.modbus.num_registers)
