"""The status of a run in numbers: as retained MQTT tags that a SCADA system or PLC can read, and for Prometheus.

:class:`RunStatus` is a run at one moment, with pure functions that render it; :class:`StatusReporter` takes such a
snapshot twice a second and publishes what has changed. It decides nothing.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from aggregator.events import RunState
from edgeflame.metrics import Metric, MetricsServer
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.messages import Phase, RefusalReason
from edgeflame.statistics.head import HEAD_WEIGHT, MARKED_BAD, MARKS_LEFT_OUT

SiteState = Literal["idle", "working", "accepted", "refused", "left_out", "finished", "not_finished", "paused", "left"]
_SITE_STATES: tuple[SiteState, ...] = get_args(SiteState)
_PHASES: tuple[Phase, ...] = get_args(Phase)
_REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at one moment.

    Attributes:
        state: the run.
        num_online: sites heard lately.
        phase_s: seconds since this phase, or this round, began; or since the aggregator was started.
        last_round_s: how long the last round took, seconds; None if none has ended since the start.
        progress_age_s: seconds since any site made progress.
        progress_at: the same as a time, seconds since 1970.
        is_connected: the broker is connected.
        bytes_in: payload received since the start.
        bytes_out: payload sent since the start.
        free_bytes: free on the disk of the state folder.
        certificate_expires: when the certificate that the broker is shown expires; None if that is not known.
    """

    state: RunState
    num_online: int
    phase_s: float
    last_round_s: float | None
    progress_age_s: float
    progress_at: float
    is_connected: bool
    bytes_in: int
    bytes_out: int
    free_bytes: int
    certificate_expires: datetime | None = None

    def count_by_state(self) -> dict[SiteState, int]:
        """How many members are in which state; each in one."""
        counts = Counter(_site_state(self.state, site) for site in self.state.members)
        return {name: counts[name] for name in _SITE_STATES}


def run_summary(state: RunState, *, num_online: int) -> str:
    """The run's status in a few words, for a terminal."""
    entry = state.statistics if state.phase == "statistics" else state.latest_round
    if state.phase in ("train", "statistics") and entry is not None:
        done = f"{len(entry.accepted)} of {len(entry.asked)} in"
        if entry.refused:
            done += f", {len(entry.refused)} refused"
        return f"{state.phase}: {done}; {num_online} online"
    if state.phase == "finish":
        return f"finish: {len(state.finished)} of {len(state.members)} packages; {num_online} online"
    if state.phase == "waiting":
        return f"waiting: {len(state.members)} ready; {num_online} online"
    return state.phase


