"""Every learning method has both of its sides: what a site minimises, and what the server makes of it."""

from __future__ import annotations

import msgspec
import pytest

from aggregator.config import AggregateConfig
from aggregator.strategies import STRATEGIES, rule_name
from edgeflame.errors import ConfigError
from edgeflame.learning import FEDERATED_METHODS, METHODS, Learning
from trainer.objectives import OBJECTIVES


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_both_sides(name: str) -> None:
    method = METHODS[name]
    assert method.summary
    assert method.objective is None or method.objective in OBJECTIVES
    assert method.alone or method.strategy is not None
    if method.strategy is not None:
        assert STRATEGIES[method.strategy].exchange == method.exchange
        assert rule_name(AggregateConfig(learning=Learning(method=name)).strategy, name) == method.strategy


def test_nothing_is_registered_that_no_method_can_use() -> None:
    assert set(OBJECTIVES) == {method.objective for method in METHODS.values()} - {None}
    assert {rule.exchange for rule in STRATEGIES.values()} == {METHODS[name].exchange for name in FEDERATED_METHODS}


def test_a_rule_that_cannot_aggregate_what_is_sent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "flame", msgspec.structs.replace(METHODS["flame"], exchange="else"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fedavg aggregates weights, but the sites of method flame send else"):
        AggregateConfig(strategy="fedavg", learning=Learning(method="flame"))
