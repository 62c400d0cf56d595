"""Latency of a line's verdicts while a new product is learnt on the same machine, against its own before and after.

    python benchmarks/latency/while_learning.py [--model m.edgeflame] [--parts 60] [--every 0.25] [--rounds 3]

`edgeflame inspect` judges generated boards, one every so many seconds, with a deadline for each. Parts of it are
collected over its page, and learnt as often as asked for: `edgeflame fit` in a process of its own, as an operator would
have it. Latency is from capture to verdict, from the lines that the daemon prints; it is *learning* from the order to
the model, *before* and *after* last as long. Parts that are late or missing are counted. Writes `while_learning.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeflame.cpus import usable_cpus

TOKEN = "of-a-daemon-that-lives-for-minutes"
ADDRESS = "127.0.0.1:8791"
CONFIG = """
[cameras.line]
source = "boards:warm_wood?site=1&defect_rate=0.05&every={every}"
[products]
board = "{model}"
[web]
listen = "{address}"
stale_after_s = 600
[parts]
deadline_ms = {deadline_ms}
"""


class Line:
    """The daemon, and what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path) -> None:
        self.process, self._out = process, out

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def ask(self, order: dict[str, Any] | None = None) -> Any:
        body = None if order is None else json.dumps({"product": "new", **order}).encode()
        request = urllib.request.Request(
            f"http://{ADDRESS}/api/teaching", data=body, headers={"X-EdgeFlame-Token": TOKEN}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def stands(self) -> dict[str, Any]:
        return self.ask({"action": "status"})


@contextlib.contextmanager
def line(folder: Path, model: Path, options: argparse.Namespace) -> Iterator[Line]:
    config = folder / "line.toml"
    config.write_text(CONFIG.format(model=model, address=ADDRESS, every=options.every, deadline_ms=options.deadline_ms))
    command = [sys.executable, "-m", "edgeflame", "inspect", "--config", config, "--state", folder / "state", "--json"]
    command += ["--device", "cpu"]
    out = folder / "out.jsonl"
    environment = {**os.environ, "EDGEFLAME_OPERATOR_TOKEN": TOKEN}
    with out.open("wb") as stream:
        process = subprocess.Popen([*map(str, command)], stdout=stream, env=environment)
    try:
        opened = Line(process, out)
        while len(opened.results()) < 5:
            if process.poll() is not None:
                sys.exit("the daemon ended")
            time.sleep(0.2)
        yield opened
    finally:
        process.terminate()
        process.wait(30)


def collect(opened: Line, parts: int) -> None:
    opened.ask({"action": "new"})
    opened.ask({"action": "collect"})
    while opened.stands()["num_parts"] < parts:
        time.sleep(0.5)
    opened.ask({"action": "stop"})


def learn(opened: Line) -> float:
    """Learn once; returns how long it took, seconds."""
    begun = time.monotonic()
    opened.ask({"action": "learn"})
    while (stood := opened.stands())["learning"] is not None:
        time.sleep(0.25)
    if stood["problem"]:
        sys.exit(stood["problem"])
    return time.monotonic() - begun


def quantiles(results: list[dict[str, Any]]) -> dict[str, float]:
    latencies = [result["latency_ms"] for result in results]
    p50, p99, largest = np.percentile(latencies, [50, 99, 100])
    sequences = [result["sequence"] for result in results]
    return {
        "parts": len(results),
        "p50": float(p50),
        "p99": float(p99),
        "max": float(largest),
        "late": sum(result["late"] for result in results),
        "missing": sequences[-1] - sequences[0] + 1 - len(sequences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a package; without it one is fitted to generated boards")
    parser.add_argument("--parts", type=int, default=60)
    parser.add_argument("--every", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deadline-ms", type=float, default=1000.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model
        if model is None:
            model = folder / "m.edgeflame"
            tool = [sys.executable, "-m", "edgeflame"]
            subprocess.run([*tool, "demo-data", "--out", folder / "data", "--texture", "warm_wood"], check=True)
            subprocess.run([*tool, "fit", "--data", folder / "data", "--out", model], check=True)
        rows: list[tuple[str, dict[str, float]]] = []
        seconds: list[float] = []
        with line(folder, model, options) as opened:
            collect(opened, options.parts)
            for number in range(options.rounds):
                marks = [len(opened.results())]
                before_s = seconds[-1] if seconds else 30.0
                time.sleep(before_s)
                marks.append(len(opened.results()))
                seconds.append(learn(opened))
                marks.append(len(opened.results()))
                time.sleep(before_s)
                marks.append(len(opened.results()))
                results = opened.results()
                for index, what in enumerate(("before", "learning", "after")):
                    rows.append((f"{number + 1}, {what}", quantiles(results[marks[index] : marks[index + 1]])))
                    print(rows[-1], flush=True)
    write(options, rows, seconds, load)


def write(
    options: argparse.Namespace, rows: list[tuple[str, dict[str, float]]], seconds: list[float], load: float
) -> None:
    ratios = []
    for first in range(0, len(rows), 3):
        before, during, after = (row for _, row in rows[first : first + 3])
        ratios.append(during["p99"] / ((before["p99"] + after["p99"]) / 2))
    table = "\n".join(
        f"| {name} | {row['parts']:.0f} | {row['p50']:.1f} | {row['p99']:.1f} | {row['max']:.1f} | {row['late']:.0f} | "
        f"{row['missing']:.0f} |"
        for name, row in rows
    )
    command = f"python benchmarks/latency/while_learning.py --parts {options.parts} --every {options.every:g}"
    told = [
        "# Verdicts while a product is learnt",
        "",
        f"`{command} --rounds {options.rounds}`, {usable_cpus()} cores of {platform.machine()};",
        f"a part every {options.every:g} s with a deadline of {options.deadline_ms:g} ms; learning took",
        f"{', '.join(f'{one:.0f} s' for one in seconds)}. Load average at the start: {load:.1f}.",
        f"The p99 while learning was {', '.join(f'{ratio:.2f}' for ratio in ratios)} times that before and after it.",
        "",
        "| round | parts | p50 ms | p99 ms | max ms | late | missing |",
        "|---|---|---|---|---|---|---|",
        table,
        "",
    ]
    options.out.write_text("\n".join(told))


if __name__ == "__main__":
    main()
