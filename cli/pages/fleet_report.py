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
from edgeflame.methods import METHODS
from edgeflame.statistics.head import HEAD_WEIGHT, MARKED_BAD, MARKS_LEFT_OUT, NO_HEAD

MAX_TICKS = 12

MEANINGS = {
    "loss": "what the training makes as small as it can",
    "fade": "FADE's part of the loss: how badly the site's patches are told from noised ones",
    "distillation": "FLAME's part of the loss: small where the model stays near the fleet's and leaves the site's last",
    "distance_squared": "FedProx's part of the loss: how far the weights are from the fleet's, squared",
    "contrast": "MOON's part of the loss: small where the model is nearer to the fleet's than to the site's last",
    "pull": "how far patches are from the entry of the memory that they belong to, squared",
    "separated": "share of the patches that are told from noised ones; 0.5 is guessing",
    "codec_error": "what the compression of the update lost, over the length of the update's change",
}
"""What the sites' figures mean; others are shown without."""

_LOSS_OF_HEAD = (
    "how badly the head with which the round began tells the site's marked parts from its good ones; of a site without "
    "marks only whether it lets the good ones be, so it is lower there"
)

_LOSS_TERMS = ("distillation", "distance_squared", "contrast")
"""What a method adds to FADE's loss, some from the second round on."""

_INTERNAL = ("num_",)
"""Beginnings of the names of counts that tell developers what a computation cost."""

_SUMMARY = {
    "num_images": "photographs",
    "num_images_in_statistics": "photographs in its statistics",
    "num_parts": "parts",
    "num_unreadable": "unreadable photographs",
    "num_prototypes": "prototypes",
    "promised_false_reject_rate": "good rejected, at most",
    "confidence": "with confidence",
    MARKED_BAD: "photographs marked bad",
    MARKS_LEFT_OUT: "marks left out",
    HEAD_WEIGHT: "weight of the head",
}
"""What the figures of a package are called; others by their names."""


@dataclass(frozen=True, kw_only=True)
class RoundChart:
    """One figure over the rounds."""

    title: str
    meaning: str
    svg: str
    note: str = ""
    """What a reader could mistake."""


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
        charts=round_charts(rounds, styles, loss=_LOSS_OF_HEAD if learns_a_head(ledger) else MEANINGS["loss"]),
        of_head=what_became_of_the_head(ledger),
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
        summaries=summary_columns(ledger["packages"]),
        is_internal=is_internal,
    )


def learns_a_head(ledger: dict[str, Any]) -> bool:
    """Whether a run learns a head from marks."""
    method = METHODS.get(ledger["method"])
    return method is not None and method.exchange == "head"


def what_became_of_the_head(ledger: dict[str, Any]) -> list[str]:
    """Sentences on a run that learns a head: at how many sites parts were marked, at how many it counts, and why not at
    the others. None for other runs.
    """
    if not learns_a_head(ledger):
        return []
    # The newest word of each site: of its updates, and of its package.
    told = {update["site"]: update["metrics"] for entry in ledger["rounds"] for update in entry["contributed"]}
    packages = {package["site"]: package["summary"] for package in ledger["packages"]}
    told |= packages
    marked, left_out = ([_number(one, name) for one in told.values()] for name in (MARKED_BAD, MARKS_LEFT_OUT))
    with_marks = sum(count > 0 for count in marked)
    sentences = [
        f"{with_marks} of {len(ledger['members'])} sites have marked bad parts: {sum(marked):.0f} photographs."
    ]
    if sum(left_out):
        sentences.append(f"{sum(left_out):.0f} marks were left out; the packages say why.")
    if packages:
        counts = sum(_number(summary, HEAD_WEIGHT) > 0 for summary in packages.values())
        sentences.append(f"The head counts at {counts} of {len(packages)} sites.")
    reasons: dict[str, list[str]] = {}
    for site, summary in packages.items():
        if NO_HEAD in summary:
            reasons.setdefault(str(summary[NO_HEAD]), []).append(site)
    return sentences + [f"Not at {', '.join(sites)}: {reason}." for reason, sites in reasons.items()]


def _number(told: dict[str, Any], name: str) -> float:
    """A figure that a site reported; 0 where it said something else, or nothing."""
    value = told.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def is_internal(name: str) -> bool:
    """Whether a figure is left out of the page; the ledger has it."""
    return name.startswith(_INTERNAL)


