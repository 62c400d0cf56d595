"""Every learning method has both of its sides: what a site minimises, and what the server makes of it."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from aggregator.config import AggregateConfig
from aggregator.exchanges import validate_weights
from aggregator.run import aggregate_updates
from aggregator.strategies import STRATEGIES, resolve_strategy
from aggregator.strategies.interface import Contribution
from edgeflame.errors import ConfigError
from edgeflame.images import Preprocessing, write_image
from edgeflame.log import no_progress
from edgeflame.methods import FEDERATED_METHODS, METHODS, Backbone, Learning, Training
from trainer.agent.tasks import InitialTask, TrainTask
from trainer.model import build_model, load_model
from trainer.objectives import OBJECTIVES
from trainer.work import TorchSiteTrainer


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_both_sides(name: str) -> None:
    method = METHODS[name]
    assert method.summary
    assert method.objective is None or method.objective in OBJECTIVES
    assert method.alone or method.strategy is not None
    if method.strategy is not None:
        assert method.exchange in STRATEGIES[method.strategy].exchanges
        assert resolve_strategy(AggregateConfig(learning=Learning(method=name)).strategy, name) == method.strategy


def test_nothing_is_registered_that_no_method_can_use() -> None:
    assert set(OBJECTIVES) == {method.objective for method in METHODS.values()} - {None}
    taken = {kind for rule in STRATEGIES.values() for kind in rule.exchanges}
    assert taken == {METHODS[name].exchange for name in FEDERATED_METHODS}


def test_a_rule_that_cannot_aggregate_what_is_sent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "flame", msgspec.structs.replace(METHODS["flame"], exchange="else"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fedavg aggregates weights or head, but the sites of method flame send else"):
        AggregateConfig(strategy="fedavg", learning=Learning(method="flame"))


@pytest.mark.parametrize(
    "method", [name for name in FEDERATED_METHODS if METHODS[name].exchange in ("weights", "controls")]
)
def test_two_rounds_of_two_sites(method: str, tmp_path: Path) -> None:
    """Site and server code of each method together, on files; sites differ in size."""
    learning = Learning(
        method=method,
        backbone=Backbone(name="test_efficientnet", stages=(1, 2), weights="random"),
        input=Preprocessing(height=32, width=32),
        training=Training(batch_size=4),
    )
    config = AggregateConfig(learning=learning)
    sizes = {"east": 6, "west": 12}
    sites = {}
    for number, (name, count) in enumerate(sizes.items()):
        for index in range(count):
            pixels = np.random.default_rng(100 * number + index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            path = tmp_path / name / "train" / "good" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, pixels)
        sites[name] = TorchSiteTrainer(learning=learning, data=tmp_path / name, site=name, device="cpu")
    base = tmp_path / "base"
    sites["east"].write_initial_model(InitialTask(out=str(base)))
    history: dict[str, str] = {}
    private: dict[str, str] = {}
    for number in (1, 2):
        contributions = []
        for name, site in sites.items():
            task = TrainTask(
                round=number,
                base=str(base),
                history=history.get(name),
                out=str(tmp_path / f"{name}-{number}"),
                seed=number,
                private=private.get(name),
                private_out=str(tmp_path / f"{name}-{number}-private"),
            )
            outcome = site.train(task, no_progress)
            assert outcome.num_steps == math.ceil(sizes[name] / 4)
            verdict = validate_weights(Path(task.out), base, max_relative_change=config.max_relative_change)
            assert verdict.reason is None, verdict.detail
            history[name] = task.out
            if task.private_out is not None and Path(task.private_out).exists():
                private[name] = task.private_out
            contributions.append(
                Contribution(
                    site=name,
                    path=Path(task.out),
                    weight=sizes[name] / 18,
                    num_samples=sizes[name],
                    num_steps=outcome.num_steps,
                )
            )
        aggregate_updates(config, base, contributions, tmp_path / "next", num_members=2)
        (tmp_path / "next").replace(base)
    model, origin = load_model(base, learning)
    assert origin is not None
    start = build_model(learning)[0].exchanged()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in model.exchanged().items())
