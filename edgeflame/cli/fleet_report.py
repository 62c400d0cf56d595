"""``edgeflame fleet report``: a run's ledger as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("report")
@click.option("--state", type=click.Path(path_type=Path, file_okay=False), help="The aggregator's state folder.")
@click.option(
    "--ledger", "ledger_file", type=click.Path(path_type=Path, dir_okay=False), help="Or a ledger.json by itself."
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE", help="The page, HTML."
)
def report(state: Path | None, ledger_file: Path | None, out: Path) -> None:
    """Make a page of a run: loss and metrics by round, who contributed with what weight, who was left out and why.

    The page is one file that loads nothing. With --state it shows a run that is still going as well.
    """
    from time import strftime

    from edgeflame import __version__
    from edgeflame.errors import UsageError
    from edgeflame.fleet.report import render
    from edgeflame.statedir import storage_errors, write_durably

    if (state is None) == (ledger_file is None):
        msg = "--state or --ledger: exactly one of them has to say which run"
        raise UsageError(msg)
    ledger = _from_journal(state) if state is not None else _from_file(ledger_file)
    page = render(ledger, version=__version__, made=strftime("%Y-%m-%d %H:%M"))
    with storage_errors(out, "create the folder of"):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, page.encode())
    click.echo(f"{out}: run {ledger['run'][:8]}, {ledger['outcome']}, rounds begun: {len(ledger['rounds'])}")


def _from_journal(state: Path) -> dict[str, Any]:
    from aggregator.journal import Journal
    from aggregator.ledger import build_ledger
    from edgeflame.errors import UsageError

    path = state / "journal.sqlite"
    if not path.exists():
        msg = f"{state}: no journal here; expected the folder given to `edgeflame aggregate --state`"
        raise UsageError(msg)
    with Journal(path) as journal:
        run = journal.last_run()
    if run is None:
        msg = f"{path}: the journal has no run yet"
        raise UsageError(msg)
    return build_ledger(run)


def _from_file(path: Path | None) -> dict[str, Any]:
    import msgspec

    from edgeflame.errors import DataError

    assert path is not None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
        msg = f"{path}: not a ledger of `edgeflame aggregate` ({exc})"
        raise DataError(msg) from exc
    expected = {"run", "rounds", "members", "packages", "outcome"}
    if not expected <= found.keys():
        msg = f"{path}: not a ledger of `edgeflame aggregate` (without {', '.join(sorted(expected - found.keys()))})"
        raise DataError(msg)
    return found
