"""The configuration of ``edgeflame inspect``: one TOML file, decoded into frozen structs. Values only.

inspection  how frames are captured and inspected, how parts are announced, and what watches over a camera
outputs     where results go, what the page remembers, and which released models are taken
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from edge.config.inspection import (
    CaptureConfig,
    DriftConfig,
    ImageQualityConfig,
    PartsConfig,
    RoiConfig,
    SelfTestConfig,
    TriggerConfig,
)
from edge.config.outputs import (
    ImagesConfig,
    ModbusConfig,
    ModelsConfig,
    MqttConfig,
    OutboxConfig,
    RetryConfig,
    TeachingConfig,
    WebConfig,
    WebhookConfig,
)
from edgeflame.bounds import BASIC, NotEmpty, Positive
from edgeflame.errors import ConfigError
from edgeflame.mqtt.topics import MAX_NAME_CHARS, is_name


class VerdictConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[verdict]``."""

    threshold: Annotated[Positive | None, BASIC] = None
    """Score above which a part fails; the package's own if left out."""
    review_band: Annotated[float, Meta(ge=0, lt=1), BASIC] = 0.0
    """Share of the threshold to either side of it in which a person decides."""


_OLD_SECTIONS = {"health": "image_quality", "view": "roi", "golden": "self_test"}
"""Sections that were renamed, for all cameras and for one."""

INSPECTION_SECTIONS = ("verdict", "image_quality", "roi")
"""Sections that only a camera's inspector uses: they can change between two frames."""


class CameraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section ``[cameras.NAME]``: one camera of the daemon.

    A section given here takes the place of the one of the same name that is for all cameras, whole.
    """

    OLD_KEYS: ClassVar[Mapping[str, str]] = _OLD_SECTIONS

    source: Annotated[NotEmpty, BASIC]
    """Where the images come from, as after ``--source``."""
    product: Annotated[str | None, BASIC] = None
    """The product that it sees at the start, a name of ``[products]``; may be left out where there is only one."""
    verdict: VerdictConfig | None = None
    image_quality: ImageQualityConfig | None = None
    capture: CaptureConfig | None = None
    drift: DriftConfig | None = None
    self_test: SelfTestConfig | None = None
    roi: RoiConfig | None = None
    trigger: TriggerConfig | None = None
    parts: PartsConfig | None = None
    modbus: ModbusConfig | None = None
    """Registers of its own; if left out, its block lies in those of ``[modbus]``, by its place among the cameras."""


class InspectConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of ``edgeflame inspect --config F``."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {**_OLD_SECTIONS, "rejects": "images", "delivery": "retry"}

    products: Annotated[dict[str, str], BASIC] = {}
    """Package files by the name of their product."""
    cameras: dict[str, CameraConfig] = {}
    """The cameras by name; results, metrics and commands call them by it."""
    verdict: VerdictConfig = VerdictConfig()
    image_quality: ImageQualityConfig = ImageQualityConfig()
    capture: CaptureConfig = CaptureConfig()
    roi: RoiConfig = RoiConfig()
    drift: DriftConfig = DriftConfig()
    self_test: SelfTestConfig = SelfTestConfig()
    trigger: TriggerConfig = TriggerConfig()
    parts: PartsConfig = PartsConfig()
    images: ImagesConfig = ImagesConfig()
    outbox: OutboxConfig = OutboxConfig()
    retry: RetryConfig = RetryConfig()
    mqtt: MqttConfig | None = None
    webhook: WebhookConfig | None = None
    web: WebConfig | None = None
    modbus: ModbusConfig | None = None
    models: ModelsConfig | None = None
    teaching: TeachingConfig = TeachingConfig()

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
