"""Whether a run's rounds may end before their planned number, because the model has converged. Pure: a function of
journalled events, so that a restarted aggregator decides the same.
"""

from __future__ import annotations

from aggregator.events import Round, RunState


def convergence_reason(state: RunState) -> str | None:
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


def _mean_metric(entry: Round, name: str) -> float | None:
    """A figure of the accepted updates, averaged by samples over the sites that reported it; None if none did."""
    reported = [(part.num_samples, part.metrics[name]) for part in entry.accepted.values() if name in part.metrics]
    if not reported:
        return None
    return sum(samples * value for samples, value in reported) / sum(samples for samples, _ in reported)


def _metric_change(state: RunState, index: int, name: str) -> float | None:
    """The change of a mean metric from one round to the next, relative to the earlier one."""
    if index == 0:
        return None
    before, after = (_mean_metric(state.rounds[number], name) for number in (index - 1, index))
    if before is None or after is None:
        return None
    return abs(after - before) / (abs(before) or 1.0)
