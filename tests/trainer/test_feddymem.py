"""FedDyMem at a site: metric, training, memory-reduce with its privacy floor, and whole rounds of files."""

from __future__ import annotations

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
    MemoryGenerator,
    PatchSample,
    Whitening,
    assign_patches,
    combined_transform,
    fit_metric,
    fit_whitening,
    greedy_k_centre,
    initial_memory,
    metric_loss,
    restore_memory,
    train_memory,
    update_entries,
)
from trainer.feddymem.reduce import NO_FLOOR, EntryContents, PrivacyFloor, entry_contents, reduce_memory
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


def test_whitened_samples_have_the_identity_for_covariance_and_the_root_turns_nothing() -> None:
    samples = patches_of().values.numpy() @ np.diag([1, 2, 3, 4, 5]).astype(np.float32)
    weights = np.random.default_rng(1).uniform(0.5, 1, len(samples)).astype(np.float32)
    whitening = fit_whitening(samples, weights, ridge=1e-9, device=CPU)
    white = whitening(torch.from_numpy(samples)).double().numpy()
    np.testing.assert_allclose(np.cov(white.T, aweights=weights, ddof=0), np.eye(C), atol=1e-4)
    np.testing.assert_allclose(whitening.matrix, whitening.matrix.T, atol=1e-6)
    with pytest.raises(NumericalError, match="nothing varies"):
        fit_whitening(np.ones((4, C), dtype=np.float32), None, ridge=0.1, device=CPU)


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


def test_k_centre_spreads_and_takes_no_point_twice() -> None:
    points = torch.tensor([[0.0], [0.1], [10.0], [10.0], [-10.0]])
    chosen = greedy_k_centre(points, 3)
    # The mean is 2.02, so the first is -10; the farthest from it 10; then 0 or 0.1, whichever is farther from both.
    assert points[chosen, 0].tolist() == pytest.approx([-10.0, 10.0, 0.0])
    assert len(greedy_k_centre(points, 5)) == 4, "two points are the same"


def test_entries_move_towards_their_patches_and_others_stay() -> None:
    patches = PatchSample(values=torch.tensor([[1.0] * C, [3.0] * C]), image_of=torch.tensor([0, 1]), num_images=2)
    entries = torch.tensor([[0.0] * C, [100.0] * C])
    moved = update_entries(entries, patches, PLAIN, MemoryGenerator(C), rate=0.5)
    torch.testing.assert_close(moved, torch.tensor([[1.0] * C, [100.0] * C]))


def test_the_metric_loss_against_a_slow_reference() -> None:
    draw = torch.Generator().manual_seed(3)
    known, good = torch.randn(4, C, generator=draw), torch.randn(9, C, generator=draw)
    noised = good + torch.randn(9, C, generator=draw)
    generator = MemoryGenerator(C)
    with torch.no_grad():
        generator.weight.copy_(0.1 * torch.randn(C, C, generator=draw))
    losses = metric_loss(generator, known, good, noised, margin=0.5)
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
    whitening = fit_metric(patches, None, learning)
    start = initial_memory(patches, whitening, learning, seed=0)
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
    )


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
    entries = patches.values[greedy_k_centre(patches.values, 20)]
    entry_of = assign_patches(patches, entries, PLAIN, MemoryGenerator(C))
    contents = entry_contents(patches.values, patches.image_of, entry_of, num_images)
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
        counts=np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    )
    bank = reduced(contents, size=1, floor=NO_FLOOR, temperature=2.0)
    # The seed is the entry farther from the mean, the first by index here; the mean of d^2 over entries is 1/2.
    near, far = 1.0, np.exp(-1 / (0.5 * 2.0))
    for first, second in ((near, far), (far, near)):
        weights = np.array([first] * 3 + [second])
        weights /= weights.sum()
        by_image = np.array([weights[:2].sum(), weights[2], weights[3]])
        expected = (1 / np.square(weights).sum(), 1 / np.square(by_image).sum(), weights[3])
        found = (bank.effective_patches[0], bank.effective_images[0], bank.prototypes[0, 0])
        if np.allclose(found, expected, rtol=1e-5):
            return
    pytest.fail(f"neither entry's weights give {found}")


def test_a_rare_pattern_of_one_image_is_not_sent() -> None:
    common = patches_of(6, 40)
    odd = torch.full((40, C), 50.0)
    patches = PatchSample(
        values=torch.cat([common.values, odd]),
        image_of=torch.cat([common.image_of, torch.full((40,), 6)]),
        num_images=7,
    )
    entries = patches.values[greedy_k_centre(patches.values, 20)]
    entry_of = assign_patches(patches, entries, PLAIN, MemoryGenerator(C))
    contents = entry_contents(patches.values, patches.image_of, entry_of, 7)
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


@pytest.fixture
def work(parts_folder: Path, small_learning: Learning, tmp_path: Path) -> TorchSiteTrainer:
    learning = learning_with(small_learning)
    return TorchSiteTrainer(learning=learning, data=parts_folder, site="west", device="cpu")


def test_two_rounds_and_the_sites_own_statistics(work: TorchSiteTrainer, tmp_path: Path) -> None:
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
    }  # fmt: skip
    assert set(safetensors.numpy.load_file(tmp_path / "1.private")) == {"entries", "generator"}
    # The same task gives the same files; what was kept matters.
    for out, private in (("2", "1.private"), ("3", "1.private"), ("4", None)):
        work.train(task(tmp_path, 2, "1", private, out), no_progress)
    assert (tmp_path / "2").read_bytes() == (tmp_path / "3").read_bytes()
    assert (tmp_path / "2.private").read_bytes() == (tmp_path / "3.private").read_bytes()
    assert (tmp_path / "2.private").read_bytes() != (tmp_path / "4.private").read_bytes()

    finish = FinishTask(
        model=str(tmp_path / "1"), out_dir=str(tmp_path), ledger={}, private=str(tmp_path / "2.private")
    )
    finished = work.finish(finish, no_progress)
    statistics = decode_statistics((tmp_path / STATISTICS_FILE).read_bytes())
    assert isinstance(statistics, MemoryStatistics)
    assert statistics.num_global == len(sent)
    np.testing.assert_array_equal(statistics.prototypes[-len(sent) :], sent.prototypes)
    assert finished.summary["threshold"] > 0  # type: ignore[operator]


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


def test_one_site_alone_finds_the_holes(images: ImageSet, parts_folder: Path, small_learning: Learning) -> None:
    from edgeflame.dataset import open_dataset
    from fitting.crossfit import image_scores, score_maps
    from trainer.device import rgb_tensor
    from trainer.embedding import embed

    dataset = open_dataset(parts_folder)
    fitted = fit(dataset, learning_with(small_learning))
    assert isinstance(fitted.site.statistics, MemoryStatistics)
    assert fitted.site.statistics.num_global == 0
    test = ImageSet(dataset.test, small_learning.input)
    embeddings = embed(fitted.model.network, rgb_tensor(test.batch(range(len(test))), CPU))
    scores = image_scores(score_maps(fitted.site.statistics, embeddings, small_learning.scoring))
    defective = np.array([not record.is_good for record in test.records])
    assert scores[defective].min() > np.median(scores[~defective])
    assert np.median(scores[defective]) > fitted.site.threshold.value
