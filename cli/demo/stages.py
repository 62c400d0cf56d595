"""The demo's steps, one function each. All but the boards and the pictures are the public commands, as processes.

The child processes are started with a log file each, watched, and stopped whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec

from cli.demo.plan import DemoPlan, DemoSiteResult, read_inspected
from cli.demo.report import Sample
from cli.programs import program
from edgeflame.background import die_with_parent
from edgeflame.errors import EdgeFlameError
from edgeflame.log import Progress

EDGEFLAME = ("edgeflame", "--log-format", "json")
STOP_TIMEOUT_S = 5.0
_STOPPING = (signal.SIGINT, signal.SIGTERM)
POLL_INTERVAL_S = 0.1


class ChildFailedError(EdgeFlameError):
    """A command the demo ran failed; the exit code is the command's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # this one error speaks for another process


@dataclass(frozen=True, kw_only=True)
class ChildProcess:
    """A running ``edgeflame`` command.

    Attributes:
        name: what messages call it.
        process: its handle.
        log: where its standard error goes (JSON lines).
        output: where its standard output goes.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    output: Path

    def check(self) -> bool:
        """Whether it has ended, well.

        Raises:
            ChildFailedError: it ended badly.
        """
        code = self.process.poll()
        if code is None:
            return False
        if code:
            raise ChildFailedError(self._failure(code), code if code > 0 else EdgeFlameError.exit_code)
        return True

    def _failure(self, code: int) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("edgeflame: ") if lines else f"exit code {code}"
        return f"{self.name}: {last} (whole log: {self.log})"


class ChildProcesses:
    """Context manager of child processes; leaving it stops those that still run, also on Ctrl-C."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[ChildProcess] = []

    def __enter__(self) -> ChildProcesses:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, *arguments: str, num_threads: int, program: Sequence[str] = EDGEFLAME) -> ChildProcess:
        """Start ``edgeflame ARGUMENTS`` with JSON logs, or another program of ours.

        Args:
            name: names the log files and the messages about it.
            arguments: the command and its arguments.
            num_threads: threads its numerical libraries may use.
            program: the Python module to run, and its first arguments.
        """
        log, output = self._logs / f"{name}.log", self._logs / f"{name}.out"
        environment = dict(os.environ)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = str(num_threads)
        with log.open("wb") as log_stream, output.open("wb") as output_stream:
            process = _spawn((*program, *arguments), environment, log_stream, output_stream)
        child = ChildProcess(name=name, process=process, log=log, output=output)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raise :class:`ChildFailedError` if any child ended badly."""
        for child in self._children:
            child.check()

    def stop(self, children: Sequence[ChildProcess] | None = None) -> None:
        """Ask the given children (default all) to end, then make them."""
        stopping = [child for child in (children or self._children) if child.process.poll() is None]
        for child in stopping:
            child.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in stopping:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children = [child for child in self._children if child not in stopping]

    def run_all(
        self, jobs: Sequence[tuple[str, Sequence[str]]], *, parallel: int, program: Sequence[str] = EDGEFLAME
    ) -> Iterator[ChildProcess]:
        """Run jobs ``(name, arguments)`` to their end, so many at a time; yields each as it ends.

        Raises:
            ChildFailedError: one of them failed; the others are stopped on leaving the context.
        """
        num_threads = max(1, (os.cpu_count() or 1) // parallel)
        waiting = list(reversed(jobs))
        running: list[ChildProcess] = []
        while waiting or running:
            while waiting and len(running) < parallel:
                name, arguments = waiting.pop()
                running.append(self.start(name, *arguments, num_threads=num_threads, program=program))
            ended = [child for child in running if child.check()]
            running = [child for child in running if child not in ended]
            yield from ended
            if not ended:
                time.sleep(POLL_INTERVAL_S)


def _spawn(
    arguments: Sequence[str], environment: dict[str, str], log: IO[bytes], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    # Python ignores what is raised in its hooks around a fork, a Ctrl-C that comes just then included.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        return subprocess.Popen(
            program(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            env=environment,
            # Not reached by the terminal's Ctrl-C: the demo stops its children itself, in order.
            start_new_session=True,
            preexec_fn=_begin,  # noqa: PLW1509 - two system calls, no locks
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _begin() -> None:
    """In the child, before the program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    die_with_parent(signal.SIGTERM)


