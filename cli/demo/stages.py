"""The demo's steps, one function each. All but the boards and the pictures are the public commands, as processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cli.demo.plan import DemoPlan, DemoSiteResult, read_inspected
from cli.demo.report import Sample
from cli.programs import POLL_INTERVAL_S, ChildProcess, ChildProcesses, program
from edgeflame.cpus import usable_cpus
from edgeflame.log import Progress

FLEET = "demo"
SAMPLES_PER_DEFECT = 2
"""A glaring one and a faint one, which fill a row of the report."""


def edgeflame(*arguments: object) -> list[str]:
    """The command line of a command whose log the demo reads."""
    return program("edgeflame", "--log-format", "json", *arguments)


def write_boards(plan: DemoPlan, progress: Progress) -> None:
    """Each site's photographs, with its own camera and its own boards."""
    from boards.camera import Camera
    from boards.dataset import DatasetSpec, write_dataset

    for index, site in enumerate(plan.sites):

        def report(done: int, total: int, note: str = "", index: int = index) -> None:
            del note
            progress(index * total + done, plan.num_sites * total)

        spec = DatasetSpec(
            texture=plan.texture,
            num_train_parts=plan.train_parts,
            num_test_good_parts=plan.good_parts,
            num_test_defective_parts=plan.defective_parts,
            num_photos=plan.photos,
            image_size=plan.image_size,
            seed=plan.seed * 1000 + index,
            camera=Camera.for_site(site, plan.seed),
        )
        write_dataset(plan.data(site), spec, progress=report)


