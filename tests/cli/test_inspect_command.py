"""`edgeflame inspect` as a user calls it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli import cli
from edgeflame.errors import ConfigError, DataError, EdgeFlameError, PackageError, StorageError, UsageError
from edgeflame.package import Package
from tests.support.small_package import write_images


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)


def lines(result: Result) -> list[dict[str, object]]:
    return [msgspec.json.decode(line) for line in result.stdout.splitlines()]


def test_one_json_line_an_image_and_the_same_in_the_file(package_file: Path, package: Package, tmp_path: Path) -> None:
    folder, results = write_images(tmp_path / "test"), tmp_path / "out" / "results.jsonl"
    summary_file = tmp_path / "summary.json"
    result = inspect(
        "--model", package_file, "--source", folder, "--json", "--results", results, "--summary", summary_file,
        "--images", tmp_path / "rejects",
    )  # fmt: skip
    assert result.exit_code == 0
    assert results.read_text() == result.stdout
    parts = lines(result)
    assert [part["verdict"] for part in parts] == ["pass"] * 3 + ["fail"] * 2
    assert [part["sequence"] for part in parts] == [0, 1, 2, 3, 4]
    assert parts[0]["source"] == str(folder / "good" / "0.png")
    assert parts[0]["threshold"] == package.manifest.threshold.value
    assert parts[0]["model"] == package.sha256[:12]
    assert all(part["latency_ms"] > 0 for part in parts)
    summary = msgspec.json.decode(summary_file.read_bytes())
    assert (summary["parts"], summary["passed"], summary["failed"], summary["unknown"]) == (5, 3, 2, 0)
    assert summary["truth"] == {"right": 5, "wrong": 0, "false_rejects": 0, "missed": 0, "undecided": 0}
    assert len(list((tmp_path / "rejects").iterdir())) == 2
    # Appended, not replaced.
    inspect("--model", package_file, "--source", folder, "--json", "--results", results)
    assert len(results.read_text().splitlines()) == 10


def test_people_get_lines_and_a_summary(package_file: Path, tmp_path: Path) -> None:
    result = inspect("--model", package_file, "--source", write_images(tmp_path / "test"))
    assert result.exit_code == 0
    assert "good/0.png" in result.stdout
    assert "5 parts in" in result.stdout
    assert "3 pass, 2 fail, 0 unknown" in result.stdout
    assert "against the labels: 5 right, 0 wrong" in result.stdout


def test_an_unreadable_image_is_unknown_and_not_an_error(package_file: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos")
    (folder / "good" / "1.png").write_bytes(b"")
    result = inspect("--model", package_file, "--source", folder, "--json")
    assert result.exit_code == 0
    part = lines(result)[1]
    assert (part["verdict"], part["reasons"], part["score"]) == ("unknown", ["unreadable"], None)
    assert "1.png: the file is empty" in str(part["detail"])


def test_threshold_and_review_band_can_be_set_here_or_in_the_file(package_file: Path, tmp_path: Path) -> None:
    folder, config = write_images(tmp_path / "photos"), tmp_path / "line.toml"
    config.write_text("[verdict]\nthreshold = 0.001\n")
    common = ("--model", package_file, "--source", folder, "--json")
    assert {part["verdict"] for part in lines(inspect(*common, "--config", config))} == {"fail"}
    above = lines(inspect(*common, "--config", config, "--threshold", 1e9))
    assert {part["verdict"] for part in above} == {"pass"}
    score = above[0]["score"]
    assert lines(inspect(*common, "--threshold", score, "--review-band", 0.01))[0]["reasons"] == ["review_band"]


def test_a_limit(package_file: Path, tmp_path: Path) -> None:
    result = inspect("--model", package_file, "--source", write_images(tmp_path / "t"), "--json", "--limit", 2)
    assert len(lines(result)) == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--source", "nowhere"), DataError, "nowhere: no such folder or file"),
        (("--source", "empty"), DataError, "no images found"),
        (("--source", "boards:gold"), UsageError, "no texture"),
        (("--source", "photos", "--threshold", "-1"), UsageError, "--threshold must be"),
        (("--source", "photos", "--review-band", "2"), UsageError, "--review-band must be"),
        (("--source", "photos", "--config", "none.toml"), ConfigError, "cannot read"),
        (("--source", "photos", "--config", "bad.toml"), ConfigError, "treshold"),
        (("--source", "photos", "--results", "photos"), StorageError, "cannot be written"),
        (("--source", "photos", "--model", "foreign.edgeflame"), PackageError, "not a model package"),
        (("--source", "photos", "--model", "none.edgeflame"), PackageError, "no such model package"),
    ],
)
def test_mistakes_are_one_clear_error(
    arguments: tuple[str, ...],
    kind: type[EdgeFlameError],
    message: str,
    package_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"))
    Path("empty").mkdir()
    Path("bad.toml").write_text("[verdict]\ntreshold = 1\n")
    Path("foreign.edgeflame").write_bytes(b"something else")
    with pytest.raises(kind, match=message) as raised:
        inspect("--model", package_file, *arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "code"), [("boards:warm_wood?size=64", 0), ("boards:warm_wood?size=64&parts=9999", 130)]
)
def test_a_signal_ends_it_after_the_part_in_hand_with_the_summary(
    package_file: Path, tmp_path: Path, source: str, code: int
) -> None:
    """A source without an end is meant to be stopped; one cut short says so."""
    command = [sys.executable, "-m", "edgeflame", "inspect", "--model", package_file, "--source", source, "--json"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(3)]
        child.send_signal(signal.SIGTERM)
        lines += child.stdout.readlines()
    errors = (tmp_path / "log").read_text()
    assert child.returncode == code, errors
    assert [msgspec.json.decode(line)["sequence"] for line in lines] == list(range(len(lines)))
    assert f"inspected parts={len(lines)} " in errors
    assert "Traceback" not in errors


def test_model_show(package_file: Path, package: Package) -> None:
    shown = CliRunner().invoke(cli, ["model", "show", str(package_file)], catch_exceptions=False)
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert "test piece" in text
    assert "at most 8.00% of good parts rejected, with 95% confidence, from 40 parts (40 images)" in text
    as_json = CliRunner().invoke(cli, ["model", "show", str(package_file), "--json"], catch_exceptions=False)
    document = msgspec.json.decode(as_json.stdout)
    assert document["sha256"] == package.sha256
    assert document["manifest"]["learning"]["method"] == "none"


def test_the_bound_on_pixels_is_a_setting_of_the_line(package_file: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "test")
    config = tmp_path / "line.toml"
    config.write_text("[capture]\nmax_megapixels = 0.009\n")
    parts = lines(inspect("--model", package_file, "--source", folder, "--json", "--config", config))
    assert {(part["verdict"], *part["reasons"]) for part in parts} == {("unknown", "unreadable")}  # type: ignore[misc]
    assert all("96x96 pixels are more than the 0.009 megapixels" in str(part["detail"]) for part in parts)
