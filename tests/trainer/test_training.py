"""The training loop: determinism, a golden curve, frozen batch norm, cached teachers."""

from __future__ import annotations

import copy

import msgspec
import pytest
import torch

from edgeflame.errors import NumericalError
from edgeflame.methods import Learning, Training
from fitting.imageset import ImageSet
from trainer.device import reproducible, rgb_tensor, without_tf32
from trainer.model import SiteModel, build_model
from trainer.objectives.flame import log_probabilities
from trainer.objectives.interface import Teacher
from trainer.training import TrainingRun, train

CPU = torch.device("cpu")


def with_method(learning: Learning, method: str, **training: object) -> Learning:
    return msgspec.structs.replace(
        learning, method=method, training=msgspec.structs.replace(learning.training, **training)
    )


def run(learning: Learning, images: ImageSet, seed: int = 3, **teachers: object) -> tuple[SiteModel, TrainingRun]:
    model, _ = build_model(learning)
    return model, train(model, images, learning, seed=seed, **teachers)  # type: ignore[arg-type]


def teachers_of(learning: Learning) -> dict[str, object]:
    """Two networks that differ from the one in training."""
    networks = []
    for seed in (11, 12):
        network = build_model(msgspec.structs.replace(learning, seed=seed))[0].backbone
        networks.append(network)
    return {"global_network": networks[0], "historical_network": networks[1]}


def test_a_short_training_follows_its_golden_curve(small_learning: Learning, images: ImageSet) -> None:
    """Recorded with torch 2.15 on x86-64; a change of the loss, the noise or the order shows here."""
    _, training = run(
        with_method(small_learning, "fade", epochs=3, learning_rate=0.03, discriminator_learning_rate=0.03), images
    )
    losses = [epoch["loss"] for epoch in training.epochs]
    assert losses == pytest.approx(GOLDEN_FADE, rel=1e-3)


GOLDEN_FADE = [0.98831, 0.95968, 0.93209]


def test_the_same_seed_gives_the_same_weights(small_learning: Learning, images: ImageSet) -> None:
    learning = with_method(small_learning, "fade", epochs=1)
    first, second, other = (run(learning, images, seed)[0].exchanged() for seed in (3, 3, 4))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_the_backbone_learns_and_its_batch_norm_statistics_stay(small_learning: Learning, images: ImageSet) -> None:
    learning = with_method(small_learning, "fade", epochs=1)
    before = build_model(learning)[0].exchanged()
    after = run(learning, images)[0].exchanged()
    for name, tensor in after.items():
        if name.startswith("backbone.") and "running_" in name:
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(after["backbone.network.conv_stem.weight"], before["backbone.network.conv_stem.weight"])
    assert not torch.equal(after["discriminator.hidden.weight"], before["discriminator.hidden.weight"])


def test_training_does_not_touch_the_global_random_state(small_learning: Learning, images: ImageSet) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(with_method(small_learning, "fade", epochs=1), images)
    assert torch.equal(torch.rand(3), expected)


def test_a_first_round_without_history_is_fade(small_learning: Learning, images: ImageSet) -> None:
    fade = run(with_method(small_learning, "fedavg"), images)[1]
    flame = run(with_method(small_learning, "flame"), images)[1]
    assert flame.epochs == fade.epochs
    assert flame.num_teacher_forward == 0


def test_flame_adds_mu_times_the_distillation(small_learning: Learning, images: ImageSet) -> None:
    learning = with_method(small_learning, "flame", epochs=1, distillation_weight=0.7)
    epoch = run(learning, images, **teachers_of(learning))[1].epochs[0]
    assert epoch["loss"] == pytest.approx(epoch["fade"] + 0.7 * epoch["distillation"], rel=1e-5)
    assert epoch["distillation"] > 0