def train_together(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> dict[str, Any]:
    """A broker, an aggregator and the sites, each its own process, through the whole run; returns the ledger."""
    from edgeflame.mqtt.embedded_broker import EmbeddedBroker

    config, models, state = plan.out / "fleet.toml", plan.out / "models", plan.out / "state"
    config.write_text(
        f"rounds = {plan.rounds}\nmin_available_sites = {plan.num_sites}\nquorum = 1.0\n"
        f'statistics = "{plan.statistics}"\n\n'
        f'[learning]\nmethod = "flame"\nseed = {plan.seed}\n\n[learning.training]\nepochs = {plan.epochs}\n\n'
        f"[learning.input]\nheight = {plan.input_size}\nwidth = {plan.input_size}\n"
    )
    num_threads = max(1, usable_cpus() // plan.num_sites)
    with EmbeddedBroker(port=0) as broker:
        fleet = ("--broker", broker.url, "--fleet", FLEET)
        aggregate = edgeflame("aggregate", *fleet, "--state", state / "aggregator", "--config", config, "--out", models)
        aggregator = children.start("aggregator", aggregate, num_threads=1)
        running = [aggregator]
        for site in plan.sites:
            train = edgeflame(
                *("train", *fleet, "--site", site, "--data", plan.data(site)),
                *("--state", state / site, "--out", plan.package(site)),
            )
            running.append(children.start(site, train, num_threads=num_threads))
        # All are polled each time, so that one that has failed ends the demo at once.
        while sum(child.has_ended() for child in running) < len(running):
            _report_fleet(plan, aggregator, progress)
            time.sleep(POLL_INTERVAL_S)
    ledger: dict[str, Any] = json.loads((models / "ledger.json").read_bytes())
    return ledger


def compare_alone(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> dict[str, dict[str, Any]]:
    """What each site makes of its own boards, with the same backbone: site to the report of its evaluation."""
    config = plan.out / "alone.toml"
    config.write_text(f"seed = {plan.seed}\n\n[input]\nheight = {plan.input_size}\nwidth = {plan.input_size}\n")
    outputs = _at_each_site(
        plan, children, progress, "compare", lambda site: program("cli.demo.compare", plan.data(site), config)
    )
    return {site: msgspec.json.decode(output.read_bytes()) for site, output in outputs.items()}


def export_models(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> None:
    """The scoring graph of every site's model as an ONNX file."""

    def export(site: str) -> list[str]:
        return edgeflame("export", "--model", plan.package(site), "--onnx", plan.out / "models" / f"{site}.onnx")

    _at_each_site(plan, children, progress, "export", export)


def evaluate_models(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> dict[str, dict[str, Any]]:
    """Site to what `edgeflame evaluate --json` printed of the model that it took home from the run."""

    def evaluate(site: str) -> list[str]:
        return edgeflame("evaluate", "--model", plan.package(site), "--data", plan.data(site), "--json")

    outputs = _at_each_site(plan, children, progress, "evaluate", evaluate)
    return {site: msgspec.json.decode(output.read_bytes()) for site, output in outputs.items()}


def inspect_streams(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> dict[str, Path]:
    """Each site's line over a stream of boards it has never seen; site to the file of JSON lines."""

    def inspect(site: str) -> list[str]:
        source = (
            f"boards:{plan.texture}?site={site}&seed={plan.seed}&parts={plan.stream_parts}"
            f"&defect_rate={plan.defect_rate}&size={plan.image_size}"
        )
        rejects = plan.out / "rejects" / site
        return edgeflame("inspect", "--model", plan.package(site), "--json", "--source", source, "--images", rejects)

    # One line at a time, so that the latency is that of a machine with nothing else to do.
    return _at_each_site(plan, children, progress, "inspect", inspect, parallel=1)


def _at_each_site(
    plan: DemoPlan,
    children: ChildProcesses,
    progress: Progress,
    name: str,
    command_line: Callable[[str], list[str]],
    *,
    parallel: int | None = None,
) -> dict[str, Path]:
    """Run a program for each site; site to the file of what it printed."""
    outputs = children.run_all(
        {f"{name}-{site}": command_line(site) for site in plan.sites}, progress, parallel=parallel
    )
    return {site: outputs[f"{name}-{site}"] for site in plan.sites}


def collect_results(
    plan: DemoPlan, metrics: dict[str, dict[str, dict[str, Any]]], streams: dict[str, Path]
) -> list[DemoSiteResult]:
    """One :class:`DemoSiteResult` a site."""
    from edgeflame.package import read_package

    results = []
    for site in plan.sites:
        manifest = read_package(plan.package(site)).manifest
        threshold = manifest.threshold
        results.append(
            DemoSiteResult(
                site=site,
                num_train_images=plan.train_parts * plan.photos,
                num_train_parts=plan.train_parts,
                metrics=metrics[site],
                threshold=threshold.value,
                promise=threshold.promise(),
                inspected=read_inspected(streams[site]),
            )
        )
    return results


def draw_samples(plan: DemoPlan, progress: Progress) -> list[Sample]:
    """Test photographs of the first site with their heat maps: every defect from glaring to faint, and good ones."""
    import numpy as np

    from edge.overlay import draw_overlay
    from edge.runtimes.load import open_runtime
    from edgeflame.dataset import open_dataset
    from edgeflame.images import read_image, read_mask
    from edgeflame.package import read_package

    package = read_package(plan.package(plan.sites[0]))
    preprocessing, threshold = package.manifest.learning.input, package.manifest.threshold.value
    root = plan.data(plan.sites[0])
    severities = _severities(root)
    by_label: dict[str, dict[str, Any]] = {}
    for record in open_dataset(root).test:
        by_label.setdefault(record.label, {}).setdefault(record.group, record)  # one photograph of each part
    chosen = []
    for _, parts in sorted(by_label.items()):
        ordered = sorted(parts.values(), key=lambda record: -severities.get(record.name, 0.0))
        steps = np.linspace(0, len(ordered) - 1, min(SAMPLES_PER_DEFECT, len(ordered)))
        chosen += [ordered[round(step)] for step in steps]

    runtime = open_runtime(package.model_onnx, device="cpu")
    samples = []
    for index, record in enumerate(chosen):
        photo = read_image(record.path)
        scores, maps = runtime.score(preprocessing.apply(photo)[None]).scores_and_shown()
        mask = read_mask(record.mask) if record.mask else None
        samples.append(
            Sample(
                label=record.label,
                severity=severities.get(record.name, 0.0),
                photo=photo,
                heat_map=draw_overlay(photo, maps[0], threshold, mask),
                ratio=float(scores[0]) / threshold,
            )
        )
        progress(index + 1, len(chosen))
    return samples


def _report_fleet(plan: DemoPlan, aggregator: ChildProcess, progress: Progress) -> None:
    """Progress from what the aggregator logs: joined sites, what was accepted of them, finished packages."""
    notes = {"site_joined": "joined", "update_accepted": "sent its part", "site_finished": "has its package"}
    done, note = 0, "starting"
    for line in aggregator.log.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line may be half written
        if entry.get("event") in notes:
            done += 1
            note = f"{entry['site']} {notes[entry['event']]}"
    gathers_statistics = plan.statistics != "site"
    progress(done, plan.num_sites * (plan.rounds + 2 + gathers_statistics), note)


def _severities(root: Path) -> dict[str, float]:
    """How glaring each generated image's defect is, by the image's name."""
    files = json.loads((root / "dataset.json").read_bytes())["files"]
    return {name: entry.get("severity", 0.0) for name, entry in files.items()}
