"""Heads in rounds at a site: files in, files out, and a package in the end."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from edge.runtimes.load import compare_with_references, open_runtime
from edgeflame.errors import DataError, FederationError, UsageError
from edgeflame.images import read_image
from edgeflame.log import no_progress
from edgeflame.marks import MarkStore
from edgeflame.methods import Learning
from edgeflame.package import read_package
from edgeflame.simulation import MeasureTask
from export.network import scoring_graph
from tests.support.part_images import part_image
from trainer.agent.tasks import FinishTask, InitialTask, TaskResult, TrainTask
from trainer.measuring import ModelEvaluator
from trainer.work import TorchSiteTrainer


@pytest.fixture
def learning(small_learning: Learning) -> Learning:
    return msgspec.structs.replace(small_learning, method="feedback")


def trainer(learning: Learning, data: Path, marks: Path | None = None, **more: str) -> TorchSiteTrainer:
    return TorchSiteTrainer(
        learning=learning, data=data, site="west", exporter=scoring_graph, device="cpu", marks=marks, **more
    )


def round_of(site: TorchSiteTrainer, folder: Path, base: str, out: str) -> TaskResult:
    return site.train(
        TrainTask(round=1, base=str(folder / base), out=str(folder / out), seed=1, private_out=str(folder / "private")),
        no_progress,
    )


def finish(site: TorchSiteTrainer, folder: Path, model: str) -> TaskResult:
    return site.finish(FinishTask(model=str(folder / model), out_dir=str(folder), ledger={}), no_progress)


@pytest.fixture
def store(tmp_path: Path) -> MarkStore:
    made = MarkStore(tmp_path / "marks")
    for number in range(12):
        made.add(f"bad-{number}", part_image(200 + number, hole=True), "bad", kind="hole", product="plate")
        if number < 4:
            made.add(f"good-{number}", part_image(300 + number), "good", product="plate")
    return made


def test_a_site_with_marks_teaches_and_its_package_holds_the_fleets_head(
    learning: Learning, parts_folder: Path, tmp_path: Path, store: MarkStore
) -> None:
    site = trainer(learning, parts_folder, store.folder)
    site.write_initial_model(InitialTask(out=str(tmp_path / "initial")))
    result = round_of(site, tmp_path, "initial", "one")
    assert (result.num_samples, result.metrics["num_marked_bad"]) == (24 + 4 + 12, 12)
    assert not (tmp_path / "private").exists()
    # What was interrupted is done again to the same bits, by another process.
    round_of(trainer(learning, parts_folder, store.folder), tmp_path, "initial", "again")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    # Kilobytes, whatever the backbone.
    assert (tmp_path / "one").stat().st_size < 100_000
    second = round_of(site, tmp_path, "one", "two")
    assert second.metrics["loss"] < result.metrics["loss"]
    outcome = finish(site, tmp_path, "two")
    assert outcome.package is not None
    package = read_package(Path(outcome.package))
    told = package.manifest.provenance["statistics"]["head"]
    assert told["weight_chosen_by"] == "own marks", told
    assert package.head is not None
    assert outcome.summary["head_weight"] == told["weight"] > 0
    assert package.manifest.threshold.labelled is not None
    runtime = open_runtime(package.model_onnx, device="cpu")
    assert compare_with_references(runtime, package).worst < 0.005


def test_a_site_without_marks_is_given_the_head(
    learning: Learning, parts_folder: Path, tmp_path: Path, store: MarkStore
) -> None:
    teacher, other = trainer(learning, parts_folder, store.folder), trainer(learning, parts_folder)
    other.write_initial_model(InitialTask(out=str(tmp_path / "initial")))
    assert round_of(other, tmp_path, "initial", "nothing").metrics["num_marked_bad"] == 0
    round_of(teacher, tmp_path, "initial", "one")
    outcome = finish(other, tmp_path, "one")
    assert outcome.summary["head_weight"] == 0.5, outcome.summary
    nothing = finish(other, tmp_path, "nothing")
    assert (nothing.summary["head_weight"], nothing.summary["no_head"]) == (
        0.0,
        "nobody in the fleet has marked a bad part",
    )
    assert nothing.package is not None
    assert read_package(Path(nothing.package)).head is None


def test_measuring_counts_the_marks_it_is_given_and_no_others(
    learning: Learning, parts_folder: Path, tmp_path: Path, store: MarkStore
) -> None:
    """The same images are measured first without marks, as in a round of a single site, then with the site's."""
    site = trainer(learning, parts_folder, store.folder)
    site.write_initial_model(InitialTask(out=str(tmp_path / "initial")))
    round_of(site, tmp_path, "initial", "one")
    without = MeasureTask(
        name="1", learning=learning, model=str(tmp_path / "one"), train=(str(parts_folder),), test=str(parts_folder)
    )
    with_marks = msgspec.structs.replace(without, marks=str(store.folder))
    evaluator = ModelEvaluator("cpu")
    first, second = evaluator.evaluate(without), evaluator.evaluate(with_marks)
    assert second == ModelEvaluator("cpu").evaluate(with_marks)
    assert first.figures["threshold"] != second.figures["threshold"], "four more good images"


