"""What Prometheus reads about released models, beside what is known of every camera."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from edge.models.figures import Figures


@final
class ModelFigures(Collector):
    """Asked for when they are read.

    Args:
        figures: gives them.
    """

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        labels = ["product", "role"]
        trial = GaugeMetricFamily("edgeflame_model_on_trial", "1 while a new model is on trial.", labels=["product"])
        parts = GaugeMetricFamily("edgeflame_shadow_parts", "Parts judged by two models.", labels=labels)
        differing = GaugeMetricFamily("edgeflame_shadow_differing", "Of these, with two verdicts.", labels=labels)
        skipped = GaugeMetricFamily("edgeflame_shadow_skipped", "Parts the second model was busy for.", labels=labels)
        outcomes = CounterMetricFamily("edgeflame_releases", "What became of releases.", labels=["product", "fate"])
        figures = self._figures()
        for one in figures.beside:
            trial.add_metric([one.product], one.on_trial)
            if one.found is not None:
                for metric, value in (
                    (parts, one.found.parts),
                    (differing, one.found.differing),
                    (skipped, one.found.skipped),
                ):
                    metric.add_metric([one.product, one.role], value)
        for (product, fate), count in figures.fates.items():
            outcomes.add_metric([product, fate], count)
        yield from (trial, parts, differing, skipped, outcomes)
