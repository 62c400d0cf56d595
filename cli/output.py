"""What commands print: a progress bar, JSON documents, the findings of a check, thresholds and their promises.

Results go to standard output, progress and logs to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from edgeflame.log import Progress, no_progress, printable, printable_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.text import Text

    from edgeflame.dataset import ImageRecord
    from edgeflame.findings import Finding
    from edgeflame.threshold import Threshold
    from fitting.suspects import InfluentialPart


def echo(text: str = "", *, err: bool = False) -> None:
    """Print one line of text; names and reasons in it may be anybody's (:func:`edgeflame.log.printable`)."""
    click.echo(printable(text), err=err)


def cell(text: str, style: str = "") -> Text:
    """Text for a table, never mark-up; it may be anybody's, as in :func:`echo`."""
    from rich.text import Text

    return Text(printable(text), style=style)


PROGRESS_VARIABLE = "EDGEFLAME_PROGRESS"
_LINE_EVERY_S = 0.25


class _ProgressLines:
    """Progress as lines of JSON on standard error, a few a second; the first and the last always."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._next = 0.0
        self(0, 0)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        del note
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + _LINE_EVERY_S
        line = msgspec.json.encode({"progress": self._stage, "done": done, "total": total})
        sys.stderr.write(printable_json(line).decode() + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A bar with the time left on standard error; silent unless that is a terminal (or ``FORCE_COLOR`` is set).

    With ``EDGEFLAME_PROGRESS=json``, for programs: lines of JSON there, with ``stage``, ``done`` and ``total``.
    """
    if os.environ.get(PROGRESS_VARIABLE) == "json":
        yield _ProgressLines(description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    if not (console.is_terminal or os.environ.get("FORCE_COLOR")):
        yield no_progress
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[left]}"),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(description, total=None, note="", count="", left="")
        left = TimeLeft()

        def report(done: int, total: int, note: str = "") -> None:
            count = f"{done}/{total}" if total else ""
            seconds = left.seconds(done, total, time.monotonic())
            text = "" if seconds is None else f"about {in_minutes(seconds)} left"
            bar.update(task, completed=done, total=total or None, note=printable(note), count=count, left=text)

        yield report


class TimeLeft:
    """How long a piece of work will still take, by its mean pace since it began.

    The time since the last step counts too: what stands still seems to take longer, not to be over in a second.
    """

    MIN_SHARE = 0.05
    """Below this share of the work the pace is not known."""

    def __init__(self) -> None:
        self._total, self._first, self._last = 0, 0, 0
        self._began_at = 0.0

    def seconds(self, done: int, total: int, now: float) -> float | None:
        """Take note of what is done, and estimate the rest; None while nothing can be said."""
        if total != self._total or done < self._last:
            # Another piece of work.
            self._total, self._first, self._began_at = total, done, now
        self._last = done
        since = done - self._first
        if total <= 0 or done >= total or since < max(1.0, self.MIN_SHARE * (total - self._first)):
            return None
        return (now - self._began_at) * (total - done) / since


def in_minutes(seconds: float) -> str:
    """A time for people: ``40 s``, ``3 min``."""
    return f"{max(5, 5 * round(seconds / 5))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def print_json(value: object) -> None:
    """One JSON document on standard output, indented only for a terminal."""
    encoded = msgspec.json.encode(value)
    if sys.stdout.isatty():
        encoded = msgspec.json.format(encoded, indent=2)
    sys.stdout.write(printable_json(encoded).decode() + "\n")
    sys.stdout.flush()


NUM_INFLUENTIAL = 3
"""Of the parts that move the threshold so many are named; the package names more, and the page shows them."""

_STYLES = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✕", "red")}


