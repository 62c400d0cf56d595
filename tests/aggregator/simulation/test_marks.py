"""Simulated sites that mark defects: who marks what, that nothing marked is measured, and what the head brings."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.simulation.config import SimulationConfig
from aggregator.simulation.data import deal_marks, prepare_site_data
from aggregator.simulation.parts import SimulatedPart
from edgeflame.config import parse_config
from edgeflame.dataset import open_dataset
from edgeflame.errors import ConfigError
from edgeflame.images import write_image
from edgeflame.log import no_progress
from edgeflame.marks import MarkStore
from tests.support.part_images import part_image
from tests.support.paths import REPOSITORY
from tests.support.waiting import wait_for

SITES = {"east": ["oak"], "north": ["oak", "pine"], "west": ["pine"]}


def parts(*kinds: str, num: int = 8, categories: tuple[str, ...] = ("oak", "pine")) -> dict[str, SimulatedPart]:
    made = {}
    for kind, index, category in itertools.product(kinds, range(num), categories):
        name = f"{category}-{kind}-{index}"
        made[name] = SimulatedPart(
            group=name, category=category, split="test", label=kind, photographs=lambda camera: iter(())
        )
    return made


def dealt(test: dict[str, SimulatedPart], share: float = 0.5, seed: int = 0) -> dict[str, list[str]]:
    return deal_marks(test, SITES, share, np.random.default_rng(seed))


def test_each_kind_is_marked_at_one_site_and_a_share_of_it() -> None:
    test = parts("good", "crack", "dent", "hole", "stain")
    hands = dealt(test)
    kinds = {site: {test[name].label for name in names} for site, names in hands.items()}
    assert kinds == {"east": {"crack", "stain"}, "north": {"dent"}, "west": {"hole"}}
    # East has no pine, and marks none.
    assert {test[name].category for name in hands["east"]} == {"oak"}
    assert [len(names) for names in hands.values()] == [4 + 4, 8, 4]
    assert hands == dealt(test) != dealt(test, seed=1)
    assert [len(names) for names in dealt(test, share=0.1).values()] == [1 + 1, 2, 1]


def test_one_of_each_kind_is_left_to_be_tested_on() -> None:
    test = parts("good", "crack", "dent", num=1, categories=("oak",))
    assert not any(dealt(test, share=0.99).values())
    assert [len(one) for one in dealt(parts("crack", num=2, categories=("oak",)), share=0.99).values()] == [1, 0, 0]


def boards(
    more: str = "",
    *,
    cameras: str = "own",
    defective: int = 20,
    textures: tuple[str, ...] = ("warm_white_grid", "warm_wood"),
) -> SimulationConfig:
    mixed = "category_beta = 0.5" if len(textures) > 1 else "min_groups = 2"
    text = f"""
sites = 3
cameras = "{cameras}"
{more}
[data]
kind = "boards"
textures = {json.dumps(textures)}
train_parts = 8
test_good_parts = 2
test_defective_parts = {defective}
photos = 2
image_size = 64
[partition]
{mixed}
[fleet.learning]
method = "feedback"
"""
    return parse_config(text.encode(), SimulationConfig, "test")


@pytest.mark.parametrize("cameras", ["own", "common"])
def test_no_marked_part_is_measured_anywhere(tmp_path: Path, cameras: str) -> None:
    layout = prepare_site_data(boards(cameras=cameras), tmp_path, no_progress)
    tested = {record.group for record in open_dataset(tmp_path / layout.common).test}
    marked: dict[str, list[str]] = {}
    for place in layout.sites:
        assert (place.marks is None) == (not place.marked)
        own = {group for groups in place.marked.values() for group in groups}
        assert {group.rpartition("-test-")[0] for group in own} <= place.categories.keys()
        if place.marks is not None:
            told = MarkStore(tmp_path / place.marks).marks()
            assert {(mark.kind, mark.group, mark.was) for mark in told} == {
                (kind, group, "bad") for kind, groups in place.marked.items() for group in groups
            }
            assert len(told) == 2 * len(own), "both photographs of each"
        for kind in place.marked:
            marked.setdefault(kind, []).append(place.site)
        tested |= {record.group for record in open_dataset(tmp_path / place.test).test}
    assert len(marked) == 5
    assert all(len(sites) == 1 for sites in marked.values())
    every = {group for place in layout.sites for groups in place.marked.values() for group in groups}
    assert every
    assert not every & tested
    assert len(every) + len(tested) == 2 * (2 + 20)


def test_another_method_measures_all_parts(tmp_path: Path) -> None:
    config = parse_config(b"[data]\nkind = 'boards'\nimage_size = 64\nphotos = 1\n", SimulationConfig, "test")
    layout = prepare_site_data(config, tmp_path, no_progress)
    assert all(place.marks is None and not place.marked for place in layout.sites)
    assert len(open_dataset(tmp_path / layout.common).test) == 10 + 20


def test_a_part_that_is_marked_is_measured_by_no_other_photograph_of_it(tmp_path: Path) -> None:
    """The same part has good photographs and ones of two kinds of defect."""
    rows = ["path,part"]
    for index in range(8):
        for label in ("train/good", "test/good", "test/hole", "test/blot (dark)"):
            path = tmp_path / "data" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, part_image(index + 10 * len(rows), hole="good" not in label))
            rows.append(f"{label}/{index}.png,{label[:5]}{index}")
    (tmp_path / "data" / "groups.csv").write_text("\n".join(rows) + "\n")
    text = f"sites = 2\n[data]\nkind = 'folder'\npath = '{tmp_path / 'data'}'\n[fleet.learning]\nmethod = 'feedback'\n"
    layout = prepare_site_data(parse_config(text.encode(), SimulationConfig, "test"), tmp_path / "out", no_progress)
    first, second = (place.marked for place in layout.sites)
    assert (list(first), list(second)) == (["blot (dark)"], ["hole"])
    marked = {*first["blot (dark)"], *second["hole"]}
    assert len(marked) == 4 + 2
    assert layout.sites[0].marks is not None
    # A name that can be a folder's.
    assert {one.kind for one in MarkStore(tmp_path / "out" / layout.sites[0].marks).marks()} == {"blot _dark_"}
    test = open_dataset(tmp_path / "out" / layout.common).test
    assert {record.group for record in test} == {f"test/{index}" for index in range(8)} - marked
    assert {record.label for record in test} == {"good", "hole", "blot (dark)"}


def test_where_nothing_can_be_marked_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of no kind of defect is there a part to mark and another to test on"):
        prepare_site_data(boards(defective=5, textures=("warm_wood",)), tmp_path, no_progress)
    with pytest.raises(ConfigError, match="marked must be"):
        boards("marked = 1.0")


@pytest.fixture(scope="module")
def parts_with_holes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 good photographs to train on; 20 good ones and 16 with a hole to test on, each of a part of its own."""
    root = tmp_path_factory.mktemp("data")
    for label, count, first in (("train/good", 24, 0), ("test/good", 20, 100), ("test/hole", 16, 200)):
        (root / label).mkdir(parents=True)
        for index in range(count):
            write_image(root / label / f"{index:02}.png", part_image(first + index, hole="hole" in label))
    return root


