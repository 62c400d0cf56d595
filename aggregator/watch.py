"""Shows how the run stands, twice a second: as retained MQTT tags, and to Prometheus."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from aggregator.facts import RunState
from aggregator.snapshot import Snapshot, metrics, tags
from edgeflame.link import Link
from edgeflame.metrics import MetricsServer


class Watch:
    """Looks at the run and tells; decides nothing.

    Args:
        state_dir: whose disk matters.
        say: publishes a tag, retained; called only while the broker is connected.
        server: Prometheus' side; None: nobody asks.
        certificate_expires: end of the validity of what we show the broker, if that is known.
    """

    def __init__(
        self,
        state_dir: Path,
        say: Callable[[str, bytes], None],
        server: MetricsServer | None,
        *,
        certificate_expires: datetime | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._certificate_expires = certificate_expires
        self._say = say
        self._server = server
        self._said: dict[str, str] = {}
        self._stage: tuple[object, ...] = ()
        self._stage_since = time.monotonic()
        self._last_round_s: float | None = None

    def connected(self) -> None:
        """There is a new connection: the broker may have forgotten everything."""
        self._said.clear()

    def look(
        self, state: RunState, *, num_online: int, progress_at: float, link: Link | None, is_up: bool, now: float
    ) -> None:
        """Tell what has changed.

        Args:
            state: the run.
            num_online: sites heard lately.
            progress_at: when any site was last a step further.
            link: counts bytes.
            is_up: whether it is connected.
            now: monotonic clock, seconds; as ``progress_at``.
        """
        stage = (state.phase, None if state.round is None else state.round.number)
        if stage != self._stage:
            if self._stage[:1] == ("train",):
                self._last_round_s = now - self._stage_since
            self._stage, self._stage_since = stage, now
        snapshot = Snapshot(
            state=state,
            num_online=num_online,
            phase_s=now - self._stage_since,
            last_round_s=self._last_round_s,
            progress_age_s=now - progress_at,
            progress_at=time.time() - (now - progress_at),
            is_connected=is_up,
            bytes_in=0 if link is None else link.bytes_in,
            bytes_out=0 if link is None else link.bytes_out,
            free_bytes=_free_bytes(self._state_dir),
            certificate_expires=self._certificate_expires,
        )
        if self._server is not None:
            self._server.show(metrics(snapshot))
        if is_up:
            for name, value in tags(snapshot).items():
                if self._said.get(name) != value:
                    self._say(name, value.encode())
                    self._said[name] = value


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        # A disk that cannot even say this will make itself felt where something is written.
        return 0
