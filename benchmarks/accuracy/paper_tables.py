"""The FLAME paper's tables and figures, run again: one command each.

    python benchmarks/accuracy/paper_tables.py table1|table2|...|fig14|pooled|all [--scale small|paper]

Runs are done once and kept in --runs: killed and started again, the command goes on; tables share runs. Without
--minutes it ends when all is done. A table is written to --out (NAME-SCALE.md, NAME-SCALE.png) when all its runs are
over. `--scale paper` wants a GPU and the backbones' weights (the timm hub, or files).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from paper.experiments import SCALES, Recipes, experiments
from paper.report import plot, table
from paper.runs import carry_out, outcome

HERE = Path(__file__).resolve().parent
TILES = Path(os.environ.get("EDGEFLAME_MAGNETIC_TILE", HERE.parent.parent.parent / "shared" / "data" / "magnetic-tile"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--tiles", type=Path, default=TILES, help="the magnetic tiles, in the MVTec layout")
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    arguments = parser.parse_args()
    recipes = Recipes(SCALES[arguments.scale], arguments.tiles if arguments.tiles.is_dir() else None)
    known = experiments(recipes)
    names = list(known) if arguments.names == ["all"] else arguments.names
    if missing := [name for name in names if name not in known]:
        sys.exit(f"{', '.join(missing)}: not among {', '.join(known)} (table3 and pooled need --tiles)")
    begun = time.monotonic()
    root = arguments.runs / arguments.scale
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        experiment = known[name]
        runs = list({run.key: run for run in experiment.runs()}.values())
        left = [run for run in runs if outcome(run, root) is None]
        for index, run in enumerate(left):
            if arguments.minutes is not None and time.monotonic() - begun > 60 * arguments.minutes:
                sys.exit(f"{name}: {len(left) - index} of {len(runs)} runs left; the same command goes on")
            start = time.monotonic()
            carry_out(run, root)
            print(f"{name}: {index + 1}/{len(left)} {run.key} {time.monotonic() - start:.1f} s", flush=True)
        command = f"python benchmarks/accuracy/paper_tables.py {name} --scale {arguments.scale}"
        target = arguments.out / f"{name}-{arguments.scale}.md"
        text = table(experiment, root, command)
        if (picture := plot(experiment, f"{name}-{arguments.scale}", root, arguments.out)) is not None:
            text += f"\n![{experiment.title}]({picture.name})\n"
        target.write_text(text)
        print(f"{name}: {target}", flush=True)


if __name__ == "__main__":
    main()
