"""How good the verdicts are, not only the ranking: what the default threshold rejects and catches.

    python benchmarks/accuracy/decisions.py [--toy DIR] [--tile DIR] [--rows NAME ...] [--label before|after]

A model is fitted by the command `edgeflame fit` with its defaults, from a folder that holds only the photographs drawn,
and the package's own graph scores the test images on ONNX Runtime, as `edgeflame evaluate` does. Rows:

- `toy`: a folder in the MVTec layout with 40 good photographs to learn from (`--toy`). A seed draws 36 of the 40; the
  test part is the folder's.
- `solar-mono`, `solar-poly`: the cells of the PyPI package `elpv-dataset` that certainly have no defect (probability 0)
  or one (1). A seed draws 40 good ones to learn from, and 150 other good and 150 defective ones to test on.
- `boards-...`: generated boards of two laminates, other ones with each seed: 40 good parts to learn from, 60 good and
  60 defective ones to test on, one photograph of each.
- `tile-12`, `tile-30`, `tile-60`, `tile-122`: the magnetic tiles (`--tile`). A seed draws so many of the 122 tiles and
  learns from all their good photographs; the test part is the folder's.

Figures are written to `decisions-LABEL.json` one by one, and `decisions.md` is made of all such files: a run that was
ended goes on with the same command. To compare two states of the code, run this very file with each of them first in
PYTHONPATH, and a `--label` of its own.

`--peer padim|patchcore` measures anomalib's instead (`pip install 'edgeflame[train,bench]'`), with our backbone and
weights at our input size. Its threshold is its own for a set of good images alone: the highest score of held-out good
ones, here every fifth photograph of those drawn (a larger share of them learns than by its default, a half).
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

import edgeflame
import export.network  # noqa: F401
import trainer.fit  # noqa: F401 (both are imported here so that the time of the first fit holds no import)
from boards.dataset import DatasetSpec, write_dataset
from cli.fit import command as fit_command
from edge.runtimes.load import open_runtime
from edgeflame.dataset import Dataset, ImageRecord, open_dataset
from edgeflame.methods import Learning
from edgeflame.package import read_package
from fitting.evaluation import score_records, score_test_images
from fitting.imageset import ImageSet

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent.parent / "shared" / "data"
REJECTED = 0.05
"""Share of the test's good images that the threshold set with their help rejects."""

NUM_SEEDS = 3
HELD_OUT_STEP = 5
"""Every so manieth good photograph sets a peer's threshold."""

Figures = dict[str, Any]
Draw = Callable[[int, Path], Dataset]
"""From a seed and an empty folder, to the photographs: to learn from, and to test on."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what `--rows` takes.
        title: as the table shows it.
        draw: the photographs of a seed.
        num_draws: how many seeds draw different ones.
        missing: why it cannot be run here, or None.
    """

    name: str
    title: str
    draw: Draw
    num_draws: int = 1 << 30
    missing: str | None = None


def rows(toy: Path, tile: Path) -> list[Row]:
    """All rows, those that take longest last."""
    no_toy = None if toy.is_dir() else f"no folder {toy} (--toy)"
    no_tile = None if tile.is_dir() else f"no folder {tile} (--tile)"
    no_cells = None if importlib.util.find_spec("elpv_dataset") else "the package elpv-dataset is not installed"
    return [
        Row("toy", "toy figures, 36", lambda seed, _: _some_images(toy, 36, seed), missing=no_toy),
        *(
            Row(f"boards-{name}", f"boards, {name}, 40", lambda seed, out, name=name: _boards(out, name, seed))
            for name in ("warm_wood", "warm_white_grid")
        ),
        *(
            Row(
                f"solar-{kind}",
                f"solar cells, {kind}, 40",
                lambda seed, _, kind=kind: _cells(kind, seed),
                missing=no_cells,
            )
            for kind in ("mono", "poly")
        ),
        *(
            Row(
                f"tile-{count}",
                f"magnetic tile, {count} tiles",
                lambda seed, _, count=count: _some_parts(tile, count, seed),
                num_draws=1 if count == 122 else 1 << 30,
                missing=no_tile,
            )
            for count in (12, 30, 60, 122)
        ),
    ]


