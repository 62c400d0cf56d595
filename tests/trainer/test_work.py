"""A site's rounds: files in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from aggregator.pooling import pool_statistics
from edgeflame.errors import DataError, FederationError, StorageError, UsageError
from edgeflame.log import no_progress
from edgeflame.methods import CONTROL_PREFIX, Learning
from edgeflame.mqtt.messages import StatisticsWanted
from edgeflame.package import WeightsOrigin, read_package
from edgeflame.statistics.codec import decode_statistics
from edgeflame.statistics.shared import ScoreDeviation, read_moments, write_site_statistics
from export.network import scoring_graph
from trainer.agent.tasks import FinishTask, InitialTask, SiteTrainer, StatisticsTask, TaskResult, TrainTask
from trainer.model import build_model, load_model, save_model
from trainer.work import STATISTICS_FILE, TorchSiteTrainer


@pytest.fixture
def work(parts_folder: Path, small_learning: Learning, tmp_path: Path) -> TorchSiteTrainer:
    return TorchSiteTrainer(
        learning=msgspec.structs.replace(small_learning, method="flame"),
        data=parts_folder,
        site="west",
        groups_file=None,
        exporter=scoring_graph,
        product="plate",
        device="cpu",
    )


def task(folder: Path, number: int, *, history: Path | None = None, seed: int = 1) -> TrainTask:
    return TrainTask(
        round=number, base=str(folder / "initial.safetensors"), history=None if history is None else str(history),
        out=str(folder / f"{number}.safetensors"),
        seed=seed,
    )  # fmt: skip


def test_two_rounds_and_a_package(work: TorchSiteTrainer, tmp_path: Path) -> None:
    site: SiteTrainer = work  # it has the shape the agent expects
    initial = tmp_path / "initial.safetensors"
    site.write_initial_model(InitialTask(out=str(initial)))
    seen: list[int] = []
    first = site.train(task(tmp_path, 1), lambda done, total, note="": seen.append(done))
    assert first.num_samples == 24
    assert seen
    assert first.metrics["num_teacher_forward"] == 0
    second = site.train(task(tmp_path, 2, history=tmp_path / "1.safetensors"), no_progress)
    assert second.metrics["num_teacher_forward"] == 48
    assert second.metrics["distillation"] > 0

    base, trained = (safetensors.torch.load_file(path) for path in (initial, tmp_path / "2.safetensors"))
    assert {name: (one.shape, one.dtype) for name, one in base.items()} == {
        name: (one.shape, one.dtype) for name, one in trained.items()
    }
    assert all(tensor.dtype == torch.float32 for tensor in base.values())
    assert any(name.startswith("discriminator.") for name in base)
    assert any(name.endswith("running_var") for name in base)

    out_dir = tmp_path / "out"
    out_dir.mkdir()
    outcome = site.finish(
        FinishTask(
            model=str(tmp_path / "2.safetensors"), out_dir=str(out_dir), ledger={"rounds": [{"sites": ["west"]}]}
        ),
        no_progress,
    )
    assert outcome.package is not None
    package = read_package(Path(outcome.package))
    assert (package.manifest.site, package.manifest.product) == ("west", "plate")
    assert package.manifest.provenance["ledger"] == {"rounds": [{"sites": ["west"]}]}
    assert package.manifest.weights.source == "random"
    assert len(package.fitted) == 24
    assert decode_statistics((out_dir / STATISTICS_FILE).read_bytes()).count == 24
    assert outcome.summary["threshold"] == package.manifest.threshold.value


def test_the_same_task_gives_the_same_file(work: TorchSiteTrainer, tmp_path: Path) -> None:
    work.write_initial_model(InitialTask(out=str(tmp_path / "initial.safetensors")))
    files = []
    for seed in (5, 5, 6):
        work.train(task(tmp_path, 1, seed=seed), no_progress)
        files.append((tmp_path / "1.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_the_initial_model_is_the_same_at_every_site(work: TorchSiteTrainer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        work.write_initial_model(InitialTask(out=str(tmp_path / name)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safetensors.safe_open(str(tmp_path / "a"), framework="pt") as stream:
        assert "random" in stream.metadata()["weights"]


def test_without_an_exporter_there_are_statistics_but_no_package(
    parts_folder: Path, small_learning: Learning, tmp_path: Path
) -> None:
    learning = msgspec.structs.replace(small_learning, method="fedavg")
    work = TorchSiteTrainer(learning=learning, data=parts_folder, site="west")
    work.write_initial_model(InitialTask(out=str(tmp_path / "m")))
    outcome = work.finish(FinishTask(model=str(tmp_path / "m"), out_dir=str(tmp_path), ledger={}), no_progress)
    assert outcome.package is None
    assert (tmp_path / STATISTICS_FILE).exists()


def test_a_site_that_cannot_take_part(parts_folder: Path, small_learning: Learning, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a federated one"):
        TorchSiteTrainer(learning=small_learning, data=parts_folder, site="west")
    federated = msgspec.structs.replace(small_learning, method="fedavg")
    with pytest.raises(DataError, match="no such folder"):
        TorchSiteTrainer(learning=federated, data=tmp_path / "no", site="west")


def spoil(path: Path, how: str) -> None:
    tensors = safetensors.torch.load_file(path)
    name = "discriminator.hidden.weight"
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["else"] = torch.zeros(1)
    elif how == "shape":
        tensors[name] = tensors[name][:1]
    elif how == "type":
        tensors[name] = tensors[name].half()
    elif how == "nan":
        tensors[name][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "type", "nan"])
def test_a_model_of_another_configuration_is_refused(small_learning: Learning, tmp_path: Path, how: str) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, build_model(small_learning)[0])
    load_model(path, small_learning)
    spoil(path, how)
    with pytest.raises(FederationError, match=r"m\.safetensors"):
        load_model(path, small_learning)


def test_damaged_and_missing_model_files(small_learning: Learning, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(StorageError):
        load_model(path, small_learning)
    save_model(path, build_model(small_learning)[0])
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FederationError, match="safetensors"):
            load_model(path, small_learning)
    with pytest.raises(StorageError):
        save_model(tmp_path / "no" / "m", build_model(small_learning)[0])


def test_saving_and_loading_keeps_every_number(small_learning: Learning, tmp_path: Path) -> None:
    model, _ = build_model(small_learning)
    origin = WeightsOrigin(source="x", sha256="y")
    save_model(tmp_path / "m", model, origin)
    loaded, loaded_origin = load_model(tmp_path / "m", small_learning)
    assert loaded_origin == origin
    for name, tensor in model.exchanged().items():
        assert torch.equal(tensor, loaded.exchanged()[name])


def site(learning: Learning, data: Path, state: Path, name: str = "west", **training: object) -> TorchSiteTrainer:
    changed = msgspec.structs.replace(learning.training, **training)
    return TorchSiteTrainer(
        learning=msgspec.structs.replace(learning, training=changed), data=data, site=name, device="cpu"
    )


def private_task(folder: Path, number: int, base: str, private: str | None, out: str) -> TrainTask:
    return TrainTask(
        round=number,
        base=str(folder / base),
        out=str(folder / out),
        seed=number,
        private=None if private is None else str(folder / private),
        private_out=str(folder / f"{out}.private"),
    )


def test_scaffolds_variates_travel_and_its_own_stay(
    parts_folder: Path, small_learning: Learning, tmp_path: Path
) -> None:
    work = site(msgspec.structs.replace(small_learning, method="scaffold"), parts_folder, tmp_path, epochs=1)
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    initial = safetensors.torch.load_file(tmp_path / "base")
    controls = {name for name in initial if name.startswith(CONTROL_PREFIX)}
    assert controls == {CONTROL_PREFIX + name for name, _ in build_model(small_learning)[0].named_parameters()}
    assert not any(initial[name].any() for name in controls)
    outcome = work.train(private_task(tmp_path, 1, "base", None, "1"), no_progress)
    assert outcome.num_steps == 3
    update, own = (safetensors.torch.load_file(tmp_path / name) for name in ("1", "1.private"))
    assert set(update) == set(initial)
    assert set(own) == controls
    for name in controls:
        torch.testing.assert_close(update[name], own[name])  # c was zero
    # What is kept changes the next round; the same task gives the same files.
    for out, private in (("2", "1.private"), ("3", "1.private"), ("4", None)):
        work.train(private_task(tmp_path, 2, "1", private, out), no_progress)
    assert (tmp_path / "2").read_bytes() == (tmp_path / "3").read_bytes() != (tmp_path / "4").read_bytes()
    assert (tmp_path / "2.private").read_bytes() == (tmp_path / "3.private").read_bytes()


def test_local_batch_norm_stays_at_its_site(parts_folder: Path, small_learning: Learning, tmp_path: Path) -> None:
    learning = msgspec.structs.replace(small_learning, method="fedavg")
    work = site(learning, parts_folder, tmp_path, epochs=1, batch_norm="local")
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    work.train(private_task(tmp_path, 1, "base", None, "1"), no_progress)
    base, update, own = (safetensors.torch.load_file(tmp_path / name) for name in ("base", "1", "1.private"))
    kept = {name.removeprefix("norm."): tensor for name, tensor in own.items()}
    assert {name for name in base if "running_" in name} < set(kept)
    for name, tensor in update.items():
        assert torch.equal(tensor, base[name]) == (name in kept), name
    assert all(not torch.equal(kept[name], base[name]) for name in kept if "running_" in name)
    # The next round and the end begin from what was kept.
    for out, private in (("2", "1.private"), ("3", None)):
        work.train(private_task(tmp_path, 2, "1", private, out), no_progress)
    assert (tmp_path / "2").read_bytes() != (tmp_path / "3").read_bytes()
    statistics = []
    for private in (str(tmp_path / "1.private"), None):
        work.finish(
            FinishTask(model=str(tmp_path / "1"), out_dir=str(tmp_path), ledger={}, private=private), no_progress
        )
        statistics.append((tmp_path / STATISTICS_FILE).read_bytes())
    assert statistics[0] != statistics[1]


def test_averaged_batch_norm_travels(parts_folder: Path, small_learning: Learning, tmp_path: Path) -> None:
    learning = msgspec.structs.replace(small_learning, method="fedavg")
    work = site(learning, parts_folder, tmp_path, epochs=1, batch_norm="average")
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    work.train(private_task(tmp_path, 1, "base", None, "1"), no_progress)
    base, update = (safetensors.torch.load_file(tmp_path / name) for name in ("base", "1"))
    assert all(not torch.equal(update[name], base[name]) for name in base if "running_" in name)
    assert not (tmp_path / "1.private").exists()


def test_damaged_private_state_is_a_clear_error(parts_folder: Path, small_learning: Learning, tmp_path: Path) -> None:
    work = site(msgspec.structs.replace(small_learning, method="scaffold"), parts_folder, tmp_path, epochs=1)
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="kept from its last round"):
        work.train(private_task(tmp_path, 1, "base", "bad", "1"), no_progress)


@pytest.fixture
def without_package(parts_folder: Path, small_learning: Learning, tmp_path: Path) -> TorchSiteTrainer:
    learning = msgspec.structs.replace(small_learning, method="flame")
    return TorchSiteTrainer(learning=learning, data=parts_folder, site="west", device="cpu")


@pytest.mark.parametrize("form", ["moments", "low_rank"])
def test_a_site_uses_the_statistics_of_two(
    form: Literal["moments", "low_rank"], without_package: TorchSiteTrainer, tmp_path: Path
) -> None:
    work = without_package
    initial, own, pooled = tmp_path / "initial.safetensors", tmp_path / "own", tmp_path / "pooled"
    work.write_initial_model(InitialTask(out=str(initial)))
    wanted = StatisticsWanted(form=form, rank=8)
    outcome = work.compute_statistics(
        StatisticsTask(model=str(initial), model_sha256="a" * 64, wanted=wanted, out=str(own)), no_progress
    )
    assert outcome.num_samples == 24
    # With a twin of the same images the mean stays, and the threshold sees every part's copy in the statistics.
    pool_statistics({"west": own, "twin": own}, pooled, rank=8)
    found, summaries = [], []
    for shared in (None, pooled):
        finished = work.finish(
            FinishTask(model=str(initial), out_dir=str(tmp_path), ledger={}, statistics=shared and str(shared)),
            no_progress,
        )
        found.append(decode_statistics((tmp_path / STATISTICS_FILE).read_bytes()))
        summaries.append(finished.summary)
    alone, both = found
    assert (alone.count, both.count) == (24, 48)
    np.testing.assert_allclose(both.mean, alone.mean, atol=1e-4)
    assert both.mean_variance == pytest.approx(alone.mean_variance * 23 / 24 * 48 / 47, rel=1e-3)
    assert summaries[1]["threshold"] < summaries[0]["threshold"]

    # A site that did not contribute has nothing to take out.
    pool_statistics({"twin": own}, pooled, rank=8)
    task = FinishTask(model=str(initial), out_dir=str(tmp_path), ledger={}, statistics=str(pooled))
    summary = work.finish(task, no_progress).summary
    assert (summary["num_images"], summary["num_images_in_statistics"]) == (24, 24)
    assert summary["threshold"] < summaries[0]["threshold"]


def test_a_site_leans_on_the_others_statistics(
    without_package: TorchSiteTrainer, parts_folder: Path, small_learning: Learning, tmp_path: Path
) -> None:
    work = without_package
    initial, own, pooled = tmp_path / "initial.safetensors", tmp_path / "own", tmp_path / "pooled"
    work.write_initial_model(InitialTask(out=str(initial)))
    wanted = StatisticsWanted(form="low_rank", rank=8)
    work.compute_statistics(
        StatisticsTask(model=str(initial), model_sha256="a" * 64, wanted=wanted, out=str(own)), no_progress
    )

    def finish(sites: dict[str, Path]) -> tuple[TaskResult, bytes]:
        pool_statistics(sites, pooled, rank=8, as_prior=True)
        task = FinishTask(model=str(initial), out_dir=str(tmp_path), ledger={}, statistics=str(pooled))
        return work.finish(task, no_progress), (tmp_path / STATISTICS_FILE).read_bytes()

    alone = work.finish(FinishTask(model=str(initial), out_dir=str(tmp_path), ledger={}), no_progress)
    by_itself = (tmp_path / STATISTICS_FILE).read_bytes()
    # What only this site contributed is no prior for it.
    lonely, statistics = finish({"west": own})
    assert (lonely.summary, statistics) == (alone.summary, by_itself)
    helped, statistics = finish({"west": own, "twin": own})
    assert statistics != by_itself
    # The twin's mean is this site's.
    found, before = decode_statistics(statistics), decode_statistics(by_itself)
    np.testing.assert_allclose(found.mean, before.mean, atol=1e-4)
    assert helped.summary["num_images_in_statistics"] == 24
    assert helped.summary["threshold"] < alone.summary["threshold"]


@pytest.mark.parametrize("as_prior", [True, False])
def test_a_sites_threshold_leans_on_how_scores_spread_in_the_fleet(
    as_prior: bool, without_package: TorchSiteTrainer, tmp_path: Path
) -> None:
    work = without_package
    initial, own, pooled = tmp_path / "initial.safetensors", tmp_path / "own", tmp_path / "pooled"
    work.write_initial_model(InitialTask(out=str(initial)))
    wanted = StatisticsWanted(form="moments", rank=0)
    work.compute_statistics(
        StatisticsTask(model=str(initial), model_sha256="a" * 64, wanted=wanted, out=str(own)), no_progress
    )
    moments, header = read_moments(own)
    assert isinstance(header.spread, ScoreDeviation)
    assert 0 < header.spread.deviation < 1
    assert header.spread.num_parts == 12
    thresholds = []
    for deviation in (0.01, 1.0):
        sites = {"west": own}
        for site in ("east", "north"):
            sites[site] = tmp_path / site
            write_site_statistics(
                sites[site],
                moments,
                grid=header.grid,
                model=header.model,
                form="moments",
                rank=0,
                spread=ScoreDeviation(deviation=deviation, num_parts=24),
            )
        pool_statistics(sites, pooled, rank=0, as_prior=as_prior)
        task = FinishTask(model=str(initial), out_dir=str(tmp_path), ledger={}, statistics=str(pooled))
        thresholds.append(work.finish(task, no_progress).summary["threshold"])
    assert thresholds[1] > 1.2 * thresholds[0]


def test_loaded_models_share_nothing(small_learning: Learning, tmp_path: Path) -> None:
    save_model(tmp_path / "m", build_model(small_learning)[0])
    first, second = (load_model(tmp_path / "m", small_learning)[0] for _ in range(2))
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.zero_()
    assert any(tensor.any() for tensor in second.state_dict().values())
    assert any(tensor.any() for tensor in load_model(tmp_path / "m", small_learning)[0].state_dict().values())
