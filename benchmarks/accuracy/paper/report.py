"""Tables in Markdown, with intervals over seeds and comparisons with baselines in words; and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy import stats

from paper.experiments import SEEDS, Cell, Experiment
from paper.runs import Outcome, outcome

mpl.use("Agg")

IMAGE, PIXEL = "image_AUROC", "pixel_AUROC"


def table(experiment: Experiment, root: Path, command: str) -> str:
    """The experiment's table; every run must be over."""
    rows, columns = _distinct([c.row for c in experiment.cells]), _distinct([c.column for c in experiment.cells])
    cells = {(cell.row, cell.column): cell for cell in experiment.cells}
    lines = [f"## {experiment.title}", "", f"`{command}`", ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        texts = []
        for column in columns:
            cell = cells.get((row, column))
            texts.append("" if cell is None else _text(cell, root))
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    if len(rows) > 1 and all(cell.label or experiment.baselines for cell in experiment.cells):
        averages = [
            _average([cells[row, column] for row in rows if (row, column) in cells], root) for column in columns
        ]
        lines.append("| average | " + " | ".join(averages) + " |")
    if experiment.plot == "losses":
        lines += ["", "Training loss by round, mean over seeds:", ""]
        for cell in experiment.cells:
            curve = np.mean([_done(cell, seed, root).losses for seed in SEEDS], axis=0)
            lines.append(f"- {cell.row}, {cell.column}: " + ", ".join(f"{value:.3f}" for value in curve))
    lines += ["", *(f"{sentence}" for sentence in _in_words(experiment, columns, root)), *_spaced(experiment.notes)]
    return "\n".join(lines) + "\n"


def plot(experiment: Experiment, name: str, root: Path, folder: Path) -> Path | None:
    """The experiment's picture, if it has one."""
    if experiment.plot is None:
        return None
    from matplotlib import pyplot as plt

    if experiment.plot == "sweep":
        figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
        names = [cell.column for cell in experiment.cells]
        for metric, label in ((IMAGE, "image AUROC"), (PIXEL, "pixel AUROC")):
            values = [[100 * v for v in _values(cell, metric, root)] for cell in experiment.cells]
            means, widths = zip(*(_interval(one) for one in values), strict=True)
            axis.errorbar(range(len(names)), means, yerr=widths, marker="o", capsize=3, label=label)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set_ylabel("percent, mean and 95% over seeds")
        axis.legend()
        axis.set_title(experiment.title, fontsize=9)
    else:
        rows = _distinct([cell.row for cell in experiment.cells])
        figure, axes = plt.subplots(1, len(rows), figsize=(3 * len(rows), 3), sharey=True, layout="constrained")
        for axis, row in zip(np.atleast_1d(axes), rows, strict=True):
            for cell in experiment.cells:
                if cell.row == row:
                    curves = np.array([_done(cell, seed, root).losses for seed in SEEDS])
                    rounds = np.arange(1, curves.shape[1] + 1)
                    (line,) = axis.plot(rounds, curves.mean(axis=0), marker="o", label=cell.column)
                    axis.fill_between(
                        rounds, curves.min(axis=0), curves.max(axis=0), alpha=0.15, color=line.get_color()
                    )
            axis.set_title(row, fontsize=9)
            axis.set_xlabel("round")
            axis.set_xticks(rounds if len(rounds) < 12 else rounds[:: len(rounds) // 6])
        np.atleast_1d(axes)[0].set_ylabel("training loss, mean and range over seeds")
        np.atleast_1d(axes)[-1].legend()
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def _text(cell: Cell, root: Path) -> str:
    image, pixel = (_percent([100 * v for v in _values(cell, metric, root)]) for metric in (IMAGE, PIXEL))
    return f"{image} / {pixel}" + (f"<br>paper {cell.paper}" if cell.paper and cell.paper != "-" else "")


def _average(cells: Sequence[Cell], root: Path) -> str:
    """The average over rows, taken seed by seed."""
    parts = []
    for metric in (IMAGE, PIXEL):
        by_seed = np.mean([_values(cell, metric, root) for cell in cells], axis=0)
        parts.append(_percent([100 * float(v) for v in by_seed]))
    papers = [cell.paper.split("/") for cell in cells if cell.paper and cell.paper != "-"]
    text = " / ".join(parts)
    if papers and len(papers) == len(cells):
        text += "<br>paper " + "/".join(f"{np.mean([float(p[i]) for p in papers]):.2f}" for i in range(2))
    return text


def _in_words(experiment: Experiment, columns: Sequence[str], root: Path) -> list[str]:
    """For each method: is it better than a baseline, over all rows and seeds?"""
    sentences = []
    for baseline in experiment.baselines:
        parts = {True: [], None: [], False: []}  # type: dict[bool | None, list[str]]
        for column in columns:
            if column == baseline or column in experiment.baselines[: experiment.baselines.index(baseline)]:
                continue
            differences = _differences(experiment, column, baseline, root)
            if differences is None:
                continue
            mean, width = _interval([100 * one for one in differences])
            verdict = True if mean - width > 0 else False if mean + width < 0 else None
            parts[verdict].append(f"`{column}` ({mean:+.2f} ± {width:.2f})")
        phrases = (
            (True, "better than"),
            (None, "not told from (so it does not beat)"),
            (False, "worse than"),
        )
        for verdict, phrase in phrases:
            if parts[verdict]:
                sentences.append(f"- Image AUROC {phrase} `{baseline}`: {', '.join(parts[verdict])}.")
    if sentences:
        sentences.insert(0, "Differences in percentage points, paired by row and seed, mean and 95% t-interval:\n")
    return sentences


def _differences(experiment: Experiment, column: str, baseline: str, root: Path) -> list[float] | None:
    cells = {(cell.row, cell.column): cell for cell in experiment.cells}
    pairs = [
        (cells[row, column], cells[row, baseline])
        for row in _distinct([cell.row for cell in experiment.cells])
        if (row, column) in cells and (row, baseline) in cells
    ]
    if not pairs:
        return None
    values = [(_values(ours, IMAGE, root), _values(theirs, IMAGE, root)) for ours, theirs in pairs]
    # Rows of one seed share images or model; the seeds are what is independent.
    return [float(np.mean([a[index] - b[index] for a, b in values])) for index in range(len(SEEDS))]


def _values(cell: Cell, metric: str, root: Path) -> list[float]:
    values = []
    for seed in SEEDS:
        done = _done(cell, seed, root)
        values.append(done.figures[metric] if cell.label is None else done.classes[cell.label][metric])
    return values


def _done(cell: Cell, seed: int, root: Path) -> Outcome:
    done = outcome(cell.run(seed), root)
    assert done is not None
    return done


def _percent(values: Sequence[float]) -> str:
    mean, width = _interval(values)
    return f"{mean:.1f} ± {width:.1f}"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% t-interval."""
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1)) * spread


def _distinct(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _spaced(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in ("", note)]
