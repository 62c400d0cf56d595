"""Does each change of a line raise the alarm it should, and no other? Generated boards and magnetic tiles.

    python benchmarks/drift/pictures.py [--parts 3000] [--write]

A model is fitted on good boards (and on good magnetic tiles, where the data is there); then the daemon's own code
watches a stream of other good parts: first unchanged, then, for each row, changed in one way. `--write` puts the table
into pictures.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from boards.dataset import BoardStream, DatasetSpec, write_dataset
from edge.config.inspection import DriftConfig
from edge.drift.monitor import DriftMonitor, Ranks
from edge.runtimes.load import open_runtime
from edge.status import DriftCondition
from edgeflame.dataset import open_dataset
from edgeflame.drift_reference import (
    CAMERA_STREAMS,
    PART_STREAMS,
    STREAMS,
    AlignmentTemplate,
    image_streams,
    part_streams,
)
from edgeflame.images import ImageU8, read_image
from edgeflame.methods import Learning
from edgeflame.package import read_package
from export.network import scoring_graph
from fitting.packaging import save_package
from trainer.fit import fit

CONFIG = DriftConfig()
TEXTURE = "warm_wood"
BEFORE, DIFFERENT = 500, 400
"""Unchanged parts before each change; different parts after it, which are then repeated."""
NOW = dt.datetime.now(dt.timezone.utc)

Change = Callable[[ImageU8], ImageU8]


def gain(factor: float) -> Change:
    return lambda image: np.clip(image.astype(np.float32) * factor, 0, 255).astype(np.uint8)


def blur(sigma: float) -> Change:
    return lambda image: np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.uint8)


def noise(sigma: float) -> Change:
    rng = np.random.default_rng(5)
    return lambda image: np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def warmer(levels: float) -> Change:
    return lambda image: np.clip(image + np.array([-levels, 0, levels]), 0, 255).astype(np.uint8)


def moved(share: float) -> Change:
    def change(image: ImageU8) -> ImageU8:
        matrix = np.array([[1, 0, share * image.shape[1]], [0, 1, 0]], dtype=np.float32)
        size = (image.shape[1], image.shape[0])
        return np.asarray(cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REFLECT), dtype=np.uint8)

    return change


CHANGES: dict[str, Change] = {
    "nothing": lambda image: image,
    "light 5% weaker": gain(0.95),
    "light 15% weaker": gain(0.85),
    "light 10% stronger": gain(1.1),
    "lamp warmer by 6 grey levels": warmer(6),
    "lens slightly out of focus (blur 0.8 px)": blur(0.8),
    "lens out of focus (blur 1.5 px)": blur(1.5),
    "noise of 4 grey levels more": noise(4),
    "camera moved by 3% of the picture": moved(0.03),
}
OTHER_PARTS = {
    "one board in ten has a defect": BoardStream(texture=TEXTURE, seed=2, defect_rate=0.1),
    "one board in three has a defect": BoardStream(texture=TEXTURE, seed=2, defect_rate=0.33),
    "boards of another wood": BoardStream(texture="moon_shadow_white_oak", seed=2, defect_rate=0.0),
}


class Line:
    """A fitted model with its package, as a line would run it."""

    def __init__(self, data: Path, folder: Path, learning: Learning) -> None:
        fitted = fit(open_dataset(data), learning)
        path = folder / f"{data.name}.edgeflame"
        save_package(
            path,
            embedder=fitted.model.embedder,
            site_statistics=fitted.site,
            learning=learning,
            weights=fitted.model.weights,
            provenance=fitted.provenance(),
            make_graph=partial(scoring_graph, fitted.model.network, preprocessing=learning.input),
            product=data.name,
            site=None,
            references=fitted.references,
        )
        self._package = read_package(path)
        self._runtime = open_runtime(self._package.model_onnx, device="cpu")
        self._preprocessing = self._package.manifest.learning.input
        self._template = AlignmentTemplate([one.image(self._preprocessing) for one in self._package.references])

    def values(self, image: ImageU8) -> dict[str, float]:
        """All streams of one picture."""
        seen = self._preprocessing.apply(image)
        scores, maps, _ = self._runtime.score(seen[None])
        return {**part_streams(float(scores[0]), maps[0]), **image_streams(seen, self._template)}

    def monitor(self) -> DriftMonitor:
        return DriftMonitor(CONFIG, self._package.condition)


def mean_ranks(line: Line, values: list[dict[str, float]]) -> dict[str, float]:
    """Mean rank of good parts that the model was not fitted on, by stream; 0.5 would be perfect."""
    assert line.monitor().status().streams
    condition = line._package.condition  # noqa: SLF001 - a benchmark's own class
    assert condition is not None
    ranks = {name: Ranks(name, condition.streams[name]) for name in STREAMS}
    return {name: float(np.mean([ranks[name].rank(one[name]) for one in values])) for name in STREAMS}


def alarms(line: Line, before: list[dict[str, float]], after: Iterator[dict[str, float]], most: int) -> dict[str, int]:
    """Number of parts from the change to each stream's alarm; 0 or less for an alarm before the change."""
    monitor, found = line.monitor(), dict[str, int]()
    for index, one in enumerate([*before, *itertools.islice(after, most)], start=1 - len(before)):
        for change in monitor.observe(one, NOW):
            if change.after is DriftCondition.ALARM:
                found[f"{change.stream} {change.direction}"] = index
    return found


