"""Configuration files: what fits, and errors that name what does not."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from aggregator.config import AggregateConfig
from aggregator.simulation.config import SimulationConfig
from edge.config import InspectConfig
from edgeflame.bounds import Count
from edgeflame.config import check_keys, load_config, parse_config
from edgeflame.errors import ConfigError
from edgeflame.images import Preprocessing
from edgeflame.methods import METHODS, PRESETS, Learning, Training


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "learning.toml"
    path.write_text(text)
    return path


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None, Learning) == Learning(input=Preprocessing(resize="halving"))
    assert load_config(None, Learning, {"preset": "paper"}).input == Preprocessing()


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
        ('[input]\nheight = "128"', 'input.height must be a whole number, a multiple of 32 32..4096, not "128"'),
        ('seed = "one"', 'seed must be a whole number, 0..4294967295, not "one"'),
        ("[training]\nepochs = 1.5", "training.epochs must be a whole number, 0..1000000, not 1.5"),
        ("[training]\nlearning_rate = nan", "training.learning_rate must be in (0, 1e12], not NaN"),
        ("[training]\nlearning_rate = inf", "training.learning_rate must be in (0, 1e12], not Infinity"),
        ("training = 3", "training must be a section, not 3"),
        ("[backbone]\nneighbourhood = 2", "backbone.neighbourhood must be 1 or 3 or 5 or 7 or 9, not 2"),
        ("[seed]", "seed must be a whole number, 0..4294967295, not a section"),
        ("[input]\nheight = 100", "multiple of 32"),
        ("[training]\nepochs = -1", "training.epochs must be 0..1000000, not -1"),
        ("[training]\nbatch_size = 1", "training.batch_size"),
        ("[scoring]\nrank = -1", 'scoring.rank must be "auto" or 0..512, not -1'),
        ('[training]\nnoise_scale = "x"', 'training.noise_scale must be "relative" or "absolute", not "x"'),
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
    learning = Learning(method="flame", input=Preprocessing(resize="halving"))
    assert load_config(None, AggregateConfig) == AggregateConfig(learning=learning)


@pytest.mark.parametrize("text", ['preset = "magic"', "preset = 3", "[preset]", 'method = ["fade"]', "training = 3"])
def test_nonsense_where_a_preset_is_looked_up(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"learning\.toml"):
        load_config(write(tmp_path, text), Learning)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section with a key that was renamed."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"remembered": "dedup_window"}

    dedup_window: Count = 1


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"parts": "part_settings"}):
    """A file with a section that was renamed, and one that is stored under another name."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"pieces": "parts"}

    parts: Section = Section()
    lines: dict[str, Section] = {}


def test_old_keys_work_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "[pieces]\nremembered = 2\n[lines.a]\nremembered = 3\n[lines.b]\ndedup_window = 4")
    with caplog.at_level("WARNING", logger="edgeflame"):
        file = load_config(path, File)
    lines = {"a": Section(dedup_window=3), "b": Section(dedup_window=4)}
    assert file == File(parts=Section(dedup_window=2), lines=lines)
    renamed = {
        "pieces": "parts",
        "parts.remembered": "parts.dedup_window",
        "lines.a.remembered": "lines.a.dedup_window",
    }
    notes = [f"{old} is the old name of {new}" for old, new in renamed.items()]
    assert [finding.what for finding in check_keys(path, File)] == notes
    told = {record.fields["key"]: record.fields["use"] for record in caplog.records}  # type: ignore[attr-defined]
    assert told == renamed


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[pieces]\n[parts]", "parts and pieces, its old name, are both given; leave pieces out"),
        (
            "[parts]\nremembered = 1\ndedup_window = 1",
            "parts.dedup_window and parts.remembered, its old name, are both",
        ),
        ("[pieces]\nremembered = 0", "parts.dedup_window must be 1..1e9, not 0"),
        ('[lines.a]\ndedup_window = "2"', 'lines.a.dedup_window must be a whole number, 1..1e9, not "2"'),
        ("[part_settings]", "unknown key [part_settings]"),
        ("[lines.a]\nremember = 1", "unknown key `remember` in [lines.a]"),
    ],
)
def test_errors_name_keys_as_files_have_them(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=r"learning\.toml") as caught:
        load_config(write(tmp_path, text), File)
    assert what in str(caught.value)


