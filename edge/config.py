"""The configuration of ``edgeflame inspect``: one TOML file, its sections beside their owners."""

from __future__ import annotations

import math

import msgspec

from edge.capture import CaptureConfig
from edge.delivery.deliverer import DeliveryConfig
from edge.delivery.mqtt import MqttConfig
from edge.delivery.outbox import OutboxConfig
from edge.delivery.webhook import WebhookConfig
from edge.health import HealthLimits
from edge.plc.config import ModbusConfig
from edge.rejects import RejectsConfig
from edge.web.config import WebConfig
from edgeflame.errors import ConfigError


class VerdictConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[verdict]``."""

    threshold: float | None = None
    """Raw distance above which a part fails; the package's own when left out."""
    review_band: float = 0.0
    """Share of the threshold to either side of it in which a person decides."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold > 0):
            msg = f"verdict.threshold must be a positive number, not {self.threshold}"
            raise ConfigError(msg)
        if not 0 <= self.review_band < 1:
            msg = f"verdict.review_band must be in [0, 1), not {self.review_band}"
            raise ConfigError(msg)


class InspectConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    verdict: VerdictConfig = VerdictConfig()
    health: HealthLimits = HealthLimits()
    capture: CaptureConfig = CaptureConfig()
    rejects: RejectsConfig = RejectsConfig()
    outbox: OutboxConfig = OutboxConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    mqtt: MqttConfig | None = None
    webhook: WebhookConfig | None = None
    web: WebConfig | None = None
    modbus: ModbusConfig | None = None
