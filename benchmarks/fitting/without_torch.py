"""`edgeflame fit` with the backbone by PyTorch and with one given as ONNX, in turns on the same photographs.

Each fit is a process of its own, from its start to the package. Writes `without_torch.md`: the medians, and of every
pair the ratio, which other programs beside them touch little. Needs the Magnetic Tile photographs, or `--data`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from edgeflame.cpus import usable_cpus

REPOSITORY = Path(__file__).resolve().parents[2]
TILES = REPOSITORY.parent / "shared" / "data" / "magnetic-tile"


@dataclass(frozen=True)
class Run:
    """One process: seconds by the clock, seconds of processor time, and peak memory in MB."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def edgeflame(*arguments: object) -> Run:
    """Run a command; exits if it fails."""
    command = [sys.executable, "-m", "edgeflame", *map(str, arguments)]
    begin = time.perf_counter()
    quiet = os.open(os.devnull, os.O_WRONLY)
    pid = os.posix_spawn(
        sys.executable,
        command,
        {**os.environ, "PYTHONPATH": str(REPOSITORY)},
        file_actions=[(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)],
    )
    _, status, usage = os.wait4(pid, 0)
    os.close(quiet)
    if status:
        sys.exit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return Run(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--data", type=Path, default=TILES)
    parser.add_argument("--images", type=int, nargs="+", default=[30, 755])
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    good = sorted((options.data / "train" / "good").iterdir())
    load = os.getloadavg()[0]
    machine = f"{platform.machine()} with {usable_cpus()} cores, load average {load:.1f} at the start"
    busy = " The machine was busy: only the ratios count, and all is to be remade at rest." if load > 1 else ""
    lines = [
        f"{machine}, {options.pairs} pairs. Ratio: given backbone over PyTorch, the median of the pairs.{busy}",
        "",
        "| photographs | | seconds | ratio | processor seconds | ratio | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        out, backbone = Path(folder) / "m.edgeflame", Path(folder) / "backbone.edgeflame"
        edgeflame("export", "--backbone", backbone)
        for count in options.images:
            photographs = Path(folder) / str(count)
            photographs.mkdir()
            for image in good[:: max(1, len(good) // count)][:count]:
                (photographs / image.name).symlink_to(image.resolve())
            fit = ("fit", "--data", photographs, "--out", out)
            pairs = [(edgeflame(*fit), edgeflame(*fit, "--backbone-from", backbone)) for _ in range(options.pairs)]
            lines += _rows(count, pairs)
            print("\n".join(lines[-2:]), flush=True)
    (options.out / "without_torch.md").write_text("\n".join(lines) + "\n")


def _rows(count: int, pairs: list[tuple[Run, Run]]) -> list[str]:
    wall = statistics.median(given.wall_s / torch.wall_s for torch, given in pairs)
    cpu = statistics.median(given.cpu_s / torch.cpu_s for torch, given in pairs)
    rows = []
    for index, (name, ratios) in enumerate((("PyTorch", ("", "")), ("given", (f"{wall:.2f}", f"{cpu:.2f}")))):
        runs = [pair[index] for pair in pairs]
        rows.append(
            f"| {count} | {name} | {statistics.median(one.wall_s for one in runs):.1f} | {ratios[0]} | "
            f"{statistics.median(one.cpu_s for one in runs):.1f} | {ratios[1]} | "
            f"{max(one.peak_mb for one in runs):.0f} |"
        )
    return rows


if __name__ == "__main__":
    main()
