"""``edgeflame demo-data`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from boards.textures import TEXTURES
from cli import demo_data
from edgeflame.dataset import open_dataset

SMALL = ["--parts", "1", "--photos", "1", "--size", "64"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeflame", "demo-data", *arguments], capture_output=True, text=True, timeout=60
    )


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(demo_data.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_site_is_written_to_the_folder_itself(tmp_path: Path) -> None:
    out = tmp_path / "data"
    done = run("--out", str(out), *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{out}: warm_wood, 3 boards, 3 photographs written (train 1 good; test 1 good, 1 defective)\n"
    )
    assert len(open_dataset(out).train) == 1


def test_sites_and_textures_get_folders_cameras_and_boards_of_their_own(tmp_path: Path) -> None:
    answer = json.loads(invoke("--out", str(tmp_path), *SMALL, "--sites", "2", "--all-textures", "--json"))
    folders = [tmp_path / f"site-{site}" / texture for site in (1, 2) for texture in TEXTURES]
    assert [entry["out"] for entry in answer["datasets"]] == [str(folder) for folder in folders]
    assert all(entry["num_train_images"] == 1 and not entry["reused"] for entry in answer["datasets"])
    specs = [json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["spec"] for folder in folders]
    assert [spec["texture"] for spec in specs] == [*TEXTURES, *TEXTURES]
    assert specs[0]["camera"] == specs[4]["camera"] != specs[5]["camera"]
    assert specs[0]["seed"] == specs[4]["seed"] != specs[5]["seed"]
    again = json.loads(invoke("--out", str(tmp_path), *SMALL, "--sites", "2", "--all-textures", "--json"))
    assert all(entry["reused"] for entry in again["datasets"])


def test_the_first_of_many_sites_is_the_only_one_of_one(tmp_path: Path) -> None:
    invoke("--out", str(tmp_path / "one"), *SMALL, "--texture", "warm_white_grid", "--seed", "5")
    invoke("--out", str(tmp_path / "two"), *SMALL, "--texture", "warm_white_grid", "--seed", "5", "--sites", "2")
    name = "train/good/0000-0.png"
    alone = (tmp_path / "one" / name).read_bytes()
    assert (tmp_path / "two" / "site-1" / name).read_bytes() == alone
    assert (tmp_path / "two" / "site-2" / name).read_bytes() != alone


def test_a_folder_in_use_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    done = run("--out", str(tmp_path), *SMALL)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"edgeflame: {tmp_path}: expected a new or empty folder, found 'holiday.jpg'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--parts", "0"], ["--size", "10"], ["--texture", "marble"], ["--sites", "0"], ["--photos", "x"]],
)
def test_a_wrong_option_is_a_usage_error(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(demo_data.command, ["--out", str(tmp_path / "data"), *arguments])
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in result.stderr
    assert not (tmp_path / "data").exists()


def test_one_texture_and_all_contradict_each_other(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "data"), "--texture", "warm_wood", "--all-textures")
    assert done.returncode == 2
    assert done.stderr == "edgeflame: --texture and --all-textures contradict each other; give one of them\n"


def test_help_is_quick_and_the_texture_names_are_right() -> None:
    code = "import sys, cli.demo_data; sys.exit('cv2' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert demo_data._TEXTURES == TEXTURES