def _some_images(root: Path, count: int, seed: int) -> Dataset:
    dataset = open_dataset(root)
    return replace(dataset, train=_drawn(dataset.train, count, seed))


def _some_parts(root: Path, count: int, seed: int) -> Dataset:
    dataset = open_dataset(root)
    parts = set(_drawn(sorted({record.group for record in dataset.train}), count, seed))
    return replace(dataset, train=tuple(record for record in dataset.train if record.group in parts))


def _boards(out: Path, texture: str, seed: int) -> Dataset:
    spec = DatasetSpec(
        texture=texture,
        num_train_parts=40,
        num_test_good_parts=60,
        num_test_defective_parts=60,
        num_photos=1,
        seed=seed,
    )
    write_dataset(out, spec)
    return open_dataset(out)


def _cells(kind: str, seed: int) -> Dataset:
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec is not None
    root = Path(str(spec.origin)).parent / "data"
    cells = [line.split() for line in (root / "labels.csv").read_text().splitlines()]

    def of(probability: float, count: int, name: str) -> tuple[ImageRecord, ...]:
        files = [root / file for file, found, cell in cells if cell == kind and float(found) == probability]
        return tuple(
            ImageRecord(path=file, name=f"test/{name}/{file.name}", label=name, group=file.name)
            for file in _drawn(files, count, seed)
        )

    good, defective = of(0.0, 40 + 150, "good"), of(1.0, 150, "defective")
    train = tuple(replace(record, name=record.name.replace("test", "train", 1)) for record in good[:40])
    return Dataset(root=root, train=train, test=(*good[40:], *defective), groups_known=False)


def _drawn(items: Sequence[Any], count: int, seed: int) -> tuple[Any, ...]:
    """So many of the items, in the order drawn."""
    return tuple(items[index] for index in np.random.default_rng(seed).permutation(len(items))[:count])


def lay_out(dataset: Dataset, folder: Path, *, with_groups: bool) -> None:
    """A folder with links to the photographs, and with the groups file if the data set has one."""
    for record in (*dataset.train, *dataset.test):
        link = folder / record.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(record.path.resolve())
    if with_groups and dataset.groups_known:
        with (folder / "groups.csv").open("w", newline="") as stream:
            named = [(record.name, record.group) for record in (*dataset.train, *dataset.test)]
            csv.writer(stream).writerows([("path", "group"), *named])


def measure(folder: Path, *fit_options: str) -> Figures:
    """Fit and judge, as a user does."""
    package_file = folder.with_suffix(".edgeflame")
    begun, cpu = time.monotonic(), time.process_time()
    fit_command.main(["--data", str(folder), "--out", str(package_file), *fit_options], standalone_mode=False)
    fit_s, fit_cpu_s = time.monotonic() - begun, time.process_time() - cpu
    package = read_package(package_file)
    manifest = package.manifest
    runtime = open_runtime(package.model_onnx)
    scored = score_test_images(
        lambda images: runtime.score(images)[:2], open_dataset(folder), manifest.learning.input, on_unreadable="refuse"
    )
    statistics = manifest.provenance["statistics"]
    return {
        **verdicts(scored.scores_of("good"), scored.defective_scores, manifest.threshold.value),
        "fit_s": round(fit_s, 1),
        "fit_cpu_s": round(fit_cpu_s, 1),
        "chosen": {
            name: value
            for name, value in statistics.items()
            if isinstance(value, (int, float, str)) and "score" not in name
        },
    }