def status_tags(snapshot: RunStatus) -> dict[str, str]:
    """The values of the flat topics ``status/<name>``, as text a PLC can read."""
    state, sites = snapshot.state, snapshot.count_by_state()
    return {
        "run": state.run,
        "phase": state.phase,
        "round": str(0 if state.latest_round is None else state.latest_round.number),
        "rounds": str(state.config.rounds),
        "rounds_done": str(state.rounds_done),
        "sites": str(len(state.members)),
        "sites_online": str(snapshot.num_online),
        "sites_working": str(sites["working"]),
        "sites_accepted": str(sites["accepted"]),
        "sites_refused": str(sites["refused"]),
        "sites_left_out": str(sites["left_out"]),
        "sites_paused": str(sites["paused"]),
        "error": "" if state.ended is None else state.ended.reason,
        # Seldom enough not to be traffic, often enough to be an alarm's input.
        "last_progress": str(int(snapshot.progress_at // 10 * 10)),
    }


def prometheus_metrics(snapshot: RunStatus) -> list[Metric]:
    """The metrics for Prometheus; ``docs/fleet.md`` lists them."""
    state, prefix = snapshot.state, "edgeflame_aggregator"
    current = 0 if state.latest_round is None else state.latest_round.number
    gathered = [*state.rounds, *filter(None, [state.statistics])]
    accepted = sum(len(entry.accepted) for entry in state.rounds)
    # With a zero for every reason, so that the first refusal is seen as an increase.
    refused: Counter[str] = Counter(dict.fromkeys(_REFUSAL_REASONS, 0))
    refused.update(event.reason for event in state.refused_initial.values())
    for entry in gathered:
        refused.update(entry.refusals_by_reason)
    last_refusals = Counter(event.reason for event in state.refused_initial.values())
    last_refusals.update(event.reason for entry in state.rounds for event in entry.refused.values())

    def gauge(name: str, meaning: str, value: float) -> Metric:
        return Metric(name=f"{prefix}_{name}", meaning=meaning, value=value)

    def counter(name: str, meaning: str, value: float) -> Metric:
        return Metric(name=f"{prefix}_{name}", meaning=meaning, value=value, kind="counter")

    def by(
        label: str, name: str, meaning: str, values: Mapping[Any, float], kind: Literal["gauge", "counter"] = "gauge"
    ) -> Metric:
        return Metric(name=f"{prefix}_{name}", meaning=meaning, label=label, values=dict(values), kind=kind)

    return [
        by("run", "run_info", "The run; always 1.", {state.run: 1}),
        by("phase", "phase", "1 for the phase the run is in.", {name: name == state.phase for name in _PHASES}),
        gauge("phase_seconds", "Since this phase, or round, began.", snapshot.phase_s),
        gauge("round", "The round that is open, or was last.", current),
        gauge("rounds_planned", "Rounds this run is to have.", state.config.rounds),
        gauge("rounds_done", "Rounds whose model was made.", state.rounds_done),
        gauge("last_round_seconds", "How long the last round took; 0 if none ended yet.", snapshot.last_round_s or 0),
        by("state", "sites", "Members by state.", snapshot.count_by_state()),
        gauge("sites_online", "Sites heard lately.", snapshot.num_online),
        gauge("quorum", "Sites whose answers the open round needs; 0 while none is open.", _open_quorum(state)),
        counter("updates_accepted", "Updates of this run that count.", accepted),
        by("reason", "uploads_refused", "Uploads of this run that were refused, by reason.", refused, "counter"),
        counter(
            "sites_left_out",
            "Times that a site of this run made no progress until the deadline.",
            sum(len(entry.left_out) for entry in gathered),
        ),
        by(
            "site",
            "marks_used",
            "Marked bad parts behind a site's last update, photographs.",
            _newest(state, MARKED_BAD),
        ),
        by("site", "marks_left_out", "Marks that a site's last update left out.", _newest(state, MARKS_LEFT_OUT)),
        by(
            "site",
            "head_weight",
            "Weight of the fleet's head in a site's package; 0: it does not count there.",
            {
                site: weight
                for site, event in state.finished.items()
                # A site may say anything.
                if isinstance(weight := event.summary.get(HEAD_WEIGHT), float)
            },
        ),
        gauge("progress_age_seconds", "Since any site was a step further.", snapshot.progress_age_s),
        gauge("broker_connected", "1 while the broker is connected.", snapshot.is_connected),
        counter("received_bytes", "Payload received since the start.", snapshot.bytes_in),
        counter("sent_bytes", "Payload sent since the start.", snapshot.bytes_out),
        gauge("state_free_bytes", "Free on the disk of the state folder.", snapshot.free_bytes),
        gauge(
            "certificate_expiry_timestamp_seconds",
            "When the kit's certificate expires; NaN if that is not known.",
            math.nan if snapshot.certificate_expires is None else snapshot.certificate_expires.timestamp(),
        ),
        # Earlier names of metrics above, kept for one more version.
        gauge("accepted_updates", "Use updates_accepted_total.", accepted),
        by("reason", "refusals", "Use uploads_refused_total.", last_refusals),
        gauge("left_out", "Use sites_left_out_total.", sum(len(entry.left_out) for entry in state.rounds)),
        gauge("free_bytes", "Use state_free_bytes.", snapshot.free_bytes),
    ]


def _newest(state: RunState, figure: str) -> dict[str, float]:
    """A figure of each site's last update that counts, where it has it."""
    return {
        site: update.metrics[figure]
        for entry in state.rounds
        for site, update in entry.accepted.items()
        if figure in update.metrics
    }


def _open_quorum(state: RunState) -> int:
    entry = {"train": state.latest_round, "statistics": state.statistics}.get(state.phase)
    return 0 if entry is None else state.config.replies_needed(len(entry.asked))


def _site_state(state: RunState, site: str) -> SiteState:
    if site in state.left:
        return "left"
    current = state.statistics if state.phase == "statistics" else state.latest_round
    if site in state.paused and (current is None or site not in current.accepted):
        return "paused"
    match state.phase:
        case "initialise":
            return "working" if state.initial_sites_asked[-1:] == (site,) else "idle"
        case "train" | "statistics" if current is not None:
            if site in current.accepted:
                return "accepted"
            if site in current.refused:
                return "refused"
            if site in current.left_out:
                return "left_out"
            return "working" if site in current.asked else "idle"
        case "waiting":
            return "idle"
        case _:
            if site in state.finished:
                return "finished"
            if site in state.not_finished or state.ended is not None:
                return "not_finished"
            return "working"


class StatusReporter:
    """Publishes the run's status. It decides nothing.

    Args:
        state_dir: its disk's free space is reported.
        publish: publishes a tag, retained; called only while the broker is connected.
        server: serves the metrics to Prometheus; None serves none.
        certificate_expires: when the certificate that the broker is shown expires, if that is known.
    """

    def __init__(
        self,
        state_dir: Path,
        publish: Callable[[str, bytes], None],
        server: MetricsServer | None,
        *,
        certificate_expires: datetime | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._certificate_expires = certificate_expires
        self._publish = publish
        self._server = server
        self._published: dict[str, str] = {}
        self._phase: tuple[object, ...] = ()
        self._phase_since = time.monotonic()
        self._last_round_s: float | None = None

    def reconnected(self) -> None:
        """Publish everything again: on a new connection the broker may have forgotten it."""
        self._published.clear()

    def report(
        self, state: RunState, *, num_online: int, progress_at: float, link: MqttClient | None, is_up: bool, now: float
    ) -> None:
        """Publish what has changed.

        Args:
            state: the run.
            num_online: sites heard lately.
            progress_at: when any site last made progress.
            link: the connection, which counts bytes.
            is_up: whether the broker is connected.
            now: monotonic clock, seconds; as ``progress_at``.
        """
        phase = (state.phase, None if state.latest_round is None else state.latest_round.number)
        if phase != self._phase:
            if self._phase[:1] == ("train",):
                self._last_round_s = now - self._phase_since
            self._phase, self._phase_since = phase, now
        snapshot = RunStatus(
            state=state,
            num_online=num_online,
            phase_s=now - self._phase_since,
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
            self._server.show(prometheus_metrics(snapshot))
        if is_up:
            for name, value in status_tags(snapshot).items():
                if self._published.get(name) != value:
                    self._publish(name, value.encode())
                    self._published[name] = value


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        # A disk that fails even here will be reported where something is written.
        return 0
