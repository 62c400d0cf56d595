"""FADE's and FLAME's losses, against references written out in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.model import Discriminator
from trainer.objectives.fade import add_noise, fade_loss
from trainer.objectives.flame import distillation_loss, kl_divergence

F64 = npt.NDArray[np.float64]


def test_fade_loss_by_hand() -> None:
    good = torch.tensor([[[[0.9, 0.2]]], [[[-0.3, 0.5]]]])
    noisy = torch.tensor([[[[-0.9, -0.1]]], [[[0.4, -0.5]]]])
    by_hand = (0 + 0.3 + 0.8 + 0) / 4 + (0 + 0.4 + 0.9 + 0) / 4
    assert fade_loss(good, noisy, 0.5).item() == pytest.approx(by_hand)


def test_fade_pushes_good_up_and_noisy_down() -> None:
    good = torch.zeros(1, 1, 2, 2, requires_grad=True)
    noisy = torch.zeros(1, 1, 2, 2, requires_grad=True)
    fade_loss(good, noisy, 0.5).backward()
    assert good.grad is not None
    assert noisy.grad is not None
    assert (good.grad < 0).all()
    assert (noisy.grad > 0).all()


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_noise_has_the_deviation_asked_for(scale: str) -> None:
    channel_std = torch.tensor([0.1, 1.0, 10.0]).reshape(1, 3, 1, 1)
    embeddings = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * channel_std
    generator = torch.Generator().manual_seed(2)
    noise = add_noise(embeddings, std=0.3, scale=scale, generator=generator) - embeddings  # type: ignore[arg-type]
    expected = 0.3 * channel_std.flatten() if scale == "relative" else torch.full((3,), 0.3)
    torch.testing.assert_close(noise.std(dim=(0, 2, 3)), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(noise.mean(dim=(0, 2, 3)) / expected, torch.zeros(3), rtol=0, atol=0.03)


def test_noise_is_the_same_for_a_seed_in_any_memory_layout() -> None:
    embeddings = torch.randn(2, 5, 4, 4)
    draws = [
        add_noise(layout, std=0.3, scale="absolute", generator=torch.Generator().manual_seed(7))
        for layout in (embeddings, embeddings.contiguous(memory_format=torch.channels_last))
    ]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)


def test_the_discriminator_scores_each_patch_by_itself() -> None:
    discriminator = Discriminator(6).eval()
    embeddings = torch.randn(2, 6, 3, 3)
    scores = discriminator(embeddings)
    assert scores.shape == (2, 1, 3, 3)
    changed = embeddings.clone()
    changed[0, :, 1, 1] += 1
    differs = discriminator(changed) != scores
    assert differs.sum() == 1
    assert differs[0, 0, 1, 1]


def softmax(values: F64) -> F64:
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def slow_kl(a: F64, b: F64) -> float:
    return sum(float(x * (math.log(x) - math.log(y))) for x, y in zip(a, b, strict=True))


def slow_distillation(local: F64, glob: F64, hist: F64, temperature: float) -> float:
    """Eq. 20 as printed, patch by patch."""
    terms = []
    for image in range(local.shape[0]):
        for y in range(local.shape[2]):
            for x in range(local.shape[3]):
                p, g, h = (softmax(one[image, :, y, x]) for one in (local, glob, hist))
                away, towards = math.exp(slow_kl(p, h) / temperature), math.exp(slow_kl(p, g) / temperature)
                terms.append(-math.log(away / (towards + away)))
    return float(np.mean(terms))


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.1, 0.5, 2.0]))
@settings(max_examples=15, deadline=None)
def test_distillation_is_equation_20(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    local, glob, hist = (rng.normal(size=(2, 5, 3, 2)) * 2 for _ in range(3))
    fast = distillation_loss(
        torch.from_numpy(local),
        torch.log_softmax(torch.from_numpy(glob), dim=1),
        torch.log_softmax(torch.from_numpy(hist), dim=1),
        temperature,
    )
    assert fast.item() == pytest.approx(slow_distillation(local, glob, hist, temperature), rel=1e-9)


def test_kl_takes_its_arguments_in_the_order_of_its_name() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    log_p, log_q = (one.log().reshape(1, 3, 1, 1) for one in (p, q))
    expected = (p * (p / q).log()).sum().item()
    assert kl_divergence(log_p, log_q).item() == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(log_q, log_p).item() != pytest.approx(expected, rel=0.01)


def test_distillation_pulls_to_global_and_away_from_history() -> None:
    glob = torch.tensor([3.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    hist = torch.tensor([0.0, 3.0, 0.0]).reshape(1, 3, 1, 1)
    local = torch.full((1, 3, 1, 1), 0.5, requires_grad=True)
    distillation_loss(local, glob.log_softmax(1), hist.log_softmax(1), 0.5).backward()
    assert local.grad is not None
    assert local.grad[0, 0] < 0  # descending raises the channel that the global model has
    assert local.grad[0, 1] > 0


def test_with_local_equal_to_global_the_loss_is_no_constant() -> None:
    """It is log(1 + exp(-KL(loc || hist) / tau)), where the paper says it becomes FedAvg."""
    local = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    log_p = local.log_softmax(1)
    for strength in (0.1, 1.0, 3.0):
        history = (strength * torch.randn(1, 4, 2, 2, dtype=torch.float64)).log_softmax(1)
        expected = torch.log1p(torch.exp(-kl_divergence(log_p, history) / 0.5)).mean().item()
        assert distillation_loss(local, log_p, history, 0.5).item() == pytest.approx(expected, rel=1e-9)


def test_extreme_embeddings_stay_finite() -> None:
    local = torch.tensor([500.0, -500.0, 0.0]).reshape(1, 3, 1, 1).requires_grad_()
    other = torch.tensor([-500.0, 500.0, 0.0]).reshape(1, 3, 1, 1).log_softmax(1)
    for towards, away in ((other, local.detach().log_softmax(1)), (local.detach().log_softmax(1), other)):
        loss = distillation_loss(local, towards, away, 0.01)
        loss.backward()
        assert torch.isfinite(loss)
        assert local.grad is not None
        assert torch.isfinite(local.grad).all()
