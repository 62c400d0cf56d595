"""The configuration of ``edgeflame inspect``: one TOML file, decoded into frozen structs. Values only.

inspection  how frames are captured and judged, and what watches over a camera
parts       how parts are announced and numbered, and their deadlines
outputs     where results go, what the page remembers, and which released models are taken
"""

from __future__ import annotations

import math

import msgspec

from edge.config.inspection import CaptureConfig, DriftConfig, GoldenConfig, HealthLimits, ViewConfig
from edge.config.outputs import (
    DeliveryConfig,
    ModbusConfig,
    ModelsConfig,
    MqttConfig,
    OutboxConfig,
    RejectsConfig,
    WebConfig,
    WebhookConfig,
)
from edge.config.parts import PartsConfig, TriggerConfig
from edgeflame.errors import ConfigError
from edgeflame.mqtt.topics import MAX_NAME_CHARS, is_name


class VerdictConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[verdict]``."""

    threshold: float | None = None
    """Raw distance above which a part fails; the package's own when left out."""
    review_band: float = 0.0
    """Share of the threshold to either side of it in which a person decides."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ConfigError(f"verdict.threshold must be a positive number, not {self.threshold}")
        if not 0 <= self.review_band < 1:
            raise ConfigError(f"verdict.review_band must be in [0, 1), not {self.review_band}")


INSPECTION_SECTIONS = ("verdict", "health", "view")
"""Sections that only a camera's inspector uses: they can change between two frames."""


class CameraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[cameras.NAME]``: one camera of the daemon.

    A section given here takes the place of the one of the same name that is for all cameras, whole.
    """

    source: str
    """As after ``--source``."""
    product: str | None = None
    """What it sees at the start, a name of ``[products]``; may be left out where there is one product alone."""
    verdict: VerdictConfig | None = None
    health: HealthLimits | None = None
    capture: CaptureConfig | None = None
    drift: DriftConfig | None = None
    golden: GoldenConfig | None = None
    view: ViewConfig | None = None
    trigger: TriggerConfig | None = None
    parts: PartsConfig | None = None
    modbus: ModbusConfig | None = None
    """Registers of its own; else its block lies in those of ``[modbus]``, by its place among the cameras."""


class InspectConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    products: dict[str, str] = {}
    """Package files by the name of their product."""
    cameras: dict[str, CameraConfig] = {}
    """By name; in results, metrics and commands a camera goes by it."""
    verdict: VerdictConfig = VerdictConfig()
    health: HealthLimits = HealthLimits()
    capture: CaptureConfig = CaptureConfig()
    view: ViewConfig = ViewConfig()
    drift: DriftConfig = DriftConfig()
    golden: GoldenConfig = GoldenConfig()
    trigger: TriggerConfig = TriggerConfig()
    parts: PartsConfig = PartsConfig()
    rejects: RejectsConfig = RejectsConfig()
    outbox: OutboxConfig = OutboxConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    mqtt: MqttConfig | None = None
    webhook: WebhookConfig | None = None
    web: WebConfig | None = None
    modbus: ModbusConfig | None = None
    models: ModelsConfig | None = None

    def __post_init__(self) -> None:
        for kind, names in (("products", self.products), ("cameras", self.cameras)):
            for name in names:
                if not is_name(name):
                    raise ConfigError(
                        f"{kind}: the name {name[:80]!r} may have 1 to {MAX_NAME_CHARS} letters, digits, '.', '_' or "
                        "'-', the first of them a letter or digit"
                    )

    def of_camera(self, name: str) -> InspectConfig:
        """The same with the sections that a camera has of its own in place of those for all."""
        camera = self.cameras[name]
        own = {
            section: value
            for section in camera.__struct_fields__
            if section not in ("source", "product") and (value := getattr(camera, section)) is not None
        }
        return msgspec.structs.replace(self, **own)