def row(name: str, found: dict[str, int]) -> str:
    def group(streams: tuple[str, ...]) -> str:
        own = {stream: parts for stream, parts in found.items() if stream.split()[0] in streams}
        return ", ".join(f"{stream} after {parts}" for stream, parts in sorted(own.items(), key=lambda one: one[1]))

    return f"| {name} | {group(CAMERA_STREAMS) or '–'} | {group(PART_STREAMS) or '–'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=2000, help="after each change")
    parser.add_argument("--images", type=int, default=300, help="that the boards' model is fitted on")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    stream = BoardStream(texture=TEXTURE, seed=1, defect_rate=0.0)
    boards = [one.image_bgr for one in itertools.islice(stream, BEFORE + DIFFERENT)]
    ranks: dict[str, dict[str, float]] = {}
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = DatasetSpec(
            texture=TEXTURE,
            num_train_parts=options.images,
            num_test_good_parts=1,
            num_test_defective_parts=1,
            num_photos=1,
        )
        write_dataset(folder / "boards", spec)
        line = Line(folder / "boards", folder, Learning(method="none"))
        values = [line.values(image) for image in boards]
        ranks[f"generated boards, {options.images} fitted on, {len(values)} others"] = mean_ranks(line, values)
        before = values[:BEFORE]
        for name, change in CHANGES.items():
            changed = [line.values(change(image)) for image in boards[BEFORE:]]
            rows.append(row(name, alarms(line, before, itertools.cycle(changed), options.parts)))
            print(rows[-1], file=sys.stderr, flush=True)
        for name, other in OTHER_PARTS.items():
            images = [one.image_bgr for one in itertools.islice(other, DIFFERENT)]
            changed = [line.values(image) for image in images]
            rows.append(row(name, alarms(line, before, itertools.cycle(changed), options.parts)))
            print(rows[-1], file=sys.stderr, flush=True)
        tiles = Path(os.environ.get("EDGEFLAME_MAGNETIC_TILE", Path(__file__).parents[3] / "shared/data/magnetic-tile"))
        if tiles.is_dir():
            line = Line(tiles, folder, Learning(method="none"))
            good = [record for record in open_dataset(tiles).test if record.is_good]
            values = [line.values(read_image(record.path)) for record in good]
            ranks[f"magnetic tiles, {len(open_dataset(tiles).train)} fitted on, {len(values)} others"] = mean_ranks(
                line, values
            )
    conditions = (
        f"{BEFORE} unchanged good boards, then {options.parts} changed ones ({DIFFERENT} different boards in turn). "
        f"`python benchmarks/drift/pictures.py --parts {options.parts} --images {options.images} --write`"
    )
    titles = " | ".join(name.replace("_", " ") for name in STREAMS)
    out = [conditions, "", "| change | camera or light: alarm | parts: alarm |", "|---|---|---|", *rows, ""]
    out += ["## Mean rank of unseen good parts in the package's reference", ""]
    out += [f"| parts | {titles} |", "|---" * (len(STREAMS) + 1) + "|"]
    out += [
        f"| {name} | " + " | ".join(f"{found[stream]:.2f}" for stream in STREAMS) + " |"
        for name, found in ranks.items()
    ]
    text = "\n".join(out) + "\n"
    print(text)
    if options.write:
        Path(__file__).with_name("pictures.md").write_text(text)


if __name__ == "__main__":
    main()
