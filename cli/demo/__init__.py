"""`edgeflame demo`: the whole of EdgeFlame on one machine, on generated boards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.paths import FOLDER

T = TypeVar("T")


@click.command("demo")
@click.option(
    "--out",
    type=FOLDER,
    default=Path("demo-output"),
    show_default=True,
    help="Folder for data, models, logs and the report; an earlier demo's is replaced.",
)
@click.option("--quick", is_flag=True, help="Fewer boards to judge, seen more coarsely.")
@click.option(
    "--texture", default="warm_white_grid", show_default=True, help="Which product; see `edgeflame demo-data`."
)
@click.option("--sites", type=click.IntRange(2, 8), default=3, show_default=True, help="How many sites join.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of boards, cameras and training.")
def command(out: Path, quick: bool, texture: str, sites: int, seed: int) -> None:
    """See all of EdgeFlame work: sites with few boards each make a detector together over MQTT, then inspect.

    Generates furniture boards with defects, photographed by each site's own camera; starts a broker, an aggregator and
    the sites as processes of their own; has them share statistics of their good boards, but no image; sets thresholds,
    exports to ONNX, compares with what each site can do alone, inspects a stream of new boards, and writes a report.
    Ctrl-C stops all of it.
    """
    from cli.demo.plan import make_demo_plan

    run_demo(make_demo_plan(out=out, texture=texture, seed=seed, num_sites=sites, quick=quick))


def run_demo(plan: Any) -> None:
    """All steps of a :class:`~cli.demo.plan.DemoPlan`, then the table and the report."""
    from rich.console import Console

    from cli.demo import stages
    from cli.demo.plan import TABLE_WIDTH, results_table, what_joining_brought
    from cli.demo.report import ReportContents, write_demo_report
    from cli.output import progress_bar
    from cli.programs import ChildProcesses
    from edgeflame.log import Progress
    from edgeflame.state import write_json

    _prepare_folder(plan.out)
    timings: list[tuple[str, float]] = []

    def step(description: str, work: Callable[[Progress], T]) -> T:
        started = time.monotonic()
        with progress_bar(description) as progress:
            result = work(progress)
        timings.append((description, time.monotonic() - started))
        return result

    with ChildProcesses(plan.logs) as children:
        step("Photograph boards", lambda bar: stages.write_boards(plan, bar))
        ledger = step("Join over MQTT", lambda bar: stages.train_together(plan, children, bar))
        alone = step("Fit each alone, to compare", lambda bar: stages.compare_alone(plan, children, bar))
        step("Export to ONNX", lambda bar: stages.export_models(plan, children, bar))
        together = step("Evaluate", lambda bar: stages.evaluate_models(plan, children, bar))
        streams = step("Inspect a stream", lambda bar: stages.inspect_streams(plan, children, bar))
        samples = step("Draw heat maps", lambda bar: stages.draw_samples(plan, bar))
    metrics = {site: {"alone": alone[site], "together": together[site]} for site in plan.sites}
    results = stages.collect_results(plan, metrics, streams)
    write_json(plan.out / "results.json", results, indent=2)
    report = write_demo_report(
        ReportContents(
            plan=plan,
            results=results,
            samples=samples,
            ledger=ledger,
            stages=timings,
        )
    )
    # A pipe has no width of its own; the table must not be cut to the 80 columns assumed for it.
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    console.print(results_table(results))
    console.print(what_joining_brought(results))
    console.print(f"Done in {sum(seconds for _, seconds in timings):.0f} s. Report: [bold]{report}[/bold]")
    console.print(f"Models and their ONNX graphs: {plan.out / 'models'}, rejected boards: {plan.out / 'rejects'}")


def _prepare_folder(out: Path) -> None:
    """Make the folder; replace what an earlier demo left, and nothing else.

    Raises:
        StorageError: it holds something that is not a demo's, or cannot be written.
    """
    import shutil

    from edgeflame.errors import StorageError

    marker = out / ".edgeflame-demo"
    try:
        if out.exists() and any(out.iterdir()):
            if not marker.is_file():
                raise StorageError(f"{out} is not empty and was not made by a demo; name another folder with --out")
            shutil.rmtree(out)
        (out / "models").mkdir(parents=True)
        marker.write_text("Written by `edgeflame demo`, which replaces this folder when it runs again.\n")
    except OSError as exc:
        raise StorageError(f"{out}: cannot be written ({exc.strerror})") from exc
