"""FedDyMem at a site: metric, training, memory-reduce with its privacy floor, and whole rounds of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflame.errors import DataError, FederationError, NumericalError
from edgeflame.log import no_progress
from edgeflame.methods import Learning, Memory
from edgeflame.statistics.codec import decode_statistics
from edgeflame.statistics.memory import MemoryBank, MemoryStatistics, empty_bank, read_bank, write_bank
from fitting.imageset import ImageSet
from trainer.agent.tasks import FinishTask, InitialTask, TrainTask
from trainer.feddymem.learning import (
    PatchSample,
    SiteMemory,
    assign_patches,
    fit_metric,
    initial_memory,
    metric_loss,
    restore_memory,
    train_memory,
    update_entries,
)
from trainer.feddymem.metric import (
    MemoryGenerator,
    Whitening,
    combined_transform,
    comparable,
    fit_whitening,
    grouped,
    means_of_groups,
)
from trainer.feddymem.reduce import NO_FLOOR, EntryContents, PrivacyFloor, entry_contents, reduce_memory
from trainer.feddymem.spread import measured_of_fleet, measured_spreads, nearest_prototypes
from trainer.fit import fit
from trainer.work import STATISTICS_FILE, TorchSiteTrainer

CPU = torch.device("cpu")
C = 5
PLAIN = Whitening(centre=torch.zeros(C), matrix=torch.eye(C))


def patches_of(num_images: int = 8, each: int = 40, seed: int = 0) -> PatchSample:
    """Patches about six centres, each image its own mixture."""
    rng = np.random.default_rng(seed)
    centres = 4 * np.random.default_rng(99).normal(size=(6, C))
    kinds = rng.integers(0, 6, num_images * each)
    values = centres[kinds] + 0.3 * rng.normal(size=(len(kinds), C))
    return PatchSample(
        values=torch.from_numpy(values.astype(np.float32)),
        places=torch.from_numpy(rng.uniform(size=(len(kinds), 2)).astype(np.float32)),
        image_of=torch.arange(num_images).repeat_interleave(each),
        num_images=num_images,
    )


def learning_with(learning: Learning, **memory: object) -> Learning:
    small: dict[str, object] = {
        "entries": 24,
        "prototypes": 10,
        "global_prototypes": 8,
        "min_group": 6,
        "min_images": 2,
    }
    return msgspec.structs.replace(learning, method="feddymem", memory=Memory(**{**small, **memory}))  # type: ignore[arg-type]


def memory_of(values: torch.Tensor, places: torch.Tensor | None = None) -> SiteMemory:
    places = torch.full((len(values), 2), 0.5) if places is None else places
    return SiteMemory(entries=values, places=places, generator=MemoryGenerator(values.shape[1]))


def test_whitened_samples_have_the_identity_for_covariance_and_the_root_turns_nothing() -> None:
    samples = patches_of().values.numpy() @ np.diag([1, 2, 3, 4, 5]).astype(np.float32)
    nearest = np.random.default_rng(1).normal(size=samples.shape).astype(np.float32)
    for known in (None, nearest):
        whitening = fit_whitening(samples, known, ridge=1e-9, device=CPU)
        steps = samples - (samples.mean(axis=0) if known is None else known)
        white = steps.astype(np.float64) @ whitening.matrix.double().numpy()
        np.testing.assert_allclose(white.T @ white / len(white), np.eye(C), atol=1e-4)
        np.testing.assert_allclose(whitening.matrix, whitening.matrix.T, atol=1e-6)
    with pytest.raises(NumericalError, match="nothing varies"):
        fit_whitening(np.ones((4, C), dtype=np.float32), None, ridge=0.1, device=CPU)


def test_the_metric_is_of_what_patches_differ_by_from_their_nearest_and_not_from_one_another(
    small_learning: Learning,
) -> None:
    rng = np.random.default_rng(3)
    centres = np.concatenate([4 * np.eye(C), -4 * np.eye(C)])
    values = np.repeat(centres, 60, axis=0) + 0.3 * rng.normal(size=(600, C))
    patches = PatchSample(
        values=torch.from_numpy(values.astype(np.float32)),
        places=torch.full((600, 2), 0.5),
        image_of=torch.arange(600) % 8,
        num_images=8,
    )
    entries = memory_of(torch.from_numpy(centres.astype(np.float32)))
    metric = fit_metric(patches, entries, None, learning_with(small_learning, ridge=1e-6))
    np.testing.assert_allclose(metric.matrix, np.eye(C) / 0.3, atol=0.5)
    # Where every patch is an entry, nothing is left, and the covariance of all stands in.
    rough = fit_metric(patches, memory_of(patches.values), None, learning_with(small_learning))
    torch.testing.assert_close(rough.matrix, fit_whitening(patches.values.numpy(), None, ridge=0.1, device=CPU).matrix)


def test_a_step_in_place_counts_beside_the_embedding() -> None:
    metric = Whitening(centre=torch.zeros(C), matrix=torch.eye(C), place_scale=3.0)
    values, places = torch.zeros(2, C), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    points = comparable(metric, MemoryGenerator(C), values, places)
    assert float((points[0] - points[1]).square().sum()) == pytest.approx(18)


def test_a_new_generator_changes_nothing_and_both_make_one_matrix() -> None:
    generator = MemoryGenerator(C)
    rows = torch.randn(7, C, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generator(rows), rows)
    with torch.no_grad():
        generator.weight.copy_(torch.randn(C, C, generator=torch.Generator().manual_seed(1)))
    whitening = fit_whitening(patches_of().values.numpy(), None, ridge=0.1, device=CPU)
    expected = generator(whitening(rows)).detach().numpy()
    found = (rows - whitening.centre).numpy() @ combined_transform(whitening, generator).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_groups_are_of_what_lies_near_and_means_are_weighted() -> None:
    points = torch.tensor([[0.0], [0.2], [10.0], [10.4], [-10.0]])
    weights = torch.tensor([5.0, 1.0, 4.0, 1.0, 3.0], dtype=torch.float64)
    group = grouped(points, weights, 3)
    assert [int(one) for one in group] == [0, 0, 1, 1, 2]
    assert grouped(points, weights, 5).tolist() == [0, 1, 2, 3, 4]
    means = means_of_groups(points, group, 4, weights, empty=torch.full((4, 1), 7.0))
    torch.testing.assert_close(means[:, 0], torch.tensor([0.2 / 6, 10.08, -10.0, 7.0]))


def test_entries_move_towards_their_patches_and_others_stay() -> None:
    patches = PatchSample(
        values=torch.tensor([[1.0] * C, [3.0] * C]),
        places=torch.tensor([[0.0, 1.0], [0.5, 0.5]]),
        image_of=torch.tensor([0, 1]),
        num_images=2,
    )
    memory = memory_of(torch.tensor([[0.0] * C, [100.0] * C]), torch.tensor([[0.25, 0.25], [0.9, 0.9]]))
    moved = update_entries(memory, patches, PLAIN, rate=0.5)
    torch.testing.assert_close(moved.entries, torch.tensor([[1.0] * C, [100.0] * C]))
    torch.testing.assert_close(moved.places, torch.tensor([[0.25, 0.5], [0.9, 0.9]]))


def test_spreads_are_relative_to_the_mean_and_shrink_towards_what_is_known() -> None:
    # Ten patches at distance 1 of the first prototype, ten at distance 2 of the second; the third has none.
    values = torch.zeros(20, C)
    values[:10, 0], values[10:, 0] = 1.0, 12.0
    patches = PatchSample(values=values, places=torch.full((20, 2), 0.5), image_of=torch.arange(20) // 10, num_images=2)
    prototypes = np.zeros((3, C), dtype=np.float32)
    prototypes[1:, 0] = 10.0, 50.0
    places, prior = np.full((3, 2), 0.5, dtype=np.float32), np.array([1, 1, 0.7], dtype=np.float32)
    generator = MemoryGenerator(C)
    nearest = nearest_prototypes(patches, prototypes, places, PLAIN, generator)
    assert nearest.tolist() == [0] * 10 + [1] * 10
    spreads = measured_spreads(patches, prototypes, places, nearest, PLAIN, generator, prior=prior)
    known = 30
    expected = [(10 * 1 / 2.5 + known) / (10 + known), (10 * 4 / 2.5 + known) / (10 + known), 0.7]
    np.testing.assert_allclose(spreads, expected, rtol=1e-5)


def test_the_metric_loss_against_a_slow_reference() -> None:
    draw = torch.Generator().manual_seed(3)
    known, good = torch.randn(4, C, generator=draw), torch.randn(9, C, generator=draw)
    noised = good + torch.randn(9, C, generator=draw)
    generator = MemoryGenerator(C)
    with torch.no_grad():
        generator.weight.copy_(0.1 * torch.randn(C, C, generator=draw))
    no_place = {count: torch.zeros(count, 2) for count in (4, 9)}
    losses = metric_loss(generator, (known, no_place[4]), (good, no_place[9]), (noised, no_place[9]), margin=0.5)
    matrix = np.eye(C) + generator.weight.detach().double().numpy()

    def distance(row: torch.Tensor) -> float:
        steps = (row.double().numpy() - known.double().numpy()) @ matrix.T
        return float(np.sqrt(np.square(steps).sum(axis=1)).min() / np.sqrt(C))

    near, far = ([distance(row) for row in rows] for rows in (good, noised))
    violated = [max(0.0, 0.5 - f + n) for n, f in zip(near, far, strict=True)]
    assert losses["loss"].item() == pytest.approx(np.square(near).mean() + np.mean(violated), rel=1e-5)
    losses["loss"].backward()
    assert generator.weight.grad is not None
    assert torch.isfinite(generator.weight.grad).all()


def test_training_lowers_the_loss_and_repeats_itself(small_learning: Learning) -> None:
    learning = learning_with(small_learning)
    learning = msgspec.structs.replace(learning, training=msgspec.structs.replace(learning.training, epochs=6))
    patches = patches_of()
    start = initial_memory(patches, size=learning.memory.entries, seed=0)
    whitening = fit_metric(patches, start, None, learning)
    results = [train_memory(start, patches, None, whitening, learning, seed=5) for _ in range(2)]
    assert torch.equal(results[0][0].entries, results[1][0].entries)
    assert torch.equal(results[0][0].generator.weight, results[1][0].generator.weight)
    assert results[0][0].generator.weight.abs().max() > 0
    one = msgspec.structs.replace(learning, training=msgspec.structs.replace(learning.training, epochs=1))
    assert results[0][1]["loss"] < train_memory(start, patches, None, whitening, one, seed=5)[1]["loss"]
    # What was kept comes back, and other embeddings are told.
    kept = restore_memory(results[0][0].tensors(), C, CPU)
    assert kept is not None
    assert torch.equal(kept.generator.weight, results[0][0].generator.weight)
    assert torch.equal(kept.places, results[0][0].places)
    # Earlier versions kept no places.
    without = {name: tensor for name, tensor in results[0][0].tensors().items() if name != "places"}
    before = restore_memory(without, C, CPU)
    assert before is not None
    assert before.places.shape == (len(before.entries), 2)
    assert restore_memory({}, C, CPU) is None
    with pytest.raises(DataError, match="its backbone has 6"):
        restore_memory(results[0][0].tensors(), C + 1, CPU)


def reduced(contents: EntryContents, *, size: int, floor: PrivacyFloor, temperature: float = 1.0) -> MemoryBank:
    return reduce_memory(
        contents,
        PLAIN,
        MemoryGenerator(C),
        size=size,
        temperature=temperature,
        floor=floor,
        count=contents.counts.shape[1],
        space="a" * 64,
    ).bank


@settings(deadline=None, max_examples=40)
@given(
    num_images=st.integers(2, 9),
    each=st.integers(5, 30),
    size=st.integers(1, 12),
    floor=st.sampled_from([NO_FLOOR, PrivacyFloor(patches=8, images=2), PrivacyFloor(patches=30, images=3.5)]),
    seed=st.integers(0, 1000),
)
def test_nothing_below_the_floor_is_sent_and_everything_is_accounted_for(
    num_images: int, each: int, size: int, floor: PrivacyFloor, seed: int
) -> None:
    patches = patches_of(num_images, each, seed)
    memory = initial_memory(patches, size=20, seed=seed)
    contents = entry_contents(patches, assign_patches(patches, memory, PLAIN))
    assert contents.sizes.sum() == num_images * each
    if num_images * each < floor.patches or num_images < floor.images:
        with pytest.raises(DataError, match="the privacy floor allows nothing to be sent"):
            reduced(contents, size=size, floor=floor)
        return
    bank = reduced(contents, size=size, floor=floor)
    assert 1 <= len(bank) <= size
    assert bank.effective_patches.min() >= floor.patches * (1 - 1e-6)
    assert bank.effective_images.min() >= floor.images * (1 - 1e-6)
    assert bank.weights.sum() == pytest.approx(1, abs=1e-5)
    # No average is worth more than all there is.
    assert bank.effective_patches.max() <= num_images * each * (1 + 1e-6)
    assert bank.effective_images.max() <= num_images * (1 + 1e-6)
    # An average lies within what it averages.
    values = patches.values.numpy()
    assert (bank.prototypes <= values.max(axis=0) + 1e-4).all()
    assert (bank.prototypes >= values.min(axis=0) - 1e-4).all()


def test_the_effective_counts_are_those_of_the_patches_weights() -> None:
    # One group of two entries: 3 patches of two images, and 1 of a third; the second lies at distance^2 = 1.
    contents = EntryContents(
        means=np.array([[0.0] * C, [1.0] + [0.0] * (C - 1)], dtype=np.float32),
        places=np.array([[0.5, 0.5], [0.5, 0.5]], dtype=np.float32),
        counts=np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        rows=torch.tensor([0, 0, 0, 1]),
    )
    bank = reduced(contents, size=1, floor=NO_FLOOR, temperature=2.0)
    # The centre is at 1/4, so the squared distances are 1/16 and 9/16, and their mean 5/16.
    weights = np.array([1.0] * 3 + [np.exp(-(8 / 16) / (5 / 16 * 2.0))])
    weights /= weights.sum()
    by_image = np.array([weights[:2].sum(), weights[2], weights[3]])
    expected = (1 / np.square(weights).sum(), 1 / np.square(by_image).sum(), weights[3])
    found = (bank.effective_patches[0], bank.effective_images[0], bank.prototypes[0, 0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_rare_pattern_of_one_image_is_not_sent() -> None:
    common = patches_of(6, 40)
    odd = torch.full((40, C), 50.0)
    patches = PatchSample(
        values=torch.cat([common.values, odd]),
        places=torch.cat([common.places, torch.full((40, 2), 0.5)]),
        image_of=torch.cat([common.image_of, torch.full((40,), 6)]),
        num_images=7,
    )
    contents = entry_contents(patches, assign_patches(patches, initial_memory(patches, size=20, seed=0), PLAIN))
    nearest = {}
    for name, floor in (("open", NO_FLOOR), ("floor", PrivacyFloor(patches=8, images=2))):
        bank = reduced(contents, size=8, floor=floor, temperature=1.0)
        nearest[name] = float(np.abs(bank.prototypes - 50).max(axis=1).min())
    assert nearest["open"] < 1e-3, "without a floor the image's own pattern leaves the site"
    assert nearest["floor"] > 30, "with one, hardly a trace of it does"


def task(folder: Path, number: int, base: str, private: str | None, out: str) -> TrainTask:
    return TrainTask(
        round=number,
        base=str(folder / base),
        out=str(folder / out),
        seed=number,
        private=None if private is None else str(folder / private),
        private_out=str(folder / f"{out}.private"),
    )


@pytest.fixture(params=[0.0, 4.0], ids=["plain", "placed"])
def work(parts_folder: Path, small_learning: Learning, request: pytest.FixtureRequest) -> TorchSiteTrainer:
    learning = learning_with(small_learning, position_weight=request.param, measure_spreads=request.param > 0)
    return TorchSiteTrainer(learning=learning, data=parts_folder, site="west", device="cpu")


def test_two_rounds_and_the_sites_own_statistics(
    work: TorchSiteTrainer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    placed = "placed" in request.node.callspec.id
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    initial = read_bank(tmp_path / "base")
    assert len(initial) == 0
    outcome = work.train(task(tmp_path, 1, "base", None, "1"), no_progress)
    assert outcome.num_samples == 24
    sent = read_bank(tmp_path / "1")
    assert sent.space == initial.space
    assert 1 <= len(sent) <= 10
    assert sent.effective_patches.min() >= 6
    assert sent.effective_images.min() >= 2
    # Neither generator nor entries are in what is sent.
    assert set(safetensors.numpy.load_file(tmp_path / "1")) == {
        "prototypes", "weights", "effective_patches", "effective_images",
        *(("places", "spreads", "measured") if placed else ()),
    }  # fmt: skip
    if placed:
        assert sent.measured is not None
        assert len(sent.measured) == 0
    assert set(safetensors.numpy.load_file(tmp_path / "1.private")) == {"entries", "places", "generator"}
    # The same task gives the same files; what was kept matters.
    for out, private in (("2", "1.private"), ("3", "1.private"), ("4", None)):
        work.train(task(tmp_path, 2, "1", private, out), no_progress)
    assert (tmp_path / "2").read_bytes() == (tmp_path / "3").read_bytes()
    assert (tmp_path / "2.private").read_bytes() == (tmp_path / "3.private").read_bytes()
    assert (tmp_path / "2.private").read_bytes() != (tmp_path / "4.private").read_bytes()
    if placed:
        measured = read_bank(tmp_path / "2").measured
        assert measured is not None
        assert len(measured) == len(sent)
        assert (measured[:, 0] > 0).any()

    finish = FinishTask(
        model=str(tmp_path / "1"), out_dir=str(tmp_path), ledger={}, private=str(tmp_path / "2.private")
    )
    finished = work.finish(finish, no_progress)
    statistics = decode_statistics((tmp_path / STATISTICS_FILE).read_bytes())
    assert isinstance(statistics, MemoryStatistics)
    assert statistics.num_global == len(sent)
    np.testing.assert_array_equal(statistics.prototypes[-len(sent) :], sent.prototypes)
    assert (statistics.places is not None) == placed
    assert statistics.position_weight == (4.0 if placed else 0.0)
    assert finished.summary["threshold"] > 0  # type: ignore[operator]


def test_what_is_measured_of_the_fleet_is_of_all_patches_and_held_to_the_floor() -> None:
    rng = np.random.default_rng(0)
    centres = 100 * np.eye(3, dtype=np.float32)
    of = np.repeat([0, 1, 2], [40, 40, 3])
    images = np.concatenate([np.arange(40) % 8, np.zeros(40, int), np.arange(3)])
    scale = np.array([1.0, 2.0, 1.0])[of, None]
    patches = PatchSample(
        values=torch.from_numpy((centres[of] + scale * rng.normal(size=(83, 3))).astype(np.float32)),
        places=torch.full((83, 2), 0.5),
        image_of=torch.from_numpy(images),
        num_images=8,
    )
    fleet = MemoryBank(
        prototypes=centres,
        weights=np.full(3, 1 / 3, np.float32),
        effective_patches=np.full(3, 40, np.float32),
        effective_images=np.full(3, 4, np.float32),
        count=9,
        space="a" * 64,
        places=np.full((3, 2), 0.5, np.float32),
        spreads=np.ones(3, np.float32),
    )
    whitening = Whitening(centre=torch.zeros(3), matrix=torch.eye(3), place_scale=1.0)

    def measured(floor: PrivacyFloor) -> np.ndarray:
        return measured_of_fleet(patches, fleet, whitening, MemoryGenerator(3), floor)

    everything = measured(NO_FLOOR)
    assert everything[:, 0].tolist() == [40, 40, 3]
    squared = np.square(patches.values.numpy() - centres[of]).sum(axis=1)
    for index in range(3):
        assert everything[index, 1] == pytest.approx(squared[of == index].mean() / squared.mean(), rel=1e-4)
    # The second is of one image, the third of three patches.
    told = measured(PrivacyFloor(patches=8, images=2))
    assert told[0].tolist() == everything[0].tolist()
    assert told[1:].tolist() == [[0, 1], [0, 1]]
    assert measured_of_fleet(patches, empty_bank(3, "a" * 64), whitening, MemoryGenerator(3), NO_FLOOR).shape == (0, 2)


@pytest.mark.parametrize("work", [4.0], ids=["placed"], indirect=True)
def test_a_fleet_memory_without_places_is_used_without_them(work: TorchSiteTrainer, tmp_path: Path) -> None:
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    work.train(task(tmp_path, 1, "base", None, "1"), no_progress)
    sent = read_bank(tmp_path / "1")
    write_bank(tmp_path / "plain", replace(sent, places=None, spreads=None, measured=None))
    work.train(task(tmp_path, 2, "plain", "1.private", "2"), no_progress)
    assert read_bank(tmp_path / "2").places is None
    finish = FinishTask(
        model=str(tmp_path / "plain"), out_dir=str(tmp_path), ledger={}, private=str(tmp_path / "2.private")
    )
    work.finish(finish, no_progress)
    statistics = decode_statistics((tmp_path / STATISTICS_FILE).read_bytes())
    assert isinstance(statistics, MemoryStatistics)
    assert statistics.places is None


def test_a_memory_of_another_backbone_is_told_in_words(work: TorchSiteTrainer, tmp_path: Path) -> None:
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    channels = read_bank(tmp_path / "base").num_channels
    write_bank(tmp_path / "other", empty_bank(channels, "f" * 64))
    with pytest.raises(FederationError, match="need the same backbone weights"):
        work.train(task(tmp_path, 1, "other", None, "1"), no_progress)


def test_a_site_with_too_few_images_for_the_floor_is_told_in_words(
    parts_folder: Path, small_learning: Learning, tmp_path: Path
) -> None:
    learning = learning_with(small_learning, min_images=30)
    work = TorchSiteTrainer(learning=learning, data=parts_folder, site="west", device="cpu")
    work.write_initial_model(InitialTask(out=str(tmp_path / "base")))
    with pytest.raises(DataError, match="the privacy floor allows nothing to be sent"):
        work.train(task(tmp_path, 1, "base", None, "1"), no_progress)


@pytest.mark.parametrize("position_weight", [0.0, 4.0])
def test_one_site_alone_finds_the_holes(
    images: ImageSet, parts_folder: Path, small_learning: Learning, position_weight: float
) -> None:
    from edgeflame.dataset import open_dataset
    from fitting.crossfit import image_scores, score_maps
    from trainer.device import rgb_tensor
    from trainer.embedding import embed

    dataset = open_dataset(parts_folder)
    fitted = fit(dataset, learning_with(small_learning, position_weight=position_weight))
    assert isinstance(fitted.site.statistics, MemoryStatistics)
    assert fitted.site.statistics.num_global == 0
    test = ImageSet(dataset.test, small_learning.input)
    embeddings = embed(fitted.model.network, rgb_tensor(test.batch(range(len(test))), CPU))
    scores = image_scores(score_maps(fitted.site.statistics, embeddings, small_learning.scoring))
    defective = np.array([not record.is_good for record in test.records])
    assert scores[defective].min() > np.median(scores[~defective])
    assert np.median(scores[defective]) > fitted.site.threshold.value