FLEET = "demo"
SAMPLES_PER_DEFECT = 3


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
    """A broker, an aggregator and the sites, each its own process, through all rounds; returns the ledger."""
    from edgeflame.mqtt.embedded_broker import EmbeddedBroker

    config = plan.out / "fleet.toml"
    config.write_text(
        f"rounds = {plan.rounds}\nmin_sites = {plan.num_sites}\nquorum = 1.0\n\n"
        f'[learning]\nmethod = "flame"\nseed = {plan.seed}\n\n[learning.training]\nepochs = {plan.epochs}\n\n'
        f"[learning.input]\nheight = {plan.input_size}\nwidth = {plan.input_size}\n"
    )
    state = plan.out / "state"
    with EmbeddedBroker(port=0) as broker:
        common = ("--broker", broker.url, "--fleet", FLEET)
        aggregator = children.start(
            "aggregator",
            *("aggregate", *common, "--state", str(state / "aggregator"), "--config", str(config)),
            *("--out", str(plan.out / "models")),
            num_threads=1,
        )
        sites = [
            children.start(
                site,
                *("train", *common, "--site", site, "--data", str(plan.data(site)), "--state", str(state / site)),
                *("--out", str(plan.package(site))),
                num_threads=max(1, (os.cpu_count() or 1) // plan.num_sites),
            )
            for site in plan.sites
        ]
        ended = False
        while not ended:
            ended = sum(child.check() for child in (aggregator, *sites)) == 1 + len(sites)
            _report_fleet(plan, aggregator, progress)
            time.sleep(POLL_INTERVAL_S)
    ledger: dict[str, Any] = json.loads((plan.out / "models" / "ledger.json").read_bytes())
    return ledger


def compare_alone(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> dict[str, dict[str, dict[str, Any]]]:
    """No training at all, and FADE on its own images, at every site: site to condition to report."""
    config = plan.out / "alone.toml"
    config.write_text(
        f"seed = {plan.seed}\n\n[training]\nepochs = {plan.rounds * plan.epochs}\n\n"
        f"[input]\nheight = {plan.input_size}\nwidth = {plan.input_size}\n"
    )
    jobs = [(f"compare-{site}", (str(plan.data(site)), str(config))) for site in plan.sites]
    outputs = _run(children, jobs, progress, program=("cli.demo.compare",))
    return {site: msgspec.json.decode(outputs[f"compare-{site}"].read_bytes()) for site in plan.sites}


def export_models(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> None:
    """The scoring graph of every site's federated model as an ONNX file."""
    jobs = [
        (
            f"export-{site}",
            (
                *("export", "--model", str(plan.package(site))),
                *("--onnx", str(plan.out / "models" / f"{site}.onnx")),
            ),
        )
        for site in plan.sites
    ]
    _run(children, jobs, progress)


def evaluate_models(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> dict[str, dict[str, Any]]:
    """Site to what `edgeflame evaluate --json` printed of its federated model."""
    jobs = [
        (
            f"evaluate-{site}",
            ("evaluate", "--model", str(plan.package(site)), "--data", str(plan.data(site)), "--json"),
        )
        for site in plan.sites
    ]
    outputs = _run(children, jobs, progress)
    return {site: msgspec.json.decode(outputs[f"evaluate-{site}"].read_bytes()) for site in plan.sites}


def inspect_streams(plan: DemoPlan, children: ChildProcesses, progress: Progress) -> dict[str, Path]:
    """Each site's line over a stream of boards it has never seen; site to the file of JSON lines."""
    jobs = [
        (
            f"inspect-{site}",
            (
                *("inspect", "--model", str(plan.package(site)), "--json"),
                *("--source", _stream_source(plan, site)),
                *("--rejects", str(plan.out / "rejects" / site)),
            ),
        )
        for site in plan.sites
    ]
    # One line at a time, so that the latency is that of a machine with nothing else to do.
    outputs = _run(children, jobs, progress, parallel=1)
    return {site: outputs[f"inspect-{site}"] for site in plan.sites}


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
                num_train_images=manifest.num_images,
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
        scores, maps = runtime.score(preprocessing.apply(photo)[None])
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
    """Progress from what the aggregator logs: joined sites, accepted updates, finished packages."""
    notes = {"site_joined": "joined", "update_accepted": "trained", "site_finished": "has its package"}
    done, note = 0, "starting"
    for line in aggregator.log.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line may be half written
        if entry.get("event") in notes:
            done += 1
            note = f"{entry['site']} {notes[entry['event']]}"
    progress(done, plan.num_sites * (plan.rounds + 2), note)


def _stream_source(plan: DemoPlan, site: str) -> str:
    return (
        f"boards:{plan.texture}?site={site}&seed={plan.seed}&parts={plan.stream_parts}"
        f"&defect_rate={plan.defect_rate}&size={plan.image_size}"
    )


def _severities(root: Path) -> dict[str, float]:
    """How glaring each generated image's defect is, by the image's name."""
    files = json.loads((root / "dataset.json").read_bytes())["files"]
    return {name: entry.get("severity", 0.0) for name, entry in files.items()}


def _run(
    children: ChildProcesses,
    jobs: Sequence[tuple[str, Sequence[str]]],
    progress: Progress,
    *,
    parallel: int | None = None,
    program: Sequence[str] = EDGEFLAME,
) -> dict[str, Path]:
    outputs: dict[str, Path] = {}
    at_a_time = parallel or max(1, min(len(jobs), os.cpu_count() or 1))
    for child in children.run_all(jobs, parallel=at_a_time, program=program):
        outputs[child.name] = child.output
        progress(len(outputs), len(jobs), child.name)
    return outputs
