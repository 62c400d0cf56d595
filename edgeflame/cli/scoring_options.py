"""The options of commands that score images with a package, or set its threshold, and how thresholds are printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from edgeflame.threshold import Unit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeflame.threshold import Threshold

F = TypeVar("F", bound=Callable[..., Any])

THIS_PACKAGE = "this package"

_PATH = click.Path(path_type=Path)

model_option = click.option("--model", required=True, type=_PATH, metavar="FILE", help="The package (.edgeflame).")

device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where it runs."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def dataset_options(function: F) -> F:
    """``--groups`` and ``--on-unreadable``."""
    function = click.option(
        "--on-unreadable",
        type=click.Choice(["skip", "refuse"]),
        default="skip",
        show_default=True,
        help="Skip and count images that cannot be read, or stop at the first.",
    )(function)
    return click.option(
        "--groups",
        type=_PATH,
        metavar="CSV",
        help="Which images show the same part.  [default: groups.csv or tiles.csv in the folder]",
    )(function)


def promise_options(default: str) -> Callable[[F], F]:
    """``--false-reject-rate``, ``--confidence`` and ``--unit``; ``default`` says where the defaults come from."""

    def decorate(function: F) -> F:
        for option in (
            click.option(
                "--unit",
                type=click.Choice(get_args(Unit)),
                help="What the line rejects: each photograph by itself, or a part as soon as one of its photographs is."
                f"  [default: {default}]",
            ),
            click.option("--confidence", type=float, help=f"With which this is promised.  [default: {default}]"),
            click.option(
                "--false-reject-rate",
                type=float,
                help=f"Share of the good that may be rejected.  [default: {default}]",
            ),
        ):
            function = option(function)
        return function

    return decorate


def print_threshold(threshold: Threshold) -> None:
    """What it is and what it promises, in a line each."""
    how = "of the highest F1, " if threshold.chosen_by == "f1" else ""
    click.echo(f"threshold {threshold.value:.4g}: {how}{threshold.promise()}")
    for note in threshold.caveats():
        click.echo(f"({note})")


def print_promises(
    threshold: Threshold,
    good: npt.NDArray[np.floating],
    defective: npt.NDArray[np.floating] | None = None,
) -> None:
    """A table of what other promises would cost and bring on scored images; nothing for a package without them."""
    if not threshold.others:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    with_defects = defective is not None and len(defective) > 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["promised at most", "threshold", "good rejected", *(["defective caught"] if with_defects else []), ""]
    for heading in columns:
        table.add_column(heading, justify="right" if heading else "left")
    for value, name, note in promise_rows(threshold):
        if value is None:
            table.add_row(name, "–", "–", *(["–"] if with_defects else []), note, style="dim")
            continue
        counts = [_share(good, value)]
        if with_defects:
            assert defective is not None
            counts.append(_share(defective, value))
        table.add_row(name, f"{value:.4g}", *counts, note, style="bold" if note == THIS_PACKAGE else None)
    Console(width=max(Console().width, 100)).print(table)


def promise_rows(threshold: Threshold) -> Sequence[tuple[float | None, str, str]]:
    """Rising promises: threshold (None where it cannot be promised), what is promised, a note."""
    rates = {one.false_reject_rate: one.value for one in threshold.others}
    rates[threshold.false_reject_rate] = threshold.value
    mine = threshold.false_reject_rate
    return [
        (
            value,
            f"{rate:.1%}",
            "too few parts" if value is None else THIS_PACKAGE if rate == mine else "",
        )
        for rate, value in sorted(rates.items())
    ]


def _share(scores: npt.NDArray[np.floating], value: float) -> str:
    above = int((scores > value).sum())
    return f"{above} of {len(scores)} ({above / len(scores):.1%})" if len(scores) else "–"
