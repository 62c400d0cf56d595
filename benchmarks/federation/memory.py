"""Peak memory of a real aggregator process, and time per round, against the number of sites; a table in Markdown.

The sites are a light process (:mod:`load`) that speaks the real protocol through a real broker, each site over its own
connection. What a round takes includes the download of its base model by every site (none in the first),
all uploads, their checks and the merge. The peak is the aggregator's largest resident set (VmHWM).
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import brokers
import load

from edgeflame.cpus import usable_cpus
from edgeflame.mqtt.url import parse_broker_url

FLEET = "load"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--broker", choices=brokers.BROKERS, default=brokers.BROKERS[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--rule", nargs="+", default=["fedavg", "median"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=460.0, help="for each run, seconds")
    options = parser.parse_args()
    for rule in options.rule:
        for num_sites in options.sites:
            row = measure(options.broker, rule, num_sites, options.megabytes, options.rounds, options.timeout)
            print(row, flush=True)
            if options.out:
                with options.out.open("a") as stream:
                    stream.write(row + "\n")
    print(f"{platform.machine()}, {usable_cpus()} cores, load average {os.getloadavg()[0]:.1f} at the end")


def measure(broker: str, rule: str, num_sites: int, megabytes: int, rounds: int, timeout_s: float) -> str:
    """A row of the table."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        brokers.running(broker, Path(name)) as (url, _),
    ):
        folder = Path(name)
        initial, updates = load.write_models(folder, num_bytes=megabytes * 1_000_000, num_sites=num_sites)
        config = folder / "fleet.toml"
        config.write_text(
            f"rounds = {rounds}\nmin_available_sites = {num_sites}\nquorum = 1.0\n"
            f'strategy = "{rule}"\ndeadline_s = {timeout_s}\n'
        )
        command = [sys.executable, "-m", "edgeflame", "aggregate", "--broker", url, "--fleet", FLEET]
        with (folder / "aggregator.log").open("wb") as log:
            aggregator = subprocess.Popen(
                [*command, "--state", str(folder / "state"), "--config", str(config)], stdout=log, stderr=log
            )
            watch = Watch(aggregator.pid)
            try:
                times = load.run_sites(parse_broker_url(url), FLEET, initial, updates, timeout_s=timeout_s)
                code = aggregator.wait(60)
            except RuntimeError as exc:
                raise RuntimeError(f"{exc}\n{(folder / 'aggregator.log').read_text()[-3000:]}") from exc
            finally:
                aggregator.kill()
                peak_bytes = watch.stop()
        if code != 0:
            raise RuntimeError((folder / "aggregator.log").read_text())
    marks = [*(times[f"train {number}"] for number in range(1, rounds + 1)), times["finish"]]
    seconds = ", ".join(f"{later - earlier:.1f}" for earlier, later in itertools.pairwise(marks))
    return f"| {rule} | {num_sites} | {broker} | {peak_bytes / 1e6:.1f} | {seconds} |"


class Watch:
    """Follows a process's largest resident set."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak, bytes."""
        self._ended.set()
        self._thread.join()
        return self._peak_bytes

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("VmHWM:"):
                    self._peak_bytes = 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