def measure_peer(name: str, folder: Path) -> Figures:
    """Fit anomalib's model, and judge by its own rule."""
    from paper.peers import fit_peer

    dataset, learning = open_dataset(folder), Learning()
    held_out = dataset.train[::HELD_OUT_STEP]
    kept = [record for record in dataset.train if record not in held_out]
    begun, cpu = time.monotonic(), time.process_time()
    score = fit_peer(name, ImageSet(kept, learning.input), learning)
    _, held_out_scores, _ = score_records(score, held_out, learning.input, on_unreadable="refuse")
    fit_s, fit_cpu_s = time.monotonic() - begun, time.process_time() - cpu
    scored = score_test_images(score, dataset, learning.input, on_unreadable="refuse")
    return {
        **verdicts(scored.scores_of("good"), scored.defective_scores, float(held_out_scores.max())),
        "fit_s": round(fit_s, 1),
        "fit_cpu_s": round(fit_cpu_s, 1),
    }


def verdicts(good: Sequence[float], defective: Sequence[float], threshold: float) -> Figures:
    """The figures of the table from the test images' scores and the default threshold."""
    good_scores, defective_scores = np.asarray(good, np.float64), np.asarray(defective, np.float64)
    ideal = float(np.quantile(good_scores, 1 - REJECTED))
    caught, caught_ideal = (int((defective_scores > value).sum()) for value in (threshold, ideal))
    labels = np.repeat([0, 1], [len(good_scores), len(defective_scores)])
    return {
        "num_good": len(good_scores),
        "num_defective": len(defective_scores),
        "image_AUROC": float(roc_auc_score(labels, np.concatenate([good_scores, defective_scores]))),
        "threshold": threshold,
        "good_rejected": int((good_scores > threshold).sum()),
        "defective_caught": caught,
        "threshold_at_5_percent": ideal,
        "defective_caught_at_5_percent": caught_ideal,
        "ratio": caught / caught_ideal if caught_ideal else None,
    }


def run(row: Row, seed: int, *, groups: str, judge: Callable[[Path], Figures]) -> Figures:
    with tempfile.TemporaryDirectory() as scratch:
        folder, source = Path(scratch, "data"), Path(scratch, "source")
        dataset = row.draw(seed, source)
        lay_out(dataset, folder, with_groups=groups == "known")
        learnt_from = {
            "num_images": len(dataset.train),
            "num_parts": len({record.group for record in dataset.train}),
        }
        return {**learnt_from, **judge(folder)}


HEADING = (
    "| data, learnt from | code | image AUROC | good rejected | caught | at 5% rejected | ratio | `fit`, s (CPU s) |",
    "|---|---|---|---|---|---|---|---|",
)


def table(figures: Sequence[Figures], order: Sequence[Row]) -> Iterator[str]:
    """Markdown lines: for each kind of groups a table, with a line for each row and code."""
    labels = list(dict.fromkeys(one["code"] for one in figures))
    for groups in ("known", "unknown"):
        of_groups = [one for one in figures if one["groups"] == groups]
        if not of_groups:
            continue
        yield from (
            "",
            f"Parts {'as the data set names them' if groups == 'known' else 'not named: no groups file'}:",
            "",
        )
        yield from HEADING
        for row in order:
            for label in labels:
                found = [one for one in of_groups if (one["row"], one["code"]) == (row.name, label)]
                if found:
                    yield _line(row.title, label, found)
        for label in labels:
            done = [one["row"] for one in of_groups if one["code"] == label]
            if missing := list(_not_run(order, done)):
                yield from ("", f"Not run of {label}: {', '.join(missing) if done else 'any'}.")


def _not_run(order: Sequence[Row], run_rows: Sequence[str]) -> Iterator[str]:
    for row in order:
        count, wanted = run_rows.count(row.name), min(NUM_SEEDS, row.num_draws)
        if count < wanted:
            yield f"{row.name} ({count} of {wanted} seeds)" if count else row.name


