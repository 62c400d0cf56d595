"""Soak test of the daemon over hours: does it lose a result, and does it grow?

    python benchmarks/soak/run.py --minutes 60
    python benchmarks/soak/run.py --minutes 10

`edgeflame inspect` itself, with its state folder, an RTSP camera, Mosquitto, a web service, pictures of rejected parts
and a visitor of its page; every part is rejected, which costs the most. Every half minute something is disturbed: the
broker restarts, the service answers with errors, the camera stalls for longer than the daemon waits for it, the camera
restarts. Memory, file descriptors, threads, processor time and disk are written down each second.

At the end: every number of the outbox arrived at each destination or waits in the outbox, every frame between two
parts was counted as dropped, and neither memory nor descriptors nor threads grew. Exit code 1 if not. Writes `soak.md`
and `soak.png`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from scipy import stats

from edgeflame.cpus import usable_cpus

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from world import Arrived, Disturbances, PageVisitor, Service, Subscriber, broker, camera

from tests.support.ports import free_port

WARM_UP_SHARE = 0.25
"""Share of the time, at the start, in which memory may grow: caches, the page's history, the runtime's arena."""
BLOCK_S = 15.0
"""Neighbouring seconds are not independent; averages over blocks of this length are taken to be."""
MAX_SLOPE_MIB_PER_H = 6.0
"""More than this, with 95% confidence, is a leak."""
MAX_REJECTS = 200
HISTORY = 500


@dataclass
class Samples:
    """One row a second."""

    at_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    children_mib: list[float] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    disk_mib: list[float] = field(default_factory=list)

    def take(self, pid: int, at_s: float, folders: list[Path]) -> None:
        """Add a row: the state of a process, its children and its folders."""
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        self.at_s.append(at_s)
        self.rss_mib.append(int(status["VmRSS"].split()[0]) / 1024)
        self.threads.append(int(status["Threads"]))
        self.fds.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self.cpu_s.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        self.children_mib.append(sum(_rss_mib(child) for child in _children(pid)))
        self.disk_mib.append(sum(_size(folder) for folder in folders) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=int, default=10, help="frames a second")
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--every", type=float, default=30.0, help="seconds from one disturbance to the next")
    parser.add_argument("--model", type=Path, help="a package; without it one is fitted to generated boards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text, is_well = _soak(Path(name), options)
    (options.out / "soak.md").write_text(text)
    print(text)
    sys.exit(0 if is_well else 1)


def _soak(folder: Path, options: argparse.Namespace) -> tuple[str, bool]:
    model = options.model or _fitted(folder)
    width, height = (int(side) for side in options.size.split("x"))
    ports = [free_port() for _ in range(3)]
    cam, brk = camera(ports[0], options.rate, width, height), broker(ports[1], folder / "broker")
    service = Service()
    subscriber = Subscriber(ports[1], "edgeflame/v1/soak/line/soak/result")
    (folder / "line.toml").write_text(_config(ports[1], ports[2], service.port))
    state, rejects, summary = folder / "state", folder / "rejects", folder / "summary.json"
    time.sleep(2.0)
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "edgeflame", "inspect", "--model", str(model), "--json",
             "--source", f"rtsp://127.0.0.1:{ports[0]}/live", "--config", str(folder / "line.toml"),
             "--state", str(state), "--images", str(rejects), "--summary", str(summary)],
            stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
    samples, visitor = Samples(), PageVisitor(ports[2])
    disturbances = Disturbances(cam, brk, service, every_s=options.every)
    start = time.monotonic()
    try:
        while (at_s := time.monotonic() - start) < 60 * options.minutes:
            if daemon.poll() is not None:
                raise RuntimeError(
                    f"the daemon ended with {daemon.returncode}:\n{(folder / 'log').read_text()[-3000:]}"
                )
            samples.take(daemon.pid, at_s, [state, rejects])
            time.sleep(max(0.0, start + len(samples.at_s) - time.monotonic()))
        visitor.close()
        disturbances.close()
        # The last disturbance is over; waiting results may be delivered before the end, but need not be.
        time.sleep(3.0)
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(20)
        _wait_for_arrivals(subscriber.arrived, service.arrived)
    finally:
        daemon.kill()
        daemon.wait()
        disturbances.close()
        subscriber.close()
        service.close()
        cam.end()
        brk.end()
    shutil.copy(folder / "log", options.out / "soak.log")
    _plot(samples, [(at - start, what) for at, what in disturbances.log], options.out / "soak.png")
    checks = [
        Check("exit code of the daemon after SIGTERM", str(code), code == 0),
        *_delivery(state / "outbox.sqlite", {"mqtt": subscriber.arrived, "webhook": service.arrived}),
        *_counted(msgspec.json.decode(summary.read_bytes()), state / "outbox.sqlite"),
        *_growth(samples),
        Check("disturbances", f"{len(disturbances.log)}", bool(disturbances.log)),
        Check("page, pictures and metrics asked for", f"{visitor.num_asked} times", visitor.num_asked > 0),
    ]
    return _report(checks, samples, options), all(check.is_well for check in checks)


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    found: str
    is_well: bool


def _delivery(outbox: Path, arrived: dict[str, Arrived]) -> list[Check]:
    """Check that each number ever given either arrived or waits."""
    with sqlite3.connect(outbox) as database:
        newest = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'results'").fetchone()[0]
        kept = {number for (number,) in database.execute("SELECT number FROM results")}
        acknowledged = dict(database.execute("SELECT name, acknowledged FROM destinations"))
        bodies = [msgspec.json.decode(body) for (body,) in database.execute("SELECT body FROM results")]
    rejected = sum(body["verdict"] == "fail" for body in bodies)
    checks = [
        Check("results in all", str(newest), newest > 0),
        # The rest are outages, one each.
        Check("rejected, of the last", f"{rejected} of {len(bodies)}", rejected >= 0.95 * len(bodies) > 0),
    ]
    for name, receiver in arrived.items():
        waiting = {number for number in kept if number > acknowledged[name]}
        missing = set(range(1, newest + 1)) - receiver.numbers - waiting
        found = f"{len(receiver.numbers)} arrived, {len(waiting)} wait, {len(missing)} lost, "
        found += f"{receiver.num_repeated} repeated, {receiver.num_unmarked} of them unmarked"
        checks.append(Check(f"{name}: arrived or waiting", found, not missing and not receiver.num_unmarked))
    return checks


def _counted(summary: dict[str, object], outbox: Path) -> list[Check]:
    """Check that captured frames without a result were counted as dropped."""
    with sqlite3.connect(outbox) as database:
        body = database.execute("SELECT body FROM results ORDER BY number DESC LIMIT 1").fetchone()[0]
    last = msgspec.json.decode(body)["sequence"]
    parts, dropped = summary["parts"], summary["dropped"]
    assert isinstance(parts, int)
    assert isinstance(dropped, dict)
    missing, counted = last + 1 - parts, sum(dropped.values())
    # Those that were dropped after the last part have no number that shows them.
    return [
        Check("frames without a result, and counted as dropped", f"{missing}, {counted} ({dropped})",
              missing <= counted <= missing + 8)
    ]  # fmt: skip


def _growth(samples: Samples) -> list[Check]:
    checks = []
    begin = WARM_UP_SHARE * samples.at_s[-1]
    for what, values, limit in (
        ("memory of the daemon, MiB", samples.rss_mib, MAX_SLOPE_MIB_PER_H),
        ("file descriptors", samples.fds, 1.0),
        ("threads", samples.threads, 1.0),
    ):
        slope, half = _slope(samples.at_s, values, begin)
        late = [value for at, value in zip(samples.at_s, values, strict=True) if at >= begin]
        found = f"{min(late):.0f} to {max(late):.0f}; {slope:+.2f} ± {half:.2f} an hour"
        checks.append(Check(what, found, slope - half <= limit))
    return checks


def _slope(at_s: list[float], values: list[float] | list[int], begin: float) -> tuple[float, float]:
    """The slope per hour, and half of its 95% confidence interval, from averages over blocks."""
    blocks: dict[int, list[tuple[float, float]]] = {}
    for at, value in zip(at_s, values, strict=True):
        if at >= begin:
            blocks.setdefault(int(at // BLOCK_S), []).append((at / 3600, float(value)))
    # The first and last may be of a few seconds.
    means = np.array([np.mean(block, axis=0) for block in list(blocks.values())[1:-1]])
    line = stats.linregress(means[:, 0], means[:, 1])
    # For values that never change scipy gives NaN.
    return float(line.slope), float(np.nan_to_num(stats.t.ppf(0.975, len(means) - 2) * line.stderr))


def _wait_for_arrivals(*receivers: Arrived) -> None:
    """Wait until nothing has arrived for two seconds."""
    before = -1
    while (now := sum(len(receiver.numbers) for receiver in receivers)) != before:
        before = now
        time.sleep(2.0)


def _report(checks: list[Check], samples: Samples, options: argparse.Namespace) -> str:
    cpu = (samples.cpu_s[-1] - samples.cpu_s[0]) / (samples.at_s[-1] - samples.at_s[0])
    conditions = (
        f"{options.minutes:g} minutes, an RTSP camera of {options.size} pixels and {options.rate} frames a second, "
        f"every part rejected, a disturbance every {options.every:g} s; {platform.machine()} with {usable_cpus()} "
        f"cores, load average {os.getloadavg()[0]:.1f} at the end. Slopes are from the averages of {BLOCK_S:g} s after "
        f"the first {WARM_UP_SHARE:.0%} of the time, with their 95% confidence intervals."
    )
    disk = f"{samples.disk_mib[-1]:.1f} at the end, at most {max(samples.disk_mib):.1f}"
    lines = [
        conditions,
        "",
        "| | found | |",
        "| --- | --- | --- |",
        *(f"| {check.what} | {check.found} | {'well' if check.is_well else '**NOT WELL**'} |" for check in checks),
        f"| processor | {cpu:.2f} of a core | |",
        f"| memory of the camera's process, MiB | at most {max(samples.children_mib):.0f} | |",
        f"| state and pictures on the disk, MiB | {disk} | |",
    ]
    return "\n".join(lines) + "\n"


def _plot(samples: Samples, disturbed: list[tuple[float, str]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    minutes = np.array(samples.at_s) / 60
    figure, axes = plt.subplots(4, 1, figsize=(10, 9), sharex=True, layout="constrained")
    axes[0].plot(minutes, samples.rss_mib, label="daemon")
    axes[0].plot(minutes, samples.children_mib, label="camera's process")
    axes[0].set(ylabel="memory, MiB")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="lower right")
    axes[1].plot(minutes, samples.fds, label="descriptors")
    axes[1].plot(minutes, samples.threads, label="threads")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(frameon=False, loc="lower right")
    axes[2].plot(minutes[1:], np.diff(samples.cpu_s) / np.diff(samples.at_s), linewidth=0.7)
    axes[2].set(ylabel="processor, cores")
    axes[3].plot(minutes, samples.disk_mib)
    axes[3].set(ylabel="disk, MiB", xlabel="minutes")
    axes[3].set_ylim(bottom=0)
    colours = dict(zip(sorted({what for _, what in disturbed}), ("C3", "C4", "C5", "C6"), strict=False))
    for at_s, what in disturbed:
        for axis in axes:
            axis.axvline(at_s / 60, color=colours[what], linewidth=0.6, alpha=0.6)
    for what, colour in colours.items():
        axes[2].plot([], [], color=colour, label=what.replace("_", " "))
    axes[2].legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _config(broker_port: int, page_port: int, service_port: int) -> str:
    return f"""
[verdict]
threshold = 0.001
[image_quality]
min_colour = 0
frame_size = "any"
[images]
max_count = {MAX_REJECTS}
[outbox]
history = {HISTORY}
[retry]
max_delay_s = 3
[mqtt]
broker = "mqtt://127.0.0.1:{broker_port}"
fleet = "soak"
line = "soak"
[webhook]
url = "http://127.0.0.1:{service_port}/parts"
[web]
listen = "127.0.0.1:{page_port}"
"""


def _fitted(folder: Path) -> Path:
    data, model = folder / "data", folder / "boards.edgeflame"
    for command in (["demo-data", "--out", str(data)], ["fit", "--data", str(data), "--out", str(model)]):
        subprocess.run([sys.executable, "-m", "edgeflame", *command], check=True, stdout=subprocess.DEVNULL)
    return model


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            direct = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        found += direct
        for child in direct:
            found += _children(child) if Path(f"/proc/{child}").exists() else []
    return found


def _rss_mib(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


if __name__ == "__main__":
    main()
