"""A site's metrics for Prometheus, renewed about once a second."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path

from edgeflame.metrics import Metric, MetricsServer
from edgeflame.mqtt.client import MqttClient
from edgeflame.mqtt.messages import RoundState
from edgeflame.statistics.head import HEAD_WEIGHT, MARKED_BAD, MARKS_LEFT_OUT
from trainer.agent.tasks import TaskResult

METRICS_INTERVAL_S = 1.0
_METRIC_PREFIX = "edgeflame_site"


class SiteMetrics:
    """Publishes a site's metrics.

    Args:
        state_dir: its disk's free space is a metric.
        server: serves them; None publishes nothing.
        certificate_expires: end of the validity of the site's certificate, if that is known.
    """

    def __init__(
        self, state_dir: Path, server: MetricsServer | None, *, certificate_expires: datetime | None = None
    ) -> None:
        self._state_dir = state_dir
        self._certificate_expires = certificate_expires
        self._server = server
        self._refusals: Counter[str] = Counter()
        self._of_head = dict.fromkeys((MARKED_BAD, MARKS_LEFT_OUT, HEAD_WEIGHT), math.nan)
        self._due_at = 0.0
        self._activity: tuple[str, int, int] = ("", 0, 0)
        self._progress_at: float | None = None

    def count_refusal(self, reason: str) -> None:
        """Count a refusal by the aggregator."""
        self._refusals[reason] += 1

    def on_task_done(self, result: TaskResult) -> None:
        """Keep what a task says of marks and of the fleet's head."""
        told = {**result.metrics, **result.summary}
        self._of_head.update({name: float(told[name]) for name in self._of_head.keys() & told.keys()})

    def publish(
        self,
        activity: tuple[str, int, int],
        announced: RoundState | None,
        *,
        link: MqttClient | None,
        is_up: bool,
        is_welcome: bool,
        now: float,
    ) -> None:
        """Renew the metrics, if it is time.

        Args:
            activity: wire name of the current step, how far it is, how far it goes.
            announced: the run's announced state.
            link: counts bytes.
            is_up: whether it is connected.
            is_welcome: whether the aggregator accepted this site.
            now: monotonic clock, seconds.
        """
        if self._server is None:
            return
        if activity != self._activity or self._progress_at is None:
            self._activity, self._progress_at = activity, now
        if now < self._due_at:
            return
        self._due_at = now + METRICS_INTERVAL_S
        name, step, num_steps = activity
        try:
            free_bytes = shutil.disk_usage(self._state_dir).free
        except OSError:
            free_bytes = 0
        self._server.show(
            [
                _gauge("broker_connected", "1 while the broker is connected.", is_up),
                _gauge("welcome", "1 while the aggregator knows this site.", is_welcome),
                Metric(
                    name=f"{_METRIC_PREFIX}_activity",
                    meaning="1 for what the site is doing.",
                    label="activity",
                    values={name: 1},
                ),
                _gauge("step", "How far that is.", step),
                _gauge("steps", "How far it goes; 0 if that is not known.", num_steps),
                _gauge("round", "The round that is open.", 0 if announced is None else announced.round),
                _gauge("progress_age_seconds", "Since this site was a step further.", now - self._progress_at),
                Metric(
                    name=f"{_METRIC_PREFIX}_refusals",
                    meaning="What the aggregator refused since the start, by reason.",
                    kind="counter",
                    label="reason",
                    values=dict(self._refusals),
                ),
                _gauge(
                    "marks_used",
                    "Photographs marked bad that the fleet's head is learnt from; NaN if that is not known.",
                    self._of_head[MARKED_BAD],
                ),
                _gauge("marks_left_out", "Marks that cannot be used; NaN likewise.", self._of_head[MARKS_LEFT_OUT]),
                _gauge(
                    "head_weight",
                    "Weight of the fleet's head here; 0: it does not count; NaN until that is decided.",
                    self._of_head[HEAD_WEIGHT],
                ),
                _counter("received_bytes", "Payload received since the start.", 0 if link is None else link.bytes_in),
                _counter("sent_bytes", "Payload sent since the start.", 0 if link is None else link.bytes_out),
                _gauge("free_bytes", "Free on the disk of the state folder.", free_bytes),
                _gauge(
                    "certificate_expiry_timestamp_seconds",
                    "When the kit's certificate expires; NaN if that is not known.",
                    math.nan if self._certificate_expires is None else self._certificate_expires.timestamp(),
                ),
            ]
        )


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return Metric(name=f"{_METRIC_PREFIX}_{name}", meaning=meaning, value=value)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return Metric(name=f"{_METRIC_PREFIX}_{name}", meaning=meaning, value=value, kind="counter")