def _line(title: str, label: str, found: Sequence[Figures]) -> str:
    def spread(values: Sequence[float], form: str) -> str:
        mean, low, high = (format(value, form) for value in (float(np.mean(values)), min(values), max(values)))
        return mean if low == high else f"{mean} ({low} to {high})"

    ratios = [one["ratio"] for one in found if one["ratio"] is not None]
    cells = (
        title,
        f"{label}",
        spread([one["image_AUROC"] for one in found], ".3f"),
        spread([one["good_rejected"] / one["num_good"] for one in found], ".1%"),
        spread([one["defective_caught"] / one["num_defective"] for one in found], ".1%"),
        spread([one["defective_caught_at_5_percent"] / one["num_defective"] for one in found], ".1%"),
        spread(ratios, ".2f") if ratios else "–",
        f"{np.mean([one['fit_s'] for one in found]):.0f} ({np.mean([one['fit_cpu_s'] for one in found]):.0f})",
    )
    return f"| {' | '.join(cells)} |"


def page(figures: Sequence[Figures], order: Sequence[Row]) -> str:
    """The Markdown file."""
    codes = dict.fromkeys(f"{one['code']}: {one['version']}" for one in figures)
    machines = dict.fromkeys(one["machine"] for one in figures)
    loads = [one["load"] for one in figures]
    return f"""# Verdicts

`python benchmarks/accuracy/decisions.py`, whose text says what the rows are. Mean over the seeds (least to greatest).
"Caught" is the share of the defective images that the default threshold rejects; "at 5% rejected", that a threshold
rejects which is set, knowing the test images, so that 5% of the good ones are rejected; "ratio", of the two.
{"; ".join(codes)}. {" and ".join(machines)}, with other programs beside it (load average
{min(loads):.1f} to {max(loads):.1f}): times are rough.
{chr(10).join(table(figures, order))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", type=Path, default=SHARED / "toy-figures", metavar="DIR")
    parser.add_argument("--tile", type=Path, default=SHARED / "magnetic-tile", metavar="DIR")
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="which rows, or the first word of their names; all by default"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=range(NUM_SEEDS))
    parser.add_argument(
        "--groups", choices=("known", "unknown"), default="known", help="unknown: without a groups file"
    )
    parser.add_argument("--label", default="now", help="what the table calls what is measured")
    parser.add_argument("--peer", choices=("padim", "patchcore"), help="measure anomalib's model")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of what is written")
    options = parser.parse_args()
    judge = partial(measure_peer, options.peer) if options.peer else measure
    order = rows(options.toy, options.tile)
    wanted = [
        row for row in order if not options.rows or any(f"{row.name}-".startswith(f"{name}-") for name in options.rows)
    ]
    if not wanted:
        sys.exit(f"no such row; there are {', '.join(row.name for row in order)}")
    file = options.out / f"decisions-{options.label}.json"
    figures: list[Figures] = json.loads(file.read_text()) if file.is_file() else []
    version = _version(options.peer)
    for row in wanted:
        if row.missing is not None:
            print(f"{row.name}: left out, {row.missing}", flush=True)
            continue
        for seed in options.seeds[: row.num_draws]:
            key = {"row": row.name, "seed": seed, "groups": options.groups, "code": options.label}
            if any(key.items() <= one.items() for one in figures):
                continue
            place = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "load": round(os.getloadavg()[0], 1)}
            figures.append({**key, **version, **place, **run(row, seed, groups=options.groups, judge=judge)})
            print(figures[-1], flush=True)
            file.write_text(json.dumps(figures, indent=1) + "\n")
            write_page(options.out, order)


def write_page(out: Path, order: Sequence[Row]) -> None:
    """Write the table of all that was measured, the oldest code first."""
    figures = [one for file in out.glob("decisions-*.json") for one in json.loads(file.read_text())]
    (out / "decisions.md").write_text(page(sorted(figures, key=lambda one: one["commit_time"]), order))


def _version(peer: str | None) -> Figures:
    """Of the code that is measured, which need not be this file's."""
    command = ["git", "-C", str(Path(edgeflame.__file__).parent), "log", "-1", "--format=%h %ct"]
    name, when = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if peer:
        return {"version": f"anomalib {importlib.metadata.version('anomalib')}", "commit_time": sys.maxsize}
    return {"version": f"commit {name}", "commit_time": int(when)}


if __name__ == "__main__":
    main()
