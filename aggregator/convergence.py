"""Whether more rounds would still change anything: the criterion of an early end. Pure; from journalled facts only."""

from __future__ import annotations

from aggregator.facts import Round, RunState


def converged(state: RunState) -> str | None:
    """Why the rounds may end after the newest one, in words; None if they may not.

    The criterion (:class:`aggregator.config.Convergence`) has to hold in each of the last ``patience`` rounds.
    """
    rule = state.config.convergence
    if (rule.model_change is None and rule.metric_change is None) or len(state.rounds) < rule.min_rounds:
        return None
    newest = range(len(state.rounds) - rule.patience, len(state.rounds))
    if newest.start < 0:
        return None
    found: list[str] = []
    for index in newest:
        entry = state.rounds[index]
        found = []
        if rule.model_change is not None:
            change = entry.relative_change
            if change is None or change >= rule.model_change:
                return None
            found.append(f"the model changed by {change:.3g} (below {rule.model_change:g})")
        if rule.metric_change is not None:
            change = _metric_change(state, index, rule.metric)
            if change is None or change >= rule.metric_change:
                return None
            found.append(f"{rule.metric} by {change:.3g} (below {rule.metric_change:g})")
    return f"converged in round {len(state.rounds)}: {' and '.join(found)}, for {rule.patience} rounds"


def mean_metric(entry: Round, name: str) -> float | None:
    """A figure of the accepted updates, averaged by samples over the sites that reported it; None if none did."""
    told = [(update.num_samples, update.metrics[name]) for update in entry.accepted.values() if name in update.metrics]
    return sum(samples * value for samples, value in told) / sum(samples for samples, _ in told) if told else None


def _metric_change(state: RunState, index: int, name: str) -> float | None:
    """The change of a mean metric from one round to the next, relative to the earlier one."""
    if index == 0:
        return None
    before, after = (mean_metric(state.rounds[number], name) for number in (index - 1, index))
    if before is None or after is None:
        return None
    return abs(after - before) / (abs(before) or 1.0)