def test_a_poisoned_head_does_not_get_into_the_package(
    learning: Learning, parts_folder: Path, tmp_path: Path, store: MarkStore
) -> None:
    site = trainer(learning, parts_folder, store.folder)
    site.write_initial_model(InitialTask(out=str(tmp_path / "initial")))
    round_of(site, tmp_path, "initial", "one")
    tensors = safetensors.numpy.load_file(tmp_path / "one")
    with safetensors.safe_open(str(tmp_path / "one"), framework="numpy") as stream:
        metadata = stream.metadata()
    tensors["offset"] += np.float32(50)
    safetensors.numpy.save_file(tensors, tmp_path / "poisoned", metadata)
    outcome = finish(trainer(learning, parts_folder), tmp_path, "poisoned")
    assert outcome.summary["no_head"] == "it calls 100% of this site's good images bad"
    assert outcome.package is not None
    package = read_package(Path(outcome.package))
    assert package.head is None
    assert package.manifest.provenance["statistics"]["head"]["weight"] == 0
    safetensors.numpy.save_file(tensors, tmp_path / "elsewhere", {"space": "b" * 64})
    with pytest.raises(FederationError, match="same backbone weights"):
        finish(site, tmp_path, "elsewhere")


def test_marks_that_cannot_be_used_are_left_out_and_told(
    learning: Learning, parts_folder: Path, tmp_path: Path, store: MarkStore
) -> None:
    store.add("other", part_image(1, hole=True), "bad", product="another")
    store.add("wide", np.zeros((64, 128, 3), np.uint8), "bad", product="plate")
    with pytest.raises(UsageError, match=r"several products \(another, plate\); name one \(--product\)"):
        round_of(trainer(learning, parts_folder, store.folder), tmp_path, "initial", "one")
    site = trainer(learning, parts_folder, store.folder, product="plate")
    site.write_initial_model(InitialTask(out=str(tmp_path / "initial")))
    assert round_of(site, tmp_path, "initial", "one").metrics["num_marked_bad"] == 12
    outcome = finish(site, tmp_path, "one")
    assert outcome.package is not None
    manifest = read_package(Path(outcome.package)).manifest
    assert manifest.product == "plate"
    assert manifest.provenance["statistics"]["head"]["marks_left_out"] == {
        "of another product than plate": 1,
        "pictures of another shape: another camera or region": 1,
    }


def test_a_site_that_marks_all_its_parts_bad_takes_no_part(
    learning: Learning, parts_folder: Path, tmp_path: Path
) -> None:
    store = MarkStore(tmp_path / "marks")
    for path in sorted((parts_folder / "train" / "good").iterdir()):
        store.add(f"bad-{path.stem}", read_image(path), "bad")
    site = trainer(learning, parts_folder, store.folder)
    site.write_initial_model(InitialTask(out=str(tmp_path / "initial")))
    with pytest.raises(DataError):
        round_of(site, tmp_path, "initial", "one")


def test_another_method_does_not_read_marks(
    small_learning: Learning, parts_folder: Path, tmp_path: Path, store: MarkStore, caplog: pytest.LogCaptureFixture
) -> None:
    learning = msgspec.structs.replace(small_learning, method="fedavg")
    site = trainer(learning, parts_folder, store.folder)
    site.write_initial_model(InitialTask(out=str(tmp_path / "initial")))
    assert round_of(site, tmp_path, "initial", "one").num_samples == 24
    assert "marks_not_used" in caplog.text