def simulation(data: Path, *, alone: str = "") -> str:
    return f"""
sites = 2
{alone}
[data]
kind = "folder"
path = "{data}"
[partition]
beta = "even"
[fleet]
rounds = 3
[fleet.learning]
method = "feedback"
[fleet.learning.backbone]
name = "test_efficientnet"
stages = [1, 2]
weights = "random"
[fleet.learning.input]
height = 64
width = 64
[fleet.learning.scoring]
rank = 4
smoothing_sigma = 1.0
"""


def command(config: str, out: Path) -> list[str]:
    path = out.with_suffix(".toml")
    path.write_text(config)
    return [sys.executable, "-m", "edgeflame", "simulate", "--config", str(path), "--out", str(out)]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


@pytest.mark.timeout(400)
def test_a_defect_marked_at_one_site_is_measured_at_the_other_with_and_without_the_head(
    tmp_path: Path, parts_with_holes: Path
) -> None:
    """The command as people run it; killed in the middle it ends the same, and without the head is as if alone."""
    out, killed = tmp_path / "out", tmp_path / "killed"
    done = subprocess.run(
        command(simulation(parts_with_holes), out), capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    record, metrics, ledger = (read(out / f"{name}.json") for name in ("simulation", "metrics", "ledger"))
    assert [len(place["marked"].get("hole", ())) for place in record["sites"]] == [8, 0]
    assert [
        {one["site"]: one["metrics"]["num_marked_bad"] for one in entry["contributed"]} for entry in ledger["rounds"]
    ] == [{"site-0": 8.0, "site-1": 0.0}] * 3
    summary = ledger["packages"][1]["summary"]
    assert (summary["num_marked_bad"], summary["head_weight"]) == (0.0, 0.5), summary
    other = metrics["sites"]["site-1"]
    assert other["figures"]["head_weight"] == 0.5
    assert other["classes"]["hole"]["num_images"] == 8
    assert other["figures"]["num_good"] == 20
    assert metrics["rounds"][0]["figures"]["head_weight"] == 0, "the initial head knows nothing"
    assert max(map(len, done.stdout.splitlines())) <= max(100, len(f"figures: {out / 'metrics.json'}"))
    area, caught = (other["classes"]["hole"][name] for name in ("image_AUROC", "caught"))
    before = tuple(other["classes"]["hole"][f"{name}_without_head"] for name in ("image_AUROC", "caught"))
    line = rf"hole +the others +{before[0]:.4f} +{area:.4f} +{before[1]:.0f} +{caught:.0f} +8"
    assert re.search(line, done.stdout), done.stdout
    assert "The head counts at 2 of 2 sites." in done.stdout

    process = subprocess.Popen(command(simulation(parts_with_holes), killed), cwd=REPOSITORY)
    wait_for((killed / "figures" / "round-000001.json").exists, "a round is over", timeout_s=120)
    process.kill()
    process.wait()
    assert not (killed / "metrics.json").exists()
    subprocess.run(command(simulation(parts_with_holes), killed), capture_output=True, cwd=REPOSITORY, check=True)
    for name in ("metrics.json", "global-model.safetensors"):
        assert (killed / name).read_bytes() == (out / name).read_bytes()

    # What a site measures without the head is what it is without a fleet, on the same parts.
    alone = tmp_path / "alone"
    subprocess.run(
        command(simulation(parts_with_holes, alone='alone = "none"'), alone),
        capture_output=True, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    for site, one in read(alone / "metrics.json")["sites"].items():
        with_head = metrics["sites"][site]["figures"]
        for name in ("image_AUROC", "macro_image_AUROC", "good_rejected", "defective_caught"):
            assert with_head[f"{name}_without_head"] == one["figures"][name], (site, name)