def test_an_option_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match=r"rounds must be 1\.\.100000, not 0"):
        load_config(None, AggregateConfig, {"rounds": 0})


def test_a_run_is_recorded_under_the_names_of_version_0_1() -> None:
    config = load_config(
        None, AggregateConfig, {"min_available_sites": 3, "fraction_train": 0.5, "compression": "float16"}
    )
    stored = msgspec.json.encode(config)
    assert b'"min_sites":3,' in stored
    assert b'"sampling":0.5,' in stored
    assert b'"update_codec":"float16",' in stored
    assert msgspec.json.decode(stored, type=AggregateConfig) == config


def test_both_old_and_new_keys_of_a_run_work() -> None:
    old = parse_config(b'min_sites = 3\nsampling = 0.5\nupdate_codec = "float16"', AggregateConfig, "old")
    new = parse_config(
        b'min_available_sites = 3\nfraction_train = 0.5\ncompression = "float16"', AggregateConfig, "new"
    )
    assert old == new


def _numbers(
    hint: Any, key: str, metas: tuple[msgspec.Meta, ...] = ()
) -> Iterator[tuple[str, type, list[msgspec.Meta]]]:
    """Every number below a type: its dotted key, whether it is whole, and its bounds."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        mine = tuple(extra for extra in hint.__metadata__ if isinstance(extra, msgspec.Meta))
        yield from _numbers(hint.__origin__, key, (*metas, *mine))
    elif origin is not None and origin is not typing.Literal:
        for inner in typing.get_args(hint):
            yield from _numbers(inner, key)
    elif isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        hints = typing.get_type_hints(hint, include_extras=True)
        for name in hint.__struct_fields__:
            yield from _numbers(hints[name], f"{key}.{name}")
    elif hint in (int, float):
        yield key, hint, list(metas)


@pytest.mark.parametrize("kind", [InspectConfig, AggregateConfig, SimulationConfig, Learning])
def test_every_number_has_a_sensible_range(kind: type) -> None:
    numbers = list(_numbers(kind, kind.__name__))
    assert len(numbers) > 10
    for key, number, metas in numbers:
        if re.search(r"\.roi\.(ignore|crop|roi)$", key):
            continue  # checked by hand
        low = [bound for meta in metas for bound in (meta.ge, meta.gt) if bound is not None]
        high = [bound for meta in metas for bound in (meta.le, meta.lt) if bound is not None]
        assert low, key
        assert high, key
        assert max(high) <= (1e12 if number is float else (1 << 63) - 1), key


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[images]\nmax_age_days = 1e9", "images.max_age_days must be in (0, 36500], not 1000000000.0"),
        (
            '[web]\nlisten = "127.0.0.1:1"\nstale_after_s = inf',
            "web.stale_after_s must be in (0, 31622400], not Infinity",
        ),
        ("[parts]\nmax_gap = 99999999999999999999", "parts.max_gap must be 1..1e9"),
        ("[roi]\ncrop = [-1, 0, 5, 5]", "roi.crop"),
        ("[roi]\nignore = [[0, 0, 5, 9999999999]]", "roi.ignore is [x, y, width, height] or a polygon"),
        ("[verdict]\nthreshold = nan", "verdict.threshold must be in (0, 1e12], not NaN"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), InspectConfig)
    assert what in str(caught.value)


def test_a_byte_order_mark_is_passed_over_and_another_encoding_named() -> None:
    text = "height = 64\n"
    assert parse_config(text.encode("utf-8-sig"), Preprocessing, "a.toml").height == 64
    with pytest.raises(ConfigError, match=r"^a\.toml: .*UTF-16.*BOM"):
        parse_config(text.encode("utf-16"), Preprocessing, "a.toml")


def test_what_is_nested_too_deeply_is_said_in_one_line_that_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, f"height = {'[' * 5000}{']' * 5000}\n")
    for read in (lambda: load_config(path, Preprocessing), lambda: list(check_keys(path, Preprocessing))):
        with pytest.raises(ConfigError) as raised:
            read()
        assert str(raised.value) == f"{path}: it is nested too deeply"


def test_a_camera_without_a_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cameras\.one\.source must be not empty"):
        parse_config(b'[cameras.one]\nsource = ""\n', InspectConfig, "a.toml")
