"""Configuration files: what fits, and errors that name what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeflame.config import load_config
from edgeflame.errors import ConfigError
from edgeflame.learning import Learning


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "learning.toml"
    path.write_text(text)
    return path


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None, Learning) == Learning()


def test_sections(tmp_path: Path) -> None:
    learning = load_config(
        write(
            tmp_path, 'method = "fade"\n[input]\nheight = 128\n[scoring]\nrank = "auto"\n[backbone]\nstages = [1, 2]\n'
        ),
        Learning,
    )
    assert (learning.method, learning.input.height, learning.scoring.rank) == ("fade", 128, "auto")
    assert learning.backbone.stages == (1, 2)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('method = "magic"', "unknown method 'magic'; known are none, fade"),
        ("seed = ", "learning.toml"),
        ("sead = 1", "unknown field `sead`"),
        ('seed = "one"', "Expected `int`"),
        ("[input]\nheight = 100", "multiple of 32"),
        ("[training]\nepochs = -1", "training.epochs must be >= 0, not -1"),
        ("[training]\nbatch_size = 1", "training.batch_size"),
        ("[scoring]\nrank = -1", "scoring.rank"),
        ("[scoring]\nridge = 0.0", "scoring.ridge"),
        ("[calibration]\nfolds = 1", "calibration.folds"),
        ("[backbone]\nstages = [3, 2]", "rising numbers"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=r"learning\.toml") as caught:
        load_config(write(tmp_path, text), Learning)
    assert what in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "gone.toml", Learning)
