"""Local objectives and server rules against slow, independent references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from aggregator.config import AggregateConfig
from aggregator.run import aggregate_updates
from aggregator.strategies.interface import Contribution
from edgeflame.methods import CONTROL_PREFIX, Learning, Training, accumulated_steps
from fitting.imageset import ImageSet
from trainer.device import rgb_tensor
from trainer.model import SiteModel, build_model
from trainer.objectives import OBJECTIVES
from trainer.objectives.interface import ObjectiveContext, TrainingBatch
from trainer.objectives.moon import contrastive_loss
from trainer.objectives.scaffold import ControlVariates
from trainer.training import train

CPU = torch.device("cpu")
F64 = np.ndarray


def sgd_gradient_weights(num_steps: int, momentum: float) -> list[float]:
    """How far each step's gradient has moved the weights in the end, by carrying SGD's momentum out."""
    weights = []
    for step in range(num_steps):
        velocity = moved = 0.0
        for later in range(num_steps):
            velocity = momentum * velocity + (1.0 if later == step else 0.0)
            moved += velocity
        weights.append(moved)
    return weights


@pytest.mark.parametrize("momentum", [0.0, 0.09, 0.9])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_accumulated_steps_are_the_sum_of_what_gradients_do(num_steps: int, momentum: float) -> None:
    assert accumulated_steps(num_steps, momentum) == pytest.approx(sum(sgd_gradient_weights(num_steps, momentum)))


def objective_gradients(
    name: str, model: SiteModel, images: ImageSet, moved: float, training: Training
) -> list[Tensor]:
    """Gradients of an objective whose training started at ``model``, after its weights have moved."""
    setting = ObjectiveContext(model=model, training=training, generator=torch.Generator().manual_seed(0))
    model.requires_grad_(True)
    objective = OBJECTIVES[name](setting)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    model.zero_grad()
    rgb = rgb_tensor(images.batch(range(4)), CPU)
    losses = objective.losses(TrainingBatch(indices=range(4), rgb=rgb, embeddings=model.backbone(rgb)))
    losses["loss"].backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_fedprox_adds_mu_times_the_distance_to_the_gradient_once(small_learning: Learning, images: ImageSet) -> None:
    learning = msgspec.structs.replace(small_learning, method="fedprox")
    training = msgspec.structs.replace(learning.training, proximal_weight=0.3)
    start = [parameter.clone() for parameter in build_model(learning)[0].parameters()]
    plain_model, model = (build_model(learning)[0].eval() for _ in range(2))
    plain = objective_gradients("fade", plain_model, images, 0.01, training)
    proximal = objective_gradients("fedprox", model, images, 0.01, training)
    assert len(plain) == len(start)
    for gradient, with_term, parameter, then in zip(plain, proximal, model.parameters(), start, strict=True):
        expected = gradient + 0.3 * (parameter.detach() - then)
        torch.testing.assert_close(with_term, expected, rtol=1e-4, atol=1e-6)


def test_fedprox_stays_nearer_to_the_global_model(small_learning: Learning, images: ImageSet) -> None:
    distances = []
    for weight in (0.0, 300.0):
        learning = msgspec.structs.replace(
            small_learning,
            method="fedprox",
            training=msgspec.structs.replace(small_learning.training, proximal_weight=weight, weight_decay=0.0),
        )
        model, _ = build_model(learning)
        start = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
        epoch = train(model, images, learning, seed=1).epochs[-1]
        end = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        distances.append(float((end - start).norm()))
        assert epoch["loss"] == pytest.approx(epoch["fade"] + weight / 2 * epoch["distance_squared"], rel=1e-4)
    assert distances[1] < 0.7 * distances[0]


def test_moons_loss_by_its_formula() -> None:
    generator = np.random.default_rng(0)
    local, positive, negative = generator.normal(size=(3, 5, 7))
    tau = 0.3

    def cosine(a: F64, b: F64) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    expected = np.mean(
        [
            -np.log(np.exp(cosine(a, b) / tau) / (np.exp(cosine(a, b) / tau) + np.exp(cosine(a, c) / tau)))
            for a, b, c in zip(local, positive, negative, strict=True)
        ]
    )
    loss = contrastive_loss(*(torch.from_numpy(x) for x in (local, positive, negative)), tau)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_moon_asks_its_teachers_once_per_image(small_learning: Learning, images: ImageSet) -> None:
    learning = msgspec.structs.replace(small_learning, method="moon")
    model, _ = build_model(learning)
    teachers = [build_model(msgspec.structs.replace(learning, seed=seed))[0].backbone for seed in (5, 6)]
    run = train(model, images, learning, seed=1, global_network=teachers[0], historical_network=teachers[1])
    assert run.num_teacher_forward == 2 * len(images)
    epoch = run.epochs[0]
    assert epoch["loss"] == pytest.approx(epoch["fade"] + epoch["contrast"], rel=1e-5)
    assert epoch["contrast"] > 0


def federated(method: str, momentum: float = 0.0) -> AggregateConfig:
    return AggregateConfig(learning=Learning(method=method, training=Training(momentum=momentum)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_is_the_normalised_average(tmp_path: Path, momentum: float) -> None:
    generator = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (5,), "n.running_var": (5,)}
    models = {who: {k: generator.normal(size=s) for k, s in shapes.items()} for who in ("base", "a", "b", "c")}
    for who, tensors in models.items():
        safetensors.numpy.save_file(tensors, tmp_path / who)
    steps, weights = {"a": 3, "b": 20, "c": 7}, {"a": 0.2, "b": 0.5, "c": 0.3}
    contributions = [
        Contribution(site=s, path=tmp_path / s, weight=weights[s], num_steps=steps[s], num_samples=9) for s in "cab"
    ]
    aggregate_updates(federated("fednova", momentum), tmp_path / "base", contributions, tmp_path / "out", num_members=3)
    merged = safetensors.numpy.load_file(tmp_path / "out")

    tau = {site: sum(sgd_gradient_weights(steps[site], momentum)) for site in steps}
    for name, shape in shapes.items():
        expected = np.zeros(shape)
        for index in np.ndindex(shape):
            base = models["base"][name][index]
            if "running" in name:
                expected[index] = sum(weights[s] * models[s][name][index] for s in steps)
                continue
            direction = 0.0
            for site in steps:
                direction += weights[site] * (base - models[site][name][index]) / tau[site]
            effective = sum(weights[site] * tau[site] for site in steps)
            expected[index] = base - effective * direction
        np.testing.assert_allclose(merged[name], expected, rtol=1e-12)


def test_fednova_of_equal_steps_is_fedavg(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for who in ("base", "a", "b"):
        safetensors.numpy.save_file({"w": generator.normal(size=(9,))}, tmp_path / who)
    contributions = [
        Contribution(site=s, path=tmp_path / s, weight=w, num_steps=5) for s, w in (("a", 0.25), ("b", 0.75))
    ]
    results = []
    for method in ("fednova", "fedavg"):
        aggregate_updates(federated(method), tmp_path / "base", contributions, tmp_path / method, num_members=2)
        results.append(safetensors.numpy.load_file(tmp_path / method)["w"])
    np.testing.assert_allclose(*results, rtol=1e-12)


class Quadratics:
    """Two sites with ``F_i(x) = (x - t_i)' A_i (x - t_i) / 2``, of different curvature: where FedAvg drifts."""

    weights: ClassVar = {"a": 0.3, "b": 0.7}
    rate, num_steps, num_rounds = 0.05, 10, 150

    def __init__(self) -> None:
        generator = np.random.default_rng(3)
        self.curvature, self.target = {}, {}
        for site, scale in (("a", 0.5), ("b", 5.0)):
            factor = generator.normal(size=(3, 3))
            self.curvature[site] = scale * (factor @ factor.T / 3 + 0.2 * np.eye(3))
            self.target[site] = generator.normal(size=3) * 3

    def gradient(self, site: str, x: F64) -> F64:
        return self.curvature[site] @ (x - self.target[site])

    def optimum(self) -> F64:
        """Of the pooled function."""
        total = sum(self.weights[s] * self.curvature[s] for s in self.weights)
        return np.linalg.solve(total, sum(self.weights[s] * self.curvature[s] @ self.target[s] for s in self.weights))

    def textbook_scaffold(self, num_rounds: int) -> F64:
        """Algorithm 1 with option II, plain SGD, all sites in every round, sites weighted."""
        x, c = np.zeros(3), np.zeros(3)
        own = {site: np.zeros(3) for site in self.weights}
        for _ in range(num_rounds):
            change_x, change_c = np.zeros(3), np.zeros(3)
            for site, weight in self.weights.items():
                y = x.copy()
                for _ in range(self.num_steps):
                    y -= self.rate * (self.gradient(site, y) - own[site] + c)
                new = own[site] - c + (x - y) / (self.num_steps * self.rate)
                change_x += weight * (y - x)
                change_c += weight * (new - own[site])
                own[site] = new
            x, c = x + change_x, c + change_c
        return x

    def federate(self, folder: Path, method: str, num_rounds: int, momentum: float = 0.0) -> F64:
        """Our site and server code: torch's SGD, control variates from files, the server's merge."""
        name = CONTROL_PREFIX + "x"
        base = folder / "base"
        safetensors.numpy.save_file({"x": np.zeros(3), **({name: np.zeros(3)} if method == "scaffold" else {})}, base)
        private: dict[str, dict[str, Tensor]] = {site: {} for site in self.weights}
        for _ in range(num_rounds):
            tensors = {key: torch.from_numpy(value) for key, value in safetensors.numpy.load_file(base).items()}
            for site in self.weights:
                x = tensors["x"].clone().requires_grad_()
                optimiser = torch.optim.SGD([x], lr=self.rate, momentum=momentum)
                correct: Callable[[], None] = lambda: None  # noqa: E731
                if method == "scaffold":
                    variates = ControlVariates(
                        {"x": x},
                        shared=tensors,
                        own=private[site],
                        learning_rate=lambda _: self.rate,
                        momentum=momentum,
                    )
                    correct = variates.correct_gradients
                for _ in range(self.num_steps):
                    x.grad = torch.from_numpy(self.gradient(site, x.detach().numpy()))
                    correct()
                    optimiser.step()
                update = {"x": x.detach().numpy()}
                if method == "scaffold":
                    ending = variates.finish(self.num_steps)
                    private[site] = dict(ending.private)
                    update |= {key: value.numpy() for key, value in ending.extra_tensors.items()}
                safetensors.numpy.save_file(update, folder / site)
            contributions = [
                Contribution(site=s, path=folder / s, weight=w, num_steps=self.num_steps)
                for s, w in self.weights.items()
            ]
            aggregate_updates(federated(method, momentum), base, contributions, folder / "next", num_members=2)
            (folder / "next").replace(base)
        return safetensors.numpy.load_file(base)["x"]