def summary_columns(packages: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Key and heading of the figures of the sites' packages: first those with a heading, without those that are 0."""
    found = {
        name for package in packages for name, value in package["summary"].items() if value != 0 and name != NO_HEAD
    }
    named = [(name, heading) for name, heading in _SUMMARY.items() if name in found]
    return named + [(name, name.replace("_", " ")) for name in sorted(found - _SUMMARY.keys())]


def contributors(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """Everyone who contributed, sorted."""
    return sorted({update["site"] for entry in rounds for update in entry["contributed"]})


def site_styles(sites: Sequence[str]) -> dict[str, str]:
    """A style for each site; of more sites than there are colours nobody could tell the lines apart: all are grey."""
    few = len(sites) <= NUM_COLOURS
    return {site: f"c{index}" if few else "many" for index, site in enumerate(sites)}


def round_charts(
    rounds: Sequence[dict[str, Any]], styles: dict[str, str], *, loss: str = MEANINGS["loss"]
) -> list[RoundChart]:
    """A chart for each metric that was reported, the loss and its parts first, and one for how far the updates were;
    ``loss`` says what the loss means.

    Of several rounds a figure that only one of them has is no chart; it stands in the table of updates.
    """
    names = {name for entry in rounds for update in entry["contributed"] for name in update["metrics"]}
    known = list(MEANINGS)
    ordered = sorted(
        (name for name in names if not is_internal(name)),
        key=lambda name: (known.index(name) if name in MEANINGS else len(known), name),
    )
    joined = joined_terms(rounds)
    charts = []
    for name in ordered:
        note, at = "", None
        if name == "loss" and joined:
            at = min(joined.values())
            parts = " and ".join(f"{term.replace('_', ' ')} (from round {n})" for term, n in sorted(joined.items()))
            what = "fade" if "fade" in names else "the other parts"
            note = (
                f"At the dashed line another term joins the loss: {parts}. A step up there is this term, not a worse "
                f"site; what can be compared over all rounds is {what}."
            )
        meaning = loss if name == "loss" else MEANINGS.get(name, "as each site reported it with its update")
        charts.append(_chart(rounds, styles, name, meaning, partial(_metric, name), note=note, joined_at=at))
    meaning = "how far each update was from the round's model, in units of that model's norm"
    charts.append(_chart(rounds, styles, "relative change", meaning, lambda update: update["relative_change"]))
    return [chart for chart in charts if chart is not None]


def joined_terms(rounds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The parts that the loss has only from a later round on, and from which."""
    reported = [(entry["round"], update["metrics"]) for entry in rounds for update in entry["contributed"]]
    first = min((number for number, metrics in reported if "loss" in metrics), default=0)
    found = {}
    for term in _LOSS_TERMS:
        begins = min((number for number, metrics in reported if term in metrics), default=first)
        if begins > first:
            found[term] = begins
    return found


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
    metrics: dict[str, float] = update["metrics"]
    if name == "fade" and name not in metrics and not any(term in metrics for term in _LOSS_TERMS):
        # Without another term the loss is all of it, and is reported as that alone.
        name = "loss"
    return metrics.get(name)


def _chart(
    rounds: Sequence[dict[str, Any]],
    styles: dict[str, str],
    title: str,
    meaning: str,
    value_of: Callable[[dict[str, Any]], float | None],
    *,
    note: str = "",
    joined_at: int | None = None,
) -> RoundChart | None:
    """A line for each site, and their mean; None if no site has a value, or only in one of several rounds.

    ``joined_at`` is the round before which a dashed line is drawn.
    """
    values: dict[str, dict[int, float]] = {}
    for entry in rounds:
        for update in entry["contributed"]:
            value = value_of(update)
            if value is not None and math.isfinite(value):
                values.setdefault(update["site"], {})[entry["round"]] = value
    numbers = sorted({number for by_round in values.values() for number in by_round})
    if not values or (len(numbers) == 1 and sum(bool(entry["contributed"]) for entry in rounds) > 1):
        return None
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
    if joined_at is not None:
        chart.rule("limit", x=joined_at - 0.5)
    for name, style, points in lines:
        if len(points) > 1:
            chart.curve(points.items(), style)
        dots = [(n, value, f"{name}, round {n}: {format_figure(value)}") for n, value in points.items()]
        chart.dots(dots, style, radius=3 if style in ("mean", "many") else 4.5)
    return RoundChart(title=title.replace("_", " "), meaning=meaning, svg=chart.svg(), note=note)
