"""What a site gains by joining a fleet without training: its own statistics, the fleet's, its own with a prior.

    python benchmarks/federation/gain.py [--data NAME ...] [--parts 6 ...] [--sites 20 ...]
                                         [--cameras same own] [--seeds 3]

Parts are drawn by the seed and dealt to the sites, so many to each. With `--cameras own` each site has a camera of its
own, as in `edgeflame simulate`: gain, vignetting, blur, gamma and noise of photographs; of generated boards the lamp as
well. Every site's moments go through the files that sites send (`statistics_form = "moments"`), are pooled as the
aggregator pools them, and `--measured` of the sites fit statistics and threshold as after a run:

- `alone`: `statistics = "site"`, its own photographs;
- `pooled`: `statistics = "federated"`, the photographs of all sites;
- `prior`: `statistics = "prior"`, its own, leaning on the others';
- `package`: no fleet, but `fit --prior` with one package of all the others' photographs.

They are measured on the data's test part as the site's camera sees it. Each figure goes to `gain.jsonl` at once, and
`gain.md` is made of all: a run that was ended goes on with the same command. Data: `tile` (`--tile`), `solar-mono` and
`solar-poly` (the PyPI package `elpv-dataset`), `warm_wood` and `warm_white_grid` (generated).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from sklearn.metrics import roc_auc_score

from aggregator.pooling import pool_statistics
from aggregator.simulation.config import BoardsData, FolderData, SimulationConfig
from aggregator.simulation.parts import PartPool, SimulatedPart, load_parts
from boards.camera import Camera
from edgeflame.images import ImageU8, read_image
from edgeflame.methods import Learning
from edgeflame.statistics.codec import PackageStatistics
from edgeflame.statistics.gaussian import LowRankGaussian
from edgeflame.statistics.moments import MomentAccumulator
from edgeflame.statistics.shared import read_moments, write_site_statistics
from edgeflame.tensors import F32
from fitting.crossfit import PooledStatistics, cross_fit, image_scores, score_maps
from fitting.embeddings import Embedder, Embeddings
from fitting.prior import FleetPrior
from fitting.threshold import measure_spread, robust_spread, set_threshold
from trainer.embedding import TorchEmbedder
from trainer.model import build_model

HERE = Path(__file__).resolve().parent
TILE = HERE.parents[2] / "shared" / "data" / "magnetic-tile"
METHODS = ("alone", "pooled", "prior", "package")
BOARDS = ("warm_wood", "warm_white_grid")
MAX_TEST_PARTS = 150
MODEL = hashlib.sha256(b"the pre-trained backbone").hexdigest()

Figures = dict[str, Any]


class StoredEmbeddings:
    """Embeddings at hand, for what asks :class:`fitting.embeddings.Embeddings` for them."""

    def __init__(self, embedder: Embedder, images: Iterator[ImageU8], learning: Learning) -> None:
        self.grid, self.num_channels = embedder.grid, embedder.num_channels
        self._values: list[F32] = []
        batch: list[ImageU8] = []
        for image in images:
            batch.append(learning.input.apply(image))
            if len(batch) == 8:
                self._values.extend(embedder.embed(np.stack(batch)))
                batch = []
        if batch:
            self._values.extend(embedder.embed(np.stack(batch)))

    def __len__(self) -> int:
        return len(self._values)

    @classmethod
    def joined(cls, several: Sequence[StoredEmbeddings]) -> StoredEmbeddings:
        joined = copy.copy(several[0])
        joined._values = [value for one in several for value in one._values]  # noqa: SLF001 - of this class
        return joined

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], F32]]:
        for start in range(0, len(indices), 64):
            chosen = list(indices[start : start + 64])
            yield chosen, np.stack([self._values[index] for index in chosen])


def parts_of(name: str, tile: Path, num_parts: int, seed: int, scratch: Path) -> PartPool:
    """The parts of a data set, so many to train on."""
    data: FolderData | BoardsData
    if name in BOARDS:
        data = BoardsData(
            textures=(name,),
            train_parts=num_parts,
            test_good_parts=60,
            test_defective_parts=60,
            photos=1,
            image_size=256,
            seed=seed,
        )
    else:
        path = tile if name == "tile" else solar_folder(name.removeprefix("solar-"), scratch)
        most = None if name == "tile" else MAX_TEST_PARTS
        data = FolderData(path=str(path), max_train_groups=num_parts, max_test_groups=most)
    return load_parts(SimulationConfig(data=data, sites=1, seed=seed))


def solar_folder(kind: str, scratch: Path) -> Path:
    """The cells that certainly have no defect, or one, as links in the MVTec layout; some of the good to test on."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None:
        raise SystemExit("the package elpv-dataset is not installed")
    root = Path(str(spec.origin)).parent / "data"
    cells = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    good = sorted(file for file, found, cell in cells if cell == kind and float(found) == 0)
    bad = sorted(file for file, found, cell in cells if cell == kind and float(found) == 1)
    order = np.random.default_rng(0).permutation(len(good))
    chosen = {"test/good": [good[index] for index in order[:MAX_TEST_PARTS]], "test/defective": bad}
    chosen["train/good"] = [good[index] for index in order[MAX_TEST_PARTS:]]
    for folder, files in chosen.items():
        (scratch / kind / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            link = scratch / kind / folder / Path(file).name
            if not link.is_symlink():
                link.symlink_to(root / file)
    return scratch / kind


def photographs(parts: Sequence[SimulatedPart], camera: Camera | None) -> Iterator[tuple[str, ImageU8]]:
    """Part and picture, one after another."""
    for part in parts:
        for one in part.photographs(camera):
            yield part.group, read_image(one.image) if isinstance(one.image, Path) else one.image


def fleet_figures(
    name: str,
    tile: Path,
    methods: Sequence[str],
    *,
    num_parts: int,
    num_sites: int,
    cameras: str,
    seed: int,
    measured: int,
) -> Iterator[Figures]:
    """One fleet: for each of the measured sites and each method the figures."""
    learning = Learning()
    model, _ = build_model(learning)
    model.eval()
    embedder = TorchEmbedder(model.backbone)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pool = parts_of(name, tile, num_parts * num_sites, seed, scratch)
        names = sorted(pool.train)
        order = np.random.default_rng(seed).permutation(len(names))
        if len(names) < num_parts * num_sites:
            print(f"{name}: {len(names)} parts are too few for {num_sites} sites of {num_parts}", flush=True)
            return
        paths: dict[str, Path] = {}
        kept: dict[str, tuple[StoredEmbeddings, list[str], Camera | None]] = {}
        for number in range(num_sites):
            site = f"site-{number + 1:02}"
            camera = Camera.for_site(site, seed) if cameras == "own" else None
            own = [pool.train[names[index]] for index in order[number * num_parts : (number + 1) * num_parts]]
            pictures = list(photographs(own, camera))
            embeddings = StoredEmbeddings(embedder, (image for _, image in pictures), learning)
            accumulator = MomentAccumulator()
            for _, batch in embeddings.batches(range(len(embeddings))):
                accumulator.add(batch)
            paths[site] = scratch / site
            groups = [group for group, _ in pictures]
            alone = cross_fit(cast("Embeddings", embeddings), groups, learning)
            write_site_statistics(
                paths[site],
                accumulator.moments(),
                grid=embedder.grid,
                model=MODEL,
                form="moments",
                rank=0,
                spread=measure_spread(alone.held_out.scores, groups),
            )
            kept[site] = embeddings, groups, camera
        pool_statistics(paths, scratch / "pooled", rank=0)
        pool_statistics(paths, scratch / "prior", rank=0, as_prior=True)
        for site, (embeddings, groups, camera) in list(kept.items())[:measured]:
            fitted: dict[str, tuple[PackageStatistics, float, Figures]] = {}
            for method in methods:
                given: PooledStatistics | FleetPrior | None = None
                if method == "package":
                    given = package_prior([one for other, one in kept.items() if other != site], learning)
                elif method != "alone":
                    moments, header = read_moments(scratch / method)
                    own_images = header.sites[site]
                    given = (
                        PooledStatistics.of_fleet(moments, header, num_own=own_images)
                        if method == "pooled"
                        else FleetPrior.of_fleet(moments, header, num_own=own_images)
                    )
                begun = time.process_time()
                found = cross_fit(cast("Embeddings", embeddings), groups, learning, pooled=given)
                threshold = set_threshold(
                    found.held_out.scores, groups, learning.calibration, groups_known=True, others=found.spread
                )
                more = {"radius": found.radius, "fit_cpu_s": round(time.process_time() - begun, 1)}
                if found.prior is not None:
                    more["weights"] = [found.prior.chosen.weight, found.prior.chosen.mean_weight]
                fitted[method] = found.statistics, threshold.value, more
            scores: dict[str, dict[str, list[float]]] = {method: {} for method in methods}
            for part in pool.test.values():
                pictures = list(photographs([part], camera))
                tested = StoredEmbeddings(embedder, (image for _, image in pictures), learning)
                for _, batch in tested.batches(range(len(tested))):
                    for method, (statistics, _, _) in fitted.items():
                        raised = image_scores(score_maps(statistics, batch, learning.scoring))
                        scores[method].setdefault(part.label, []).extend(float(one) for one in raised)
            for method, (_, threshold_value, more) in fitted.items():
                yield {
                    "data": name,
                    "parts": num_parts,
                    "sites": num_sites,
                    "cameras": cameras,
                    "seed": seed,
                    "site": site,
                    "images": len(groups),
                    "method": method,
                    **verdicts(scores[method], threshold_value),
                    **more,
                }


def package_prior(sites: Sequence[tuple[StoredEmbeddings, list[str], Camera | None]], learning: Learning) -> FleetPrior:
    """What `fit --prior` takes from a package that was fitted to the photographs of these sites."""
    embeddings = StoredEmbeddings.joined([one for one, _, _ in sites])
    groups = [group for _, its, _ in sites for group in its]
    found = cross_fit(cast("Embeddings", embeddings), groups, learning)
    assert isinstance(found.statistics, LowRankGaussian)
    spread = robust_spread(found.held_out.scores, len(set(groups)))
    return replace(FleetPrior.of_statistics(found.statistics, {}), spread=spread)


def verdicts(scores: dict[str, list[float]], threshold: float) -> Figures:
    """Figures of the scores by kind, ``good`` among them."""
    good = np.array(scores["good"])
    kinds = {kind: np.array(values) for kind, values in scores.items() if kind != "good"}
    areas = {
        kind: roc_auc_score(np.repeat([0, 1], [len(good), len(bad)]), np.concatenate([good, bad]))
        for kind, bad in kinds.items()
    }
    bad = np.concatenate(list(kinds.values()))
    return {
        "image_AUROC": float(roc_auc_score(np.repeat([0, 1], [len(good), len(bad)]), np.concatenate([good, bad]))),
        "macro_image_AUROC": float(np.mean(list(areas.values()))),
        "caught": float((bad > threshold).mean()),
        "caught_at_5_percent": float((bad > np.quantile(good, 0.95)).mean()),
        "good_rejected": float((good > threshold).mean()),
    }


HEADING = (
    "| data | parts | sites | cameras | statistics | macro image AUROC | against alone | caught | good rejected |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def page(figures: Sequence[Figures]) -> str:
    """The table: means over seeds and measured sites, with the interval of the mean where there are several."""
    lines = []
    keys = ("data", "parts", "sites", "cameras")
    fleets = sorted({tuple(one[key] for key in keys) for one in figures}, key=str)
    for fleet in fleets:
        rows = [one for one in figures if tuple(one[key] for key in keys) == fleet]
        alone = {(one["seed"], one["site"]): one for one in rows if one["method"] == "alone"}
        for method in METHODS:
            own = [one for one in rows if one["method"] == method]
            if not own:
                continue
            gains = [
                one["macro_image_AUROC"] - alone[one["seed"], one["site"]]["macro_image_AUROC"]
                for one in own
                if (one["seed"], one["site"]) in alone
            ]
            gain = "" if method == "alone" else f"{interval(gains, '+.3f')}, least {min(gains):+.3f}"
            area = interval([one["macro_image_AUROC"] for one in own], ".3f")
            caught, rejected = (f"{np.mean([one[key] for one in own]):.1%}" for key in ("caught", "good_rejected"))
            cells = (*(str(one) for one in fleet), method, area, gain, caught, rejected)
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join((HEADING, *lines))
    return f"""# What joining brings

`python benchmarks/federation/gain.py`, whose text says what is compared. Nothing is trained. Means over
{len({one["seed"] for one in figures})} seeds and up to {len({one["site"] for one in figures})} sites of each fleet,
plus or minus 1.96 standard errors of these fleets and sites; "least" is the site that gained least. The test part
chose none of the settings, but for the weight of the prior's mean, which was added after a look at one row, and for how
far thresholds lean on others, which was chosen on mono solar cells. Tile with
own cameras: thresholds that do not lean on others yet.

{table}
"""


def interval(values: Sequence[float], form: str) -> str:
    mean = format(float(np.mean(values)), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["tile"], choices=("tile", "solar-mono", "solar-poly", *BOARDS))
    parser.add_argument("--parts", nargs="+", type=int, default=[6])
    parser.add_argument("--sites", nargs="+", type=int, default=[20])
    parser.add_argument("--cameras", nargs="+", default=["same", "own"], choices=("same", "own"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--measured", type=int, default=3, help="sites of each fleet that are measured")
    parser.add_argument("--tile", type=Path, default=Path(os.environ.get("EDGEFLAME_MAGNETIC_TILE", TILE)))
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    store = options.out / "gain.jsonl"
    figures: list[Figures] = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    fleets = [
        (name, parts, sites, cameras, seed)
        for seed in range(options.seeds)
        for name in options.data
        for parts in options.parts
        for sites in options.sites
        for cameras in options.cameras
    ]
    for name, parts, sites, cameras, seed in fleets:
        key = {"data": name, "parts": parts, "sites": sites, "cameras": cameras, "seed": seed}
        there = {one["method"] for one in figures if all(one[field] == value for field, value in key.items())}
        methods = [method for method in METHODS if method not in there]
        if not methods:
            continue
        if name == "tile" and not options.tile.is_dir():
            print(f"no folder {options.tile} (--tile)")
            continue
        print(f"{name}: {sites} sites of {parts} parts, {cameras} cameras, seed {seed}", flush=True)
        found = list(
            fleet_figures(
                name,
                options.tile,
                methods,
                num_parts=parts,
                num_sites=sites,
                cameras=cameras,
                seed=seed,
                measured=min(options.measured, sites),
            )
        )
        figures += found
        with store.open("a") as stream:
            stream.writelines(json.dumps(one) + "\n" for one in found)
        if figures:
            (options.out / "gain.md").write_text(page(figures))


if __name__ == "__main__":
    main()
