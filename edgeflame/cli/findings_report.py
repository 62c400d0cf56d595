"""Findings on the terminal, and the exit code they come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgeflame.findings import Finding

_STYLES = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✕", "red")}


def report(findings: Sequence[Finding], *, as_json: bool, footer: str | None = None) -> None:
    """Print findings: for each what was found and, if something is wrong, the one thing to do.

    Raises:
        NegativeAnswerError: there is a problem among them.
    """
    from edgeflame.console import print_json
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
        msg = f"{count} problem{'s' if count > 1 else ''} found"
        raise NegativeAnswerError(msg)