def test_scaffold_follows_the_textbook(tmp_path: Path) -> None:
    toy = Quadratics()
    np.testing.assert_allclose(toy.federate(tmp_path, "scaffold", 12), toy.textbook_scaffold(12), rtol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scaffold_reaches_the_pooled_optimum_where_fedavg_drifts(tmp_path: Path, momentum: float) -> None:
    toy = Quadratics()
    optimum = toy.optimum()
    drift = np.abs(toy.federate(tmp_path, "fedavg", toy.num_rounds, momentum) - optimum).max()
    corrected = np.abs(toy.federate(tmp_path, "scaffold", toy.num_rounds, momentum) - optimum).max()
    assert drift > 0.1
    assert corrected < 1e-3


def test_scaffolds_variate_moves_by_the_share_of_sites_that_took_part(tmp_path: Path) -> None:
    name = CONTROL_PREFIX + "x"
    safetensors.numpy.save_file({"x": np.ones(2), name: np.full(2, 4.0)}, tmp_path / "base")
    safetensors.numpy.save_file({"x": np.full(2, 3.0), name: np.full(2, 6.0)}, tmp_path / "a")
    contribution = Contribution(site="a", path=tmp_path / "a", weight=1.0, num_steps=1)
    aggregate_updates(federated("scaffold"), tmp_path / "base", [contribution], tmp_path / "out", num_members=4)
    merged = safetensors.numpy.load_file(tmp_path / "out")
    np.testing.assert_allclose(merged["x"], 3.0)
    np.testing.assert_allclose(merged[name], 4.0 + (6.0 - 4.0) / 4)


def test_scaffold_in_training_learns_the_mean_gradient(small_learning: Learning, images: ImageSet) -> None:
    """One step from zero variates: the new variate is that step's gradient, the weight decay's included."""
    learning = msgspec.structs.replace(
        small_learning,
        method="scaffold",
        training=msgspec.structs.replace(small_learning.training, epochs=1, batch_size=24, momentum=0.9),
    )
    model, _ = build_model(learning)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = train(model, images, learning, seed=1)
    assert run.num_steps == 1
    for name, parameter in model.named_parameters():
        gradient = (before[name] - parameter.detach()) / learning.training.learning_rate
        torch.testing.assert_close(run.ending.private[CONTROL_PREFIX + name], gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.extra_tensors[CONTROL_PREFIX + name], gradient, rtol=1e-4, atol=1e-5)
    # A second round with c = c_i corrects nothing: it is FADE.
    again = {}
    for method, private in (("scaffold", run.ending.private), ("fedavg", {})):
        one = msgspec.structs.replace(learning, method=method)
        other, _ = build_model(one)
        if method == "scaffold":
            other.extra_tensors = dict(run.ending.private)
        train(other, images, one, seed=2, private=private)
        again[method] = dict(other.named_parameters())
    for name, parameter in again["fedavg"].items():
        torch.testing.assert_close(parameter, again["scaffold"][name])
