"""What commands print: a progress bar, JSON documents, the findings of a check.

Results go to standard output, progress and logs to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from edgeflame.log import Progress, no_progress

if TYPE_CHECKING:
    from edgeflame.findings import Finding


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A bar with the time left on standard error; silent unless that is a terminal (or ``FORCE_COLOR`` is set)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    if not (console.is_terminal or os.environ.get("FORCE_COLOR")):
        yield no_progress
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(description, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield report


def print_json(value: object) -> None:
    """One JSON document on standard output, indented only for a terminal."""
    encoded = msgspec.json.encode(value)
    if sys.stdout.isatty():
        encoded = msgspec.json.format(encoded, indent=2)
    sys.stdout.write(encoded.decode() + "\n")
    sys.stdout.flush()


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
            mark = click.style(sign, fg=colour, bold=finding.level == "problem")
            click.echo(f"{mark} {finding.check:<{width}}  {finding.what}")
            if finding.do is not None:
                click.echo(f"{'':<{width + 2}}  → {finding.do}")
        if footer is not None:
            click.echo(footer)
    count = sum(finding.level == "problem" for finding in findings)
    if count:
        raise NegativeAnswerError(f"{count} problem{'s' if count > 1 else ''} found")