def print_findings(findings: Sequence[Finding], *, as_json: bool, footer: str | None = None) -> None:
    """Print findings: for each what was found and, if something is wrong, the one thing to do.

    Raises:
        NegativeAnswerError: there is a problem among them.
    """
    from edgeflame.errors import NegativeAnswerError

    if as_json:
        print_json(findings)
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            sign, colour = _STYLES[finding.level]
            click.secho(sign, nl=False, fg=colour, bold=finding.level == "problem")
            echo(f" {finding.check:<{width}}  {finding.what}")
            if finding.do is not None:
                echo(f"{'':<{width + 2}}  → {finding.do}")
        if footer is not None:
            echo(footer)
    count = sum(finding.level == "problem" for finding in findings)
    if count:
        raise NegativeAnswerError(f"{count} problem{'s' if count > 1 else ''} found")


THIS_PACKAGE = "this package"


def print_threshold(threshold: Threshold) -> None:
    """Print the threshold, and what it promises."""
    ways = {"f1": "of the highest F1, ", "cost": "of the least expected cost that good parts allow, "}
    how = ways.get(threshold.chosen_by, "")
    echo(f"threshold {threshold.value:.4g}: {how}{threshold.promise()}")
    for note in threshold.caveats():
        echo(f"({note})")


def reconcile(threshold: Threshold, rejected: tuple[float, float] | None) -> str | None:
    """How what a threshold promises and what a test saw go together, a sentence with its full stop; None if the test
    says nothing of it.

    Args:
        threshold: with its promise.
        rejected: 95% interval of the share of good photographs that were rejected in the test.
    """
    if rejected is None:
        return None
    low, high = rejected
    promised = f"at most {threshold.false_reject_rate:.2%}"
    seen = f"{low:.0%} to {high:.0%} of new good photographs rejected"
    if threshold.unit == "part":
        return f"This test says {seen}; the promise ({promised}) counts parts, which have several photographs each."
    if low > threshold.false_reject_rate:
        return (
            f"This test says {seen}, more than the promise ({promised}): its good parts differ from those that the "
            "threshold was set from; look at what is rejected, and set it anew from parts like these."
        )
    if high > threshold.false_reject_rate:
        return (
            f"This test says {seen}, the promise {promised}: both hold. The promise rests on {threshold.basis()}, the "
            "range on this test alone, which is too small to say it more closely."
        )
    return f"This test says {seen}, within the promise ({promised})."


def print_promises(
    threshold: Threshold,
    good: npt.NDArray[np.floating],
    defective: npt.NDArray[np.floating] | None = None,
) -> None:
    """Print how many good and defective images each other promise would reject; nothing for a package without them."""
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
        counts = [share_above(good, value)]
        if with_defects:
            assert defective is not None
            counts.append(share_above(defective, value))
        table.add_row(name, f"{value:.4g}", *counts, note, style="bold" if note == THIS_PACKAGE else None)
    Console(width=max(Console().width, 100)).print(table)


def promise_rows(threshold: Threshold) -> Sequence[tuple[float | None, str, str]]:
    """The promises in rising order: the threshold (None where it cannot be promised), the promised rate, a note."""
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


def influential_in_words(found: Sequence[InfluentialPart], records: Sequence[ImageRecord]) -> str | None:
    """Which parts move the threshold by themselves, in two sentences with their full stops; None if none does.

    Args:
        found: with indices of ``records``.
        records: good images.
    """
    if not found:
        return None
    named = [
        f"without {records[one.images[0]].name}{' and the others of its part' * (len(one.images) > 1)} it would be "
        f"{one.without:.4g}"
        for one in found[:NUM_INFLUENTIAL]
    ]
    more = f", and so on for {len(found) - len(named)} more" if len(found) > len(named) else ""
    who = "One part moves" if len(found) == 1 else f"Each of {len(found)} parts by itself moves"
    return (
        f"{who} the threshold of the good parts: {', '.join(named)}{more} (by the same scores, nothing fitted again). "
        "Look at it: what is not a good part, take out and do this again."
    )


def share_above(scores: npt.NDArray[np.floating], value: float) -> str:
    """How many of the scores lie above a value, in words."""
    above = int((scores > value).sum())
    return f"{above} of {len(scores)} ({above / len(scores):.1%})" if len(scores) else "–"
