"""`edgeflame evaluate` and the page it writes, as a user calls it."""

from __future__ import annotations

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli import cli
from edgeflame.errors import MissingDependencyError, NegativeAnswerError, StorageError
from edgeflame.images import write_image
from edgeflame.package import read_package, write_package
from edgeflame.threshold import ThresholdPromise
from tests.support.small_package import bad_image, good_image, write_small_package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its product has a name to trip over, and its threshold others beside it."""
    path = write_small_package(tmp_path_factory.mktemp("package") / "m.edgeflame")
    read = read_package(path)
    value = read.manifest.threshold.value
    others = tuple(
        ThresholdPromise(false_reject_rate=rate, value=one, expected_false_reject_rate=0.0)
        for rate, one in ((0.01, None), (0.08, value), (0.2, value / 8))
    )
    threshold = msgspec.structs.replace(read.manifest.threshold, others=others)
    manifest = msgspec.structs.replace(read.manifest, product="<script>alert(1)</script> & co", threshold=threshold)
    write_package(path, manifest=manifest, model_onnx=read.model_onnx, statistics=read.statistics)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six good parts, four with a hole and two whose faint scratch the model misses; masks of the holes."""
    import numpy as np

    root = tmp_path / "data"
    for label in ("good", "hole", "faint_scratch"):
        (root / "test" / label).mkdir(parents=True)
    (root / "ground_truth/hole").mkdir(parents=True)
    for index in range(6):
        write_image(root / f"test/good/{index}.png", good_image(900 + index))
    for index in range(4):
        write_image(root / f"test/hole/{index}.png", bad_image(800 + index))
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[16:32, 16:32] = 255
        write_image(root / f"ground_truth/hole/{index}_mask.png", mask)
    for index, seed in enumerate((27, 34)):  # of those the model was fitted to, the most ordinary
        write_image(root / f"test/faint_scratch/{index}.png", good_image(seed))
    return root


def edgeflame(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


class Page(HTMLParser):
    """Every address and the text of a page; refuses tags that do not close."""

    VOID = frozenset({"meta", "img", "br", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_by_itself_and_says_what_happened(package: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    result = edgeflame("evaluate", "--model", package, "--data", data, "--report", out)
    assert result.exit_code == 0, result.output
    assert str(out / "index.html") in result.output
    source = (out / "index.html").read_text()
    page = Page(source)
    # Self-contained: every address is inside the page.
    assert page.addresses
    assert all(one.startswith(("data:image/jpeg;base64,", "#")) for one in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<link", source)
    # Names are text, never mark-up.
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & co" in page.text
    flat = re.sub(r"\s+", " ", page.text)
    assert "rejects 4 of 6 photographs that show a defect and lets 2 pass" in flat
    assert "Easiest is hole (4 of 4 caught), hardest faint scratch (0 of 2)" in flat
    assert "Of 6 good photographs it rejects 0" in flat
    assert "at most 8.00% of good parts rejected, with 95% confidence" in flat
    assert "Nobody said which photographs show the same part" in flat
    for name in ("test/faint_scratch/0.png", "test/faint_scratch/1.png", "test/hole/0.png"):
        assert name in flat
    assert "Good photographs nearest to being rejected" in flat
    assert page.tags.count("svg") == 3
    # The charts have no colours of their own: they follow the page's theme.
    charts = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{3}|fill=|stroke=|style=", charts)
    assert "var(--good)" in source


def test_the_page_of_good_images_alone(package: Path, data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "test/hole")
    shutil.rmtree(data / "test/faint_scratch")
    result = edgeflame("evaluate", "--model", package, "--data", data, "--report", tmp_path / "r")
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "r/index.html").read_text())
    assert "cannot say how many defects are caught" in page.text
    assert page.tags.count("svg") == 1


def test_json_goes_to_standard_output_alone(package: Path, data: Path, tmp_path: Path) -> None:
    result = edgeflame("evaluate", "--model", package, "--data", data, "--report", tmp_path / "r", "--json")
    report = msgspec.json.decode(result.stdout)
    assert (report["defective_caught"], report["good_rejected"]) == (4, 0)
    assert report["per_class"]["hole"]["intervals"]["image_AUROC"] == [1.0, 1.0]
    assert [one["false_reject_rate"] for one in report["promises"]] == [0.08, 0.2]
    assert "report:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "missed"),
    [
        (("--min-pixel-auroc", 0.9), ""),
        (("--min-image-auroc", 0.9), "image_AUROC is 0."),
        (("--min-image-auroc", 0.9, "--min-macro-image-auroc", 0.9, "--min-pixel-auroc", 0.5), "macro_image_AUROC is"),
    ],
)
def test_a_bar_that_is_not_reached_is_exit_code_1(
    package: Path, data: Path, arguments: tuple[object, ...], missed: str
) -> None:
    result = edgeflame("evaluate", "--model", package, "--data", data, *arguments)
    assert "faint" in result.output  # the figures are printed in any case
    if not missed:
        assert result.exit_code == 0, result.output
        return
    assert isinstance(result.exception, NegativeAnswerError)
    assert result.exception.exit_code == 1
    assert missed in str(result.exception)
    assert "pixel" not in str(result.exception)


def test_a_figure_that_is_not_defined_reaches_no_bar(package: Path, data: Path) -> None:
    shutil.rmtree(data / "ground_truth")
    result = edgeflame("evaluate", "--model", package, "--data", data, "--min-pixel-aupro", 0)
    assert isinstance(result.exception, NegativeAnswerError)
    assert "pixel_AUPRO is not defined on this data" in str(result.exception)


def test_without_the_drawing_library_it_is_told_before_the_work(
    package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = edgeflame("evaluate", "--model", package, "--data", data, "--report", tmp_path / "r")
    assert isinstance(result.exception, MissingDependencyError)
    assert "edgeflame[report]" in str(result.exception)
    assert "rejected" not in result.output


def test_a_report_that_cannot_be_written_is_told_before_the_work(package: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = edgeflame("evaluate", "--model", package, "--data", data, "--report", tmp_path / "file")
    assert isinstance(result.exception, StorageError)
    assert "rejected" not in result.output