def test_cached_teachers_teach_the_same_and_save_passes(
    small_learning: Learning, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = with_method(small_learning, "flame", epochs=3)
    cached = run(learning, images, **teachers_of(learning))[1]
    monkeypatch.setitem(Teacher.__init__.__kwdefaults__, "max_cache_bytes", 0)
    uncached = run(learning, images, **teachers_of(learning))[1]
    for one, other in zip(cached.epochs, uncached.epochs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert cached.num_teacher_forward == 2 * len(images)
    assert uncached.num_teacher_forward == 3 * 2 * len(images)
    # (E + 2) / 3E of all passes remain.
    total = cached.num_forward + cached.num_teacher_forward
    assert total / (uncached.num_forward + uncached.num_teacher_forward) == pytest.approx(5 / 9)


def test_a_teachers_cache_is_bounded_and_changes_nothing(small_learning: Learning, images: ImageSet) -> None:
    network = build_model(small_learning)[0].backbone
    one_image = network.grid[0] * network.grid[1] * network.num_channels * 4
    small, none = (Teacher(network, log_probabilities, max_cache_bytes=room) for room in (3 * one_image, 0))
    for indices in ([0, 1, 2, 3], [3, 2, 1, 0], [5, 1]):
        rgb = rgb_tensor(images.batch(indices), CPU)
        torch.testing.assert_close(small.answers(indices, rgb), none.answers(indices, rgb), rtol=1e-4, atol=1e-4)
    assert small.num_forward == 4 + 1 + 1
    assert none.num_forward == 10


def test_teachers_are_not_trained(small_learning: Learning, images: ImageSet) -> None:
    learning = with_method(small_learning, "flame", epochs=1)
    teachers = teachers_of(learning)
    before = copy.deepcopy(teachers)
    run(learning, images, **teachers)
    for name, network in teachers.items():
        for key, tensor in network.state_dict().items():  # type: ignore[attr-defined]
            assert torch.equal(tensor, before[name].state_dict()[key])  # type: ignore[attr-defined]


def test_a_loss_that_is_no_number_stops_the_training(small_learning: Learning, images: ImageSet) -> None:
    learning = with_method(small_learning, "fade")
    model, _ = build_model(learning)
    with torch.no_grad():
        model.discriminator.score.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="learning_rate"):
        train(model, images, learning, seed=0)


def test_progress_counts_images_over_epochs(small_learning: Learning, images: ImageSet) -> None:
    learning = with_method(small_learning, "fade")
    seen: list[tuple[int, int]] = []
    model, _ = build_model(learning)
    train(model, images, learning, seed=0, progress=lambda done, total, note="": seen.append((done, total)))
    assert seen[-1] == (2 * len(images), 2 * len(images))
    assert seen == sorted(seen)


def test_no_epochs_change_nothing(small_learning: Learning, images: ImageSet) -> None:
    learning = msgspec.structs.replace(small_learning, method="fade", training=Training(epochs=0))
    model, training = run(learning, images)
    assert training.epochs == ()
    for name, tensor in build_model(learning)[0].exchanged().items():
        assert torch.equal(tensor, model.exchanged()[name])


def test_the_discriminator_may_learn_at_a_rate_of_its_own(small_learning: Learning, images: ImageSet) -> None:
    before = build_model(small_learning)[0].exchanged()
    moved = {}
    for rate in (1e-12, 0.1):
        learning = with_method(
            small_learning, "fade", epochs=1, learning_rate=1e-12, discriminator_learning_rate=rate, weight_decay=0.0
        )
        after = run(learning, images)[0].exchanged()
        moved[rate] = (after["discriminator.hidden.weight"] - before["discriminator.hidden.weight"]).norm().item()
        name = "backbone.network.conv_stem.weight"
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    assert moved[1e-12] < 1e-6
    assert moved[0.1] > 1e-3


def test_learnt_batch_norm_statistics_move(small_learning: Learning, images: ImageSet) -> None:
    learning = with_method(small_learning, "fade", epochs=1, batch_norm="average")
    before = build_model(learning)[0].exchanged()
    after = run(learning, images)[0].exchanged()
    moved = [
        name
        for name in after
        if name.startswith("backbone.") and "running_" in name and not torch.equal(after[name], before[name])
    ]
    assert len(moved) == sum(name.startswith("backbone.") and "running_" in name for name in after)


def test_mixed_precision_learns_nearly_the_same(small_learning: Learning, images: ImageSet) -> None:
    """bfloat16 has 8 bits of mantissa; losses, gradients and weights are float32 all the same."""
    losses = {}
    for precision in ("float32", "bfloat16", "auto"):
        learning = with_method(small_learning, "flame", precision=precision)
        model, training = run(learning, images, **teachers_of(learning))
        losses[precision] = [value for epoch in training.epochs for value in (epoch["loss"], epoch["distillation"])]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    assert losses["auto"] == losses["float32"]  # on a CPU


def test_a_gpus_regions_leave_torch_as_they_found_it() -> None:
    """They only set switches, so they can be entered where there is no GPU."""
    gpu = torch.device("cuda")
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic)
    with reproducible(gpu):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
    tf32 = torch.backends.cudnn.allow_tf32
    with without_tf32(gpu):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before
    with reproducible(CPU), without_tf32(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
