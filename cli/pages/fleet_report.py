"""The page of ``edgeflame fleet report``: a run's ledger, one HTML file that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from cli.pages.charts import HALF, NUM_COLOURS, Axis, Chart, round_axis
from cli.pages.page import format_figure, render_page

MAX_TICKS = 12


@dataclass(frozen=True, kw_only=True)
class RoundChart:
    """One figure over the rounds."""

    title: str
    meaning: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class WeightShare:
    """A site's part of a round's bar, in percent from the left."""

    site: str
    style: str
    left: float
    width: float
    title: str


def render_run_page(ledger: dict[str, Any]) -> str:
    """The page of a ledger, as ``ledger.json`` has it.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    rounds = ledger["rounds"]
    styles = site_styles(contributors(rounds))
    num_many = sum(style == "many" for style in styles.values())
    return render_page(
        "fleet_report.html.j2",
        ledger=ledger,
        rounds=rounds,
        charts=round_charts(rounds, styles),
        shares=[(entry, round_shares(entry, styles)) for entry in rounds],
        legend=[
            *((style, site) for site, style in styles.items() if style != "many"),
            *([("many", f"each of {num_many} sites")] if num_many else []),
            ("mean", "mean of the sites (dashed)"),
        ],
        left_out=[(entry["round"], missed) for entry in rounds for missed in entry["left_out"]],
        # Ledgers of earlier versions lack these.
        departed=ledger.get("left", []),
        early=ledger.get("rounds_ended_early"),
        statistics=ledger.get("statistics"),
        num_contributions=sum(len(entry["contributed"]) for entry in rounds),
        rounds_done=sum(1 for entry in rounds if entry["model_sha256"]),
        summaries=sorted({name for package in ledger["packages"] for name in package["summary"]}),
    )


def contributors(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """Everyone who contributed, sorted."""
    return sorted({update["site"] for entry in rounds for update in entry["contributed"]})


def site_styles(sites: Sequence[str]) -> dict[str, str]:
    """A style for each site; of more sites than there are colours nobody could tell the lines apart: all are grey."""
    few = len(sites) <= NUM_COLOURS
    return {site: f"c{index}" if few else "many" for index, site in enumerate(sites)}


def round_charts(rounds: Sequence[dict[str, Any]], styles: dict[str, str]) -> list[RoundChart]:
    """A chart for each metric that was reported, losses first, and one for how far the updates were."""
    names = {name for entry in rounds for update in entry["contributed"] for name in update["metrics"]}
    ordered = sorted(names, key=lambda name: ("loss" not in name, name))
    source = "as each site reported it with its update"
    charts = [_chart(rounds, styles, name, source, partial(_metric, name)) for name in ordered]
    meaning = "how far each update was from the round's model, in units of that model's norm"
    charts.append(_chart(rounds, styles, "relative change", meaning, lambda update: update["relative_change"]))
    return [chart for chart in charts if chart is not None]


def round_shares(entry: dict[str, Any], styles: dict[str, str]) -> list[WeightShare]:
    """Who had which weight in a round."""
    found, left = [], 0.0
    for update in entry["contributed"]:
        weight = update["weight"]
        if weight is None:
            continue
        title = f"{update['site']}: {weight:.1%} ({update['num_samples']} samples)"
        width = round(100 * weight, 3)
        found.append(
            WeightShare(site=update["site"], style=styles[update["site"]], left=left, width=width, title=title)
        )
        left = round(left + width, 3)
    return found


def _metric(name: str, update: dict[str, Any]) -> float | None:
    value: float | None = update["metrics"].get(name)
    return value


def _chart(
    rounds: Sequence[dict[str, Any]],
    styles: dict[str, str],
    title: str,
    meaning: str,
    value_of: Callable[[dict[str, Any]], float | None],
) -> RoundChart | None:
    """A line for each site, and their mean; None if no site has a value."""
    values: dict[str, dict[int, float]] = {}
    for entry in rounds:
        for update in entry["contributed"]:
            value = value_of(update)
            if value is not None and math.isfinite(value):
                values.setdefault(update["site"], {})[entry["round"]] = value
    if not values:
        return None
    numbers = sorted({number for by_round in values.values() for number in by_round})
    lines = [(site, styles[site], values[site]) for site in styles if site in values]
    if len(values) > 1:
        means = {n: fmean(by_round[n] for by_round in values.values() if n in by_round) for n in numbers}
        lines.append(("mean of the sites", "mean", means))
    ticks = [(number, str(number)) for number in numbers[:: math.ceil(len(numbers) / MAX_TICKS)]]
    # A little room at both ends, or the first dot would lie on the labels.
    room = 0.03 * (numbers[-1] - numbers[0])
    chart = Chart(
        f"{title} by round",
        Axis(low=numbers[0] - room, high=numbers[-1] + room, ticks=ticks, grid=False),
        round_axis(value for by_round in values.values() for value in by_round.values()),
        width=HALF,
        height=190,
    )
    for name, style, points in lines:
        if len(points) > 1:
            chart.curve(points.items(), style)
        dots = [(n, value, f"{name}, round {n}: {format_figure(value)}") for n, value in points.items()]
        chart.dots(dots, style, radius=3 if style in ("mean", "many") else 4.5)
    return RoundChart(title=title.replace("_", " "), meaning=meaning, svg=chart.svg())
