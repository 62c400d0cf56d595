"""Throughput of the blob transfer as a ratio to raw paho publishing of the same bytes; a table in Markdown.

Both are measured in one run, turn by turn, so that other work on the machine slows both alike. Raw paho reads nothing
from disk, writes nothing, hashes nothing and resumes nothing; its time ends when the last subscriber has the last
byte. A blob's time includes its offer, its hash, the fsync and the receipt (but not the manifest, made when the file
was written); a download's ends when the last site has it whole on disk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import brokers
import numpy as np
import peers

from edgeflame.cpus import usable_cpus

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["peers"])
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Row:
    broker: str
    megabytes: int
    what: str
    raw_mb_per_s: float
    blob_mb_per_s: float
    ratio: float
    """Median of the alternations' ratios."""
    cpu: tuple[float, float, float, float]
    """Processor time of the sender and of a receiver, raw and blob, milliseconds per MB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 20, 100])
    parser.add_argument("--alternations", type=int, default=7)
    parser.add_argument("--broker", choices=brokers.BROKERS, nargs="+", default=brokers.BROKERS)
    parser.add_argument("--sites", type=int, default=3, help="of the download to several sites")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for kind in options.broker:
            with brokers.running(kind, Path(name)) as (url, _):
                for megabytes in options.megabytes:
                    path = Path(name) / "blob"
                    path.write_bytes(np.random.default_rng(0).bytes(megabytes * 1_000_000))
                    rows += compare(kind, url, path, megabytes, options.alternations, options.sites)
        os.chdir("/")
    text = markdown(rows, options.alternations)
    print(text)
    if options.out:
        options.out.write_text(text)


def compare(kind: str, url: str, path: Path, megabytes: int, alternations: int, num_sites: int) -> list[Row]:
    """Raw and blob in turn, upwards, down to one site and down to several."""
    rows = []
    for what, sites in (("up", 1), ("down to 1", 1), (f"down to {num_sites}", num_sites)):
        raw, blob = [], []
        for _ in range(alternations):
            raw.append(measure_raw(url, path, sites))
            blob.append(measure_upload(url, path) if what == "up" else measure_download(url, path, sites))
        row = Row(
            broker=kind,
            megabytes=megabytes,
            what=what,
            raw_mb_per_s=megabytes / statistics.median(one.seconds for one in raw),
            blob_mb_per_s=megabytes / statistics.median(one.seconds for one in blob),
            ratio=statistics.median(r.seconds / b.seconds for r, b in zip(raw, blob, strict=True)),
            cpu=tuple(
                1000 / megabytes * statistics.median(times)
                for times in (
                    [one.sender_cpu_s for one in raw],
                    [one.receiver_cpu_s for one in raw],
                    [one.sender_cpu_s for one in blob],
                    [one.receiver_cpu_s for one in blob],
                )
            ),
        )
        print(row, flush=True)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Measured:
    """One transfer: wall time, and the processor time of the sender and of one receiver."""

    seconds: float
    sender_cpu_s: float
    receiver_cpu_s: float


def measure_raw(url: str, path: Path, num_sites: int) -> Measured:
    """From the first byte published until the broker has acknowledged the last and every subscriber has it."""
    size = path.stat().st_size
    subscribers = [End(peers.raw_subscriber, url, size) for _ in range(num_sites)]
    for end in subscribers:
        end.ready()
    publisher = End(peers.raw_publisher, url, path)
    publisher.ready()
    for end in [*subscribers, publisher]:
        end.go()
    sent = publisher.result()
    received = [end.result() for end in subscribers]
    for end in [*subscribers, publisher]:
        end.stop()
    return Measured(max(sent.ended, *(r.ended for r in received)) - sent.began, sent.cpu_s, received[0].cpu_s)


def measure_upload(url: str, path: Path) -> Measured:
    """From the offer until the site has its receipt."""
    aggregator, site = End(peers.intake, url, 0), End(peers.uploader, url, path)
    for end in (aggregator, site):
        end.ready()
    for end in (aggregator, site):
        end.go()
    sent, received = site.result(), aggregator.result()
    for end in (aggregator, site):
        end.stop()
    return Measured(sent.ended - sent.began, sent.cpu_s, received.cpu_s)


def measure_download(url: str, path: Path, num_sites: int) -> Measured:
    """From the first site's request until the last has the whole."""
    aggregator = End(peers.distributor, url, path)
    manifest = aggregator.ready()
    sites = [End(peers.downloader, url, manifest, f"site{i}") for i in range(num_sites)]
    for end in sites:
        end.ready()
    aggregator.go()
    for end in sites:
        end.go()
    received = [end.result() for end in sites]
    for end in [*sites, aggregator]:
        end.stop()
    sent = aggregator.result()
    return Measured(max(r.ended for r in received) - min(r.began for r in received), sent.cpu_s, received[0].cpu_s)


class End:
    """One of :mod:`peers` as a process."""

    def __init__(self, peer: peers.Peer, *arguments: object) -> None:
        self._control, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=peer, args=(theirs, *arguments), daemon=True)
        self._process.start()

    def ready(self) -> object:
        """Wait until the end is ready; returns what it sends then."""
        return self._hear()

    def go(self) -> None:
        self._control.send("go")

    def result(self) -> peers.Times:
        """Wait until the end is done; returns its times."""
        return self._hear()

    def stop(self) -> None:
        self._control.send("stop")
        self._process.join(TIMEOUT_S)

    def _hear(self) -> object:
        if not self._control.poll(TIMEOUT_S):
            raise RuntimeError(f"{self._process} says nothing for {TIMEOUT_S:g} s")
        return self._control.recv()


def markdown(rows: list[Row], alternations: int) -> str:
    """The table, with what it was measured on."""
    conditions = (
        f"Medians of {alternations} alternations; one broker and all ends on one {platform.machine()} machine with "
        f"{usable_cpus()} cores, load average {os.getloadavg()[0]:.1f} at the end; {brokers.mosquitto_version()}; "
        f"paho-mqtt {importlib.metadata.version('paho-mqtt')}."
    )
    lines = [
        conditions,
        "",
        "| broker | MB | | raw paho MB/s | blob transfer MB/s | ratio | CPU ms/MB raw: sender, receiver | blob |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.broker} | {r.megabytes} | {r.what} | {r.raw_mb_per_s:.0f} | {r.blob_mb_per_s:.0f} | {r.ratio:.2f} | "
        f"{r.cpu[0]:.1f}, {r.cpu[1]:.1f} | {r.cpu[2]:.1f}, {r.cpu[3]:.1f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
