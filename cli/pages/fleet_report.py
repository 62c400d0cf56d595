"""The page of ``edgeflame fleet report``: a run's ledger, one HTML file that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

from edgeflame.errors import MissingDependencyError

WIDTH, HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 88, 16, 14, 30
MAX_COLOURED = 8
"""Sites with a colour of their own; of more, lines would be told apart by nobody, and all are grey but the mean."""
MAX_TICKS = 12


@dataclass(frozen=True, kw_only=True)
class ChartLine:
    """A line of a chart: its points as SVG has them, and the dots with what they say."""

    name: str
    style: str
    points: str
    dots: Sequence[tuple[float, float, str]]


@dataclass(frozen=True, kw_only=True)
class RoundChart:
    """One figure over the rounds."""

    title: str
    meaning: str
    lines: Sequence[ChartLine]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True, kw_only=True)
class WeightShare:
    """A site's part of a round's bar, in percent from the left."""

    site: str
    style: str
    left: float
    width: float
    title: str


def render_run_page(ledger: dict[str, Any], *, version: str, made: str) -> str:
    """The page.

    Args:
        ledger: as ``ledger.json`` has it.
        version: of EdgeFlame.
        made: when, for people.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as exc:
        raise MissingDependencyError("the report needs jinja2: pip install 'edgeflame[fleet]'") from exc
    source = resources.files("cli.pages").joinpath("fleet_report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = format_figure
    environment.filters["short"] = lambda sha256: (sha256 or "–")[:12]
    rounds = ledger["rounds"]
    styles = site_styles(contributors(rounds))
    left_out = [(entry["round"], missed) for entry in rounds for missed in entry["left_out"]]
    return environment.from_string(source).render(
        ledger=ledger,
        rounds=rounds,
        charts=round_charts(rounds, styles),
        shares=[(entry, round_shares(entry, styles)) for entry in rounds],
        legend=[(site, style) for site, style in styles.items() if style != "many"],
        num_many=sum(style == "many" for style in styles.values()),
        left_out=left_out,
        # Ledgers of earlier versions have not these.
        departed=ledger.get("left", []),
        early=ledger.get("rounds_ended_early"),
        statistics=ledger.get("statistics"),
        num_contributions=sum(len(entry["contributed"]) for entry in rounds),
        rounds_done=sum(1 for entry in rounds if entry["model_sha256"]),
        summaries=sorted({name for package in ledger["packages"] for name in package["summary"]}),
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        bottom=HEIGHT - _BOTTOM,
        version=version,
        made=made,
    )


def contributors(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """Everyone who contributed, sorted."""
    return sorted({update["site"] for entry in rounds for update in entry["contributed"]})


def site_styles(sites: Sequence[str]) -> dict[str, str]:
    """A CSS class for each site."""
    few = len(sites) <= MAX_COLOURED
    return {site: f"s{index}" if few else "many" for index, site in enumerate(sites)}


def round_charts(rounds: Sequence[dict[str, Any]], styles: dict[str, str]) -> list[RoundChart]:
    """A chart for each metric that was reported, losses first, and one for how far the updates were."""
    names = {name for entry in rounds for update in entry["contributed"] for name in update["metrics"]}
    ordered = sorted(names, key=lambda name: ("loss" not in name, name))
    said = "as each site reported it with its update"
    made = [_chart(rounds, styles, name, said, partial(_metric, name)) for name in ordered]
    meaning = "how far each update was from the round's model, in units of that model's norm"
    made.append(_chart(rounds, styles, "relative change", meaning, lambda update: update["relative_change"]))
    return [chart for chart in made if chart.lines]


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


def format_figure(value: object) -> str:
    """A figure for people, at most four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _metric(name: str, update: dict[str, Any]) -> float | None:
    value: float | None = update["metrics"].get(name)
    return value


def _chart(
    rounds: Sequence[dict[str, Any]],
    styles: dict[str, str],
    title: str,
    meaning: str,
    value_of: Callable[[dict[str, Any]], float | None],
) -> RoundChart:
    values: dict[str, list[tuple[int, float]]] = {site: [] for site in styles}
    for entry in rounds:
        for update in entry["contributed"]:
            value = value_of(update)
            if value is not None and math.isfinite(value):
                values[update["site"]].append((entry["round"], value))
    values = {site: points for site, points in values.items() if points}
    if not values:
        return RoundChart(title=title, meaning=meaning, lines=(), x_ticks=(), y_ticks=())
    numbers = sorted({number for points in values.values() for number, _ in points})
    x = _scale(numbers[0], numbers[-1], _LEFT + 12, WIDTH - _RIGHT - 12)
    y_values, y = _axis([value for points in values.values() for _, value in points])
    lines = [_line(site, styles[site], points, x, y) for site, points in values.items()]
    if len(values) > 1:
        means = [
            (number, _mean(value for p in values.values() for at, value in p if at == number)) for number in numbers
        ]
        lines.append(_line("mean of the sites", "mean", means, x, y))
    step = math.ceil(len(numbers) / MAX_TICKS)
    return RoundChart(
        title=title.replace("_", " "),
        meaning=meaning,
        lines=lines,
        x_ticks=[(x(number), str(number)) for number in numbers[::step]],
        y_ticks=[(y(value), f"{value:.6g}") for value in y_values],
    )


def _line(
    name: str, style: str, points: Sequence[tuple[int, float]], x: Callable[[float], float], y: Callable[[float], float]
) -> ChartLine:
    dots = [(x(number), y(value), f"{name}, round {number}: {format_figure(value)}") for number, value in points]
    return ChartLine(name=name, style=style, points=" ".join(f"{at},{up}" for at, up, _ in dots), dots=dots)


def _axis(values: Sequence[float]) -> tuple[list[float], Callable[[float], float]]:
    """Round ticks that enclose the values, and the scale for them."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return ticks, _scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if high == low:
        return lambda _value: round((start + end) / 2, 1)
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
