"""The sites' images on disk: dealt, and photographed by each site's camera.

::

    OUT/data/common/test, ground_truth          the test part all models share
    OUT/data/sites/<site>/train/good            a site's images; also test and ground_truth where
                                                these are not the common ones: own cameras, or not all textures
    OUT/data/*/groups.csv                       which photographs show the same part
    OUT/data/layout.json                        who has what; written last

These are ordinary data sets: ``edgeflame train --data OUT/data/sites/<site>`` learns from what a simulated site does.
With one camera for all, a folder's photographs are links to where they lie. With cameras of their own, photographs
are taken anew: of generated boards by the camera, of a folder's photographs as if the camera had looked at them. Then
the common test part is dealt over all cameras, so that none of its photographs is of a camera nobody trained on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import msgspec

from aggregator.simulation.config import SimulationConfig
from aggregator.simulation.partition import deal
from aggregator.simulation.sources import Part, Source, open_source
from edgeflame.boards.camera import Camera
from edgeflame.boards.seeds import generator
from edgeflame.console import Progress
from edgeflame.dataset import GOOD, GROUPS_FILES
from edgeflame.errors import StorageError
from edgeflame.images import ImageU8, write_image
from edgeflame.statedir import storage_errors, write_durably

LAYOUT = "layout.json"


class SitePlace(msgspec.Struct, frozen=True, kw_only=True):
    """What a site has."""

    site: str
    data: str
    """Its data set, below the simulation's folder."""
    test: str
    """The data set whose test part its own model is measured on."""
    num_images: int
    groups: tuple[str, ...]
    categories: dict[str, int]
    """Parts of each texture; of a folder, all of one category."""
    camera: dict[str, float] | None
    """None: the common one."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The sites in the order of their names."""

    common: str
    sites: tuple[SitePlace, ...]


def lay_out(config: SimulationConfig, out_dir: Path, report: Progress) -> Layout:
    """Deal the data and write the sites' folders, if that was not done already.

    Raises:
        ConfigError: too few parts for the sites.
        DataError: the folder is no data set, or lacks a test part, or a photograph cannot be read.
        StorageError: the disk fails, or the layout is damaged.
    """
    target, staging = out_dir / "data", out_dir / ".data.unfinished"
    if not target.exists():
        source = open_source(config)
        with storage_errors(staging, "prepare the sites' data"):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        layout = _write(config, source, staging, report)
        write_durably(staging / LAYOUT, msgspec.json.format(msgspec.json.encode(layout), indent=1))
        with storage_errors(target, "prepare the sites' data"):
            staging.rename(target)
    path = target / LAYOUT
    try:
        with storage_errors(path, "read"):
            return msgspec.json.decode(path.read_bytes(), type=Layout)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        msg = f"{path}: damaged ({exc}); simulate into another folder"
        raise StorageError(msg) from exc


def _write(config: SimulationConfig, source: Source, root: Path, report: Progress) -> Layout:
    hands = deal(
        {name: part.category for name, part in source.train.items()},
        config.site_names,
        config.partition,
        generator(config.seed, "partition"),
    )
    own = config.cameras == "own"
    cameras = {site: Camera.for_site(site, config.seed) if own else None for site in config.site_names}
    names = sorted(source.test)
    photographers = [cameras[config.site_names[i % config.sites]] for i in range(len(names))]
    order = generator(config.seed, "photographers").permutation(len(names))
    common = _Folder(root / "common", with_groups=source.groups_known)
    common.write((source.test[name], photographers[index]) for name, index in zip(names, order, strict=True))
    everywhere = {part.category for part in source.train.values()}
    places = []
    for done, (site, hand) in enumerate(hands.items(), start=1):
        parts = [source.train[name] for name in hand]
        folder = _Folder(root / "sites" / site, with_groups=source.groups_known)
        num_images = folder.write((part, cameras[site]) for part in parts)
        categories = _count(part.category for part in parts)
        apart = config.evaluation.sites and (own or set(categories) != everywhere)
        if apart:
            own_test = [part for name in names if (part := source.test[name]).category in categories]
            folder.write((part, cameras[site]) for part in own_test)
        places.append(
            SitePlace(
                site=site,
                data=f"data/sites/{site}",
                test=f"data/sites/{site}" if apart else "data/common",
                num_images=num_images,
                groups=tuple(hand),
                categories=categories,
                camera=None if (camera := cameras[site]) is None else asdict(camera),
            )
        )
        report(done, config.sites, "photographing" if own else "dealing")
    return Layout(common="data/common", sites=tuple(places))


class _Folder:
    """A data set in the MVTec layout that is being written."""

    def __init__(self, root: Path, *, with_groups: bool) -> None:
        self._root = root
        self._with_groups = with_groups
        self._rows = ["path,group"]

    def write(self, parts: Iterable[tuple[Part, Camera | None]]) -> int:
        """Add parts as a camera sees them; how many photographs those were."""
        before = len(self._rows)
        for part, camera in parts:
            for photo in part.photographs(camera):
                name = f"{part.split}/{part.label}/{photo.stem}{photo.suffix}"
                self._put(name, photo.image)
                if part.label != GOOD and photo.mask is not None:
                    self._put(f"ground_truth/{part.label}/{photo.stem}_mask.png", photo.mask)
                self._rows.append(f"{name},{part.group}")
        if self._with_groups:
            with storage_errors(self._root, "write"):
                (self._root / GROUPS_FILES[0]).write_text("\n".join(self._rows) + "\n", encoding="utf-8")
        return len(self._rows) - before

    def _put(self, name: str, content: Path | ImageU8) -> None:
        path = self._root / name
        with storage_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                path.symlink_to(content.resolve())
                return
        write_image(path, content)


def _count(categories: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for category in sorted(categories):
        counts[category] = counts.get(category, 0) + 1
    return counts
