"""Configuration files: what fits, and errors that name what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.config import AggregateConfig
from edgeflame.config import load_config
from edgeflame.errors import ConfigError
from edgeflame.methods import METHODS, PRESETS, Learning, Training


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
        ("sead = 1", "unknown key `sead`; did you mean `seed`? There are "),
        ("[imput]\nheight = 128", "unknown key [imput]; did you mean `input`?"),
        ("[input]\nhight = 128", "unknown key `hight` in [input]; did you mean `height`?"),
        ("[input]\nzzz = 128", "unknown key `zzz` in [input]; There are "),
        ('[input]\nheight = "128"', "input.height: Expected `int`, got `str`"),
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


def test_the_papers_preset_is_what_the_paper_prints(tmp_path: Path) -> None:
    learning = load_config(write(tmp_path, 'method = "flame"\npreset = "paper"'), Learning)
    training = learning.training
    assert (training.learning_rate, training.discriminator_learning_rate, training.momentum) == (0.01, 0.01, 0.09)
    assert (training.epochs, training.batch_size, training.weight_decay) == (10, 32, 1e-5)
    assert (training.noise_std, training.noise_scale, training.margin) == (0.015, "absolute", 0.5)
    assert (training.distillation_weight, training.proximal_weight) == (0.5, 0.01)
    assert load_config(None, Learning, {"method": "solo", "preset": "paper"}).training.epochs == 200


def test_a_file_wins_over_its_preset_and_an_option_over_both(tmp_path: Path) -> None:
    path = write(tmp_path, 'method = "solo"\npreset = "paper"\n[training]\nepochs = 7')
    learning = load_config(path, Learning, {"seed": 3, "method": None})
    assert (learning.training.epochs, learning.training.momentum, learning.seed) == (7, 0.09, 3)
    # The method and the preset that count are the option's.
    learning = load_config(path, Learning, {"preset": "default"})
    assert learning.training == Training(epochs=7)
    assert load_config(None, Learning, {"method": "solo"}).training.epochs == 10


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_fits_every_method(method: str, preset: str) -> None:
    learning = load_config(None, Learning, {"method": method, "preset": preset})
    assert (learning.method, learning.preset) == (method, preset)


def test_presets_reach_a_learning_inside_another_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, 'rounds = 3\n[learning]\npreset = "paper"\n[learning.training]\nepochs = 2')
    config = load_config(path, AggregateConfig)
    assert (config.rounds, config.learning.method) == (3, "flame")
    assert (config.learning.training.epochs, config.learning.training.momentum) == (2, 0.09)
    moon = load_config(path, AggregateConfig, {"learning": {"method": "moon"}})
    assert (moon.learning.method, moon.learning.training.momentum) == ("moon", 0.09)
    assert load_config(None, AggregateConfig) == AggregateConfig()


@pytest.mark.parametrize("text", ['preset = "magic"', "preset = 3", "[preset]", 'method = ["fade"]', "training = 3"])
def test_nonsense_where_a_preset_is_looked_up(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"learning\.toml"):
        load_config(write(tmp_path, text), Learning)
