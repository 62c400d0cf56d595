"""What Prometheus reads about what the cameras stand on: PLCs, the state folder's disk, the line's certificate."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Protocol, final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class PlcLink(Protocol):
    """A PLC that is told verdicts."""

    @property
    def is_connected(self) -> bool:
        """Whether the last write reached it."""

    @property
    def num_missed(self) -> int:
        """Verdicts that could not be written in time."""


@final
class Surroundings(Collector):
    """Asked each time somebody reads.

    Args:
        state: folder whose disk matters.
        plcs: by the name of the camera whose verdicts they are told.
        certificate_expires: end of the validity of the line's certificate; None: there is none.
    """

    def __init__(self, state: Path, plcs: Mapping[str, PlcLink], *, certificate_expires: datetime | None) -> None:
        self._state = state
        self._plcs = plcs
        self._certificate_expires = certificate_expires

    def collect(self) -> Iterable[Metric]:
        connected = GaugeMetricFamily("edgeflame_plc_connected", "1 while the PLC takes verdicts.", labels=["camera"])
        missed = CounterMetricFamily(
            "edgeflame_plc_missed", "Verdicts that were not written to the PLC in time.", labels=["camera"]
        )
        for camera, plc in self._plcs.items():
            connected.add_metric([camera], plc.is_connected)
            missed.add_metric([camera], plc.num_missed)
        yield from (connected, missed)
        free = GaugeMetricFamily("edgeflame_free_bytes", "Free on the disk of the state folder.")
        try:
            free.add_metric([], shutil.disk_usage(self._state).free)
        except OSError:
            # A disk that cannot even say this has nothing free for us.
            free.add_metric([], 0)
        yield free
        expiry = GaugeMetricFamily(
            "edgeflame_certificate_expiry_timestamp_seconds", "When the line's certificate expires."
        )
        if self._certificate_expires is not None:
            expiry.add_metric([], self._certificate_expires.timestamp())
        yield expiry
