"""Prometheus metrics at ``/metrics``: cameras, delivery, released models, PLCs, the state folder's disk, certificate.

Every name is listed in docs/inspection.md, and a test compares the two.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol, final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from edge.delivery.pipeline import Deliverer
from edge.result import Inspected
from edge.status import CameraStatus, DriftCondition, RolloutStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Without the second series of each counter with its time of creation, which no alert needs.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_RATIO_BUCKETS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)

_CONDITIONS = {DriftCondition.LEARNING: -1, DriftCondition.OK: 0, DriftCondition.WARNING: 1, DriftCondition.ALARM: 2}

_COUNTED = (
    ("triggers", "triggers", "Parts announced."),
    ("triggers_lost", "triggers_lost", "Triggers not taken: too many parts waited."),
    ("missing", "parts_missing", "Parts that never came, by the others' numbers."),
    ("duplicates", "parts_duplicate", "Parts whose number or name had come before."),
    ("late", "parts_late", "Parts without a verdict at their deadline."),
    ("late_answers", "late_answers", "Answers of the model for parts that had been decided without it."),
)
"""Fields of :class:`edge.status.PartCounts`: field, metric, meaning."""


class LineMetrics:
    """Prometheus metrics of the line: a sink that counts results, and the registry of all metrics.

    Args:
        statuses: gives the cameras' status; called at each scrape.
        deliverers: one for each destination.
    """

    def __init__(self, statuses: Callable[[], Sequence[CameraStatus]], *, deliverers: Sequence[Deliverer]) -> None:
        self.registry = CollectorRegistry()
        self._parts = Counter("edgeflame_parts", "Parts judged.", ["camera", "verdict"], registry=self.registry)
        for status in statuses():
            for verdict in ("pass", "fail", "unknown"):
                self._parts.labels(status.camera, verdict)
        self._reasons = Counter(
            "edgeflame_reasons",
            "Reasons for parts that were not passed.",
            ["camera", "reason"],
            registry=self.registry,
        )
        self._latency = Histogram(
            "edgeflame_latency_seconds",
            "Capture to verdict.",
            ["camera"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._ratio = Histogram(
            "edgeflame_score_ratio",
            "Score over threshold.",
            ["camera"],
            buckets=_RATIO_BUCKETS,
            registry=self.registry,
        )
        self._last = Gauge(
            "edgeflame_last_part_timestamp_seconds",
            "When the last part was captured.",
            ["camera"],
            registry=self.registry,
        )
        self.registry.register(_Current(statuses, deliverers))

    def accept(self, inspected: Inspected) -> None:
        """Count a part."""
        result = inspected.result
        self._parts.labels(result.camera, result.verdict).inc()
        for reason in result.reasons:
            self._reasons.labels(result.camera, reason).inc()
        self._latency.labels(result.camera).observe(result.latency_ms / 1000)
        if result.ratio is not None:
            self._ratio.labels(result.camera).observe(result.ratio)
        self._last.labels(result.camera).set(result.captured.timestamp())

    def close(self) -> None:
        """Nothing to close."""

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Current(Collector):
    """Metrics of cameras and destinations, read from their status at each scrape."""

    def __init__(self, statuses: Callable[[], Sequence[CameraStatus]], deliverers: Sequence[Deliverer]) -> None:
        self._statuses = statuses
        self._deliverers = deliverers

    def collect(self) -> Iterable[Metric]:
        threshold = GaugeMetricFamily(
            "edgeflame_threshold", "Raw distance above which a part fails.", labels=["camera"]
        )
        model = GaugeMetricFamily("edgeflame_model_info", "The model that runs.", labels=["camera", "product", "model"])
        up = GaugeMetricFamily("edgeflame_camera_up", "1 while parts come from a camera.", labels=["camera"])
        paused = GaugeMetricFamily("edgeflame_paused", "1 while a camera is paused.", labels=["camera"])
        dropped = CounterMetricFamily(
            "edgeflame_frames_dropped", "Frames never looked at.", labels=["camera", "reason"]
        )
        drift = GaugeMetricFamily(
            "edgeflame_drift", "-1 learning, 0 ok, 1 warning, 2 alarm.", labels=["camera", "group"]
        )
        evidence = GaugeMetricFamily(
            "edgeflame_drift_evidence", "Of a stream's drift; 1 is an alarm.", labels=["camera", "stream"]
        )
        rank = GaugeMetricFamily(
            "edgeflame_drift_rank", "Of the last parts among the reference's.", labels=["camera", "stream"]
        )
        golden = GaugeMetricFamily("edgeflame_golden_passed", "Of the last self-test.", labels=["camera"])
        tested = GaugeMetricFamily(
            "edgeflame_golden_timestamp_seconds", "When the last self-test was.", labels=["camera"]
        )
        for status in self._statuses():
            if status.drift is not None:
                for group, condition in (("parts", status.drift.parts), ("camera", status.drift.camera)):
                    drift.add_metric([status.camera, group], _CONDITIONS[condition])
                for stream in status.drift.streams:
                    evidence.add_metric([status.camera, stream.name], stream.evidence)
                    if stream.rank is not None:
                        rank.add_metric([status.camera, stream.name], stream.rank)
            if status.golden is not None and status.golden.last is not None:
                golden.add_metric([status.camera], status.golden.last.passed)
                tested.add_metric([status.camera], status.golden.last.at.timestamp())
            threshold.add_metric([status.camera], status.threshold)
            model.add_metric([status.camera, status.product, status.model], 1)
            up.add_metric([status.camera], status.problem is None and not status.ended)
            paused.add_metric([status.camera], status.paused)
            for reason, count in status.dropped.items():
                dropped.add_metric([status.camera, reason], count)
        yield from (threshold, model, up, paused, dropped, drift, evidence, rank, golden, tested)
        yield from _of_parts(self._statuses())
        waiting = GaugeMetricFamily("edgeflame_outbox_waiting", "Results not yet delivered.", labels=["destination"])
        lost = CounterMetricFamily("edgeflame_results_lost", "Results given up undelivered.", labels=["destination"])
        failures = CounterMetricFamily("edgeflame_delivery_failures", "Failed attempts.", labels=["destination"])
        for deliverer in self._deliverers:
            destination = deliverer.status()
            waiting.add_metric([deliverer.name], destination.waiting)
            lost.add_metric([deliverer.name], destination.lost)
            failures.add_metric([deliverer.name], deliverer.num_failures)
        yield from (waiting, lost, failures)


def _of_parts(statuses: Sequence[CameraStatus]) -> Iterable[Metric]:
    for name, metric, meaning in _COUNTED:
        counter = CounterMetricFamily(f"edgeflame_{metric}", meaning, labels=["camera"])
        for status in statuses:
            counter.add_metric([status.camera], getattr(status.counts, name))
        yield counter
    up = GaugeMetricFamily("edgeflame_trigger_up", "1 while parts can be announced.", labels=["camera"])
    for status in statuses:
        if status.trigger_up is not None:
            up.add_metric([status.camera], status.trigger_up)
    yield up


_SHADOWED = (
    ("parts", "Parts judged by two models."),
    ("differing", "Of these, with two verdicts."),
    ("skipped", "Parts the second model was busy for."),
)
"""Fields of :class:`edgeflame.mqtt.release_messages.Disagreement`: field and meaning."""


@final
class RolloutMetrics(Collector):
    """Metrics of the rollout of released models.

    Args:
        figures: gives the status of the rollout; called at each scrape.
    """

    def __init__(self, figures: Callable[[], RolloutStatus]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        trial = GaugeMetricFamily("edgeflame_model_on_trial", "1 while a new model is on trial.", labels=["product"])
        outcomes = CounterMetricFamily("edgeflame_releases", "What became of releases.", labels=["product", "fate"])
        figures = self._figures()
        for one in figures.beside:
            trial.add_metric([one.product], one.on_trial)
        for (product, fate), count in figures.fates.items():
            outcomes.add_metric([product, fate], count)
        yield from (trial, outcomes)
        for name, meaning in _SHADOWED:
            # The gauges have the old names, kept for one version more.
            for kind in (CounterMetricFamily, GaugeMetricFamily):
                metric = kind(f"edgeflame_shadow_{name}", meaning, labels=["product", "role"])
                for one in figures.beside:
                    if one.found is not None:
                        metric.add_metric([one.product, one.role], getattr(one.found, name))
                yield metric


class PlcLink(Protocol):
    """A PLC sink, as far as metrics need it."""

    @property
    def is_connected(self) -> bool:
        """Whether the last write reached it."""

    @property
    def num_missed(self) -> int:
        """Verdicts that could not be written in time."""


@final
class HostMetrics(Collector):
    """Metrics of PLCs, disk and certificate, read at each scrape.

    Args:
        state: the state folder, whose disk is measured.
        plcs: PLC sinks by camera.
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
        try:
            free_bytes = shutil.disk_usage(self._state).free
        except OSError:
            # A disk that cannot be asked counts as full.
            free_bytes = 0
        # The second is the old name, for one version more.
        for name in ("edgeflame_state_free_bytes", "edgeflame_free_bytes"):
            yield GaugeMetricFamily(name, "Free on the disk of the state folder.", value=free_bytes)
        expiry = GaugeMetricFamily(
            "edgeflame_certificate_expiry_timestamp_seconds", "When the line's certificate expires."
        )
        if self._certificate_expires is not None:
            expiry.add_metric([], self._certificate_expires.timestamp())
        yield expiry
