"""Axes and marks of the pages' charts, by the numbers in their SVG."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.pages.charts import Axis, Chart, class_styles, histogram_chart, precision_recall_chart, roc_chart, round_axis

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_a_round_axis_encloses_its_values(values: list[float]) -> None:
    axis = round_axis(values)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(values)
    assert max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 7
    assert all(math.isfinite(axis.share(value)) for value in values)


def test_equal_ratios_are_equally_far_on_a_logarithmic_axis() -> None:
    axis = Axis(low=0.5, high=8, ticks=(), log=True)
    assert [axis.share(value) for value in (0.5, 1, 2, 4, 8)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert Axis(low=3, high=3, ticks=()).share(3) == 0.5


def test_names_are_text_and_values_grow_to_the_right_and_upwards() -> None:
    axis = Axis(low=0, high=10, ticks=[(5, "<five>")])
    chart = Chart("a & b", axis, axis)
    chart.dots([(1, 1, "low <b>"), (9, 9, "high")], "c0")
    svg = chart.svg()
    (x1, y1), (x2, y2) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert float(x1) < float(x2)
    assert float(y1) > float(y2)
    assert "&lt;five&gt;" in svg
    assert "<title>low &lt;b&gt;</title>" in svg
    assert 'aria-label="a &amp; b"' in svg


def test_every_class_has_a_look_of_its_own() -> None:
    styles = class_styles([str(index) for index in range(24)])
    assert len(set(styles.values())) == 24


def test_the_curves_of_a_perfect_model_run_along_the_edges() -> None:
    good, defects = np.array([0.1, 0.2, 0.3]), {"dent": np.array([2.0, 3.0]), "scratch": np.array([4.0])}
    for chart in (roc_chart(good, defects, 1.0), precision_recall_chart(good, defects, 1.0)):
        assert chart.count("<polyline") == 3 + ("at the threshold: 0.0% rejected" in chart)
        assert "100.0%" in chart
    # Three good ones in one bin or more, and a row for each class.
    histogram = histogram_chart({"good": good, **defects}, 1.0)
    assert histogram.count('class="bad"') == 3
    assert "good (3)" in histogram
