"""The ledger of a run: who was asked, who contributed what, who was left out and why. Made of facts alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aggregator.config import AggregateConfig
from aggregator.facts import Round, RunState
from aggregator.strategies import STRATEGIES, rule_name
from aggregator.strategies.interface import Contribution, Rule


def ledger(state: RunState) -> dict[str, Any]:
    """The ledger as plain data for JSON; the same facts give the same ledger."""
    return {
        "run": state.run,
        "started": state.started,
        "outcome": "running" if state.ended is None else "done" if state.ended.succeeded else "failed",
        "reason": state.ended.reason if state.ended else "",
        "method": state.config.learning.method,
        "strategy": rule_name(state.config.strategy, state.config.learning.method),
        "rounds_planned": state.config.rounds,
        "rounds_ended_early": None
        if state.last_round is None
        else {"cause": state.last_round.cause, "reason": state.last_round.reason},
        "members": sorted(state.members),
        "left": [{"site": fact.site, "by": fact.by, "detail": fact.detail} for _, fact in sorted(state.left.items())],
        "initial_model": None
        if state.initial is None
        else {"site": state.initial.site, "sha256": state.initial.sha256},
        "refused_initial_models": [
            {"site": fact.site, "reason": fact.reason, "detail": fact.detail}
            for _, fact in sorted(state.refused_sources.items())
        ],
        "rounds": [_round(entry, state) for entry in state.rounds],
        "model_sha256": state.model,
        "statistics": None if state.statistics is None else _statistics(state.statistics, state),
        "packages": [
            {"site": fact.site, "sha256": fact.package, "summary": fact.summary}
            for _, fact in sorted(state.finished.items())
        ],
        "packages_missing": [
            {"site": site, "reason": state.not_finished.get(site, "no progress until the deadline")}
            for site in sorted(state.members.keys() - state.finished.keys())
        ]
        if state.phase == "done"
        else [],
    }


def shares(entry: Round, *, equal: bool = False) -> dict[str, float]:
    """The weight of each accepted update, its share of the round's samples (or ``equal``); they sum to 1."""
    if equal:
        return {site: 1 / len(entry.accepted) for site in sorted(entry.accepted)}
    total = sum(update.num_samples for update in entry.accepted.values())
    return {site: update.num_samples / total for site, update in sorted(entry.accepted.items())}


def contributions(entry: Round, config: AggregateConfig, path_of: Callable[[str], Path]) -> list[Contribution]:
    """The accepted updates of a round as a strategy gets them; ``path_of`` tells where a blob is by its SHA-256."""
    accepted = entry.accepted
    return [
        Contribution(
            site=site,
            path=path_of(accepted[site].decoded or accepted[site].sha256),
            weight=weight,
            num_samples=accepted[site].num_samples,
            num_steps=accepted[site].num_steps,
            relative_change=accepted[site].relative_change,
        )
        for site, weight in shares(entry, equal=_rule(config).equal_votes).items()
    ]


def _rule(config: AggregateConfig) -> Rule:
    return STRATEGIES[rule_name(config.strategy, config.learning.method)]


def _statistics(entry: Round, state: RunState) -> dict[str, Any]:
    weights = shares(entry)
    return {
        "form": state.config.statistics_form,
        "rank": state.config.statistics_rank if state.config.statistics_form == "low_rank" else None,
        "asked": list(entry.asked),
        "quorum": state.config.replies_needed(len(entry.asked)),
        "contributed": [
            {
                "site": site,
                "sha256": part.sha256,
                "num_samples": part.num_samples,
                "weight": weights[site] if entry.is_closed else None,
                "metrics": part.metrics,
            }
            for site, part in sorted(entry.accepted.items())
        ],
        "left_out": _left_out(entry),
        "sha256": entry.model,
        # Of the covariances, relative to their Frobenius norm; over the positions.
        "truncation_error": state.truncation or None,
    }


def _left_out(entry: Round) -> list[dict[str, str]]:
    left_out = [
        {"site": site, "reason": "paused" if site in entry.paused else "no progress until the deadline", "detail": ""}
        for site in entry.left_out
    ]
    refused = [
        {"site": site, "reason": refusal.reason, "detail": refusal.detail}
        for site, refusal in sorted(entry.refused.items())
    ]
    return sorted(left_out + refused, key=lambda item: item["site"])


def _round(entry: Round, state: RunState) -> dict[str, Any]:
    weights = shares(entry, equal=_rule(state.config).equal_votes)
    return {
        "round": entry.number,
        "base_sha256": entry.base,
        "asked": list(entry.asked),
        "quorum": state.config.replies_needed(len(entry.asked)),
        "contributed": [
            {
                "site": site,
                "sha256": update.sha256,
                "decoded_sha256": update.decoded,
                "num_samples": update.num_samples,
                "num_steps": update.num_steps,
                # Until the round is closed nobody's share is known.
                "weight": weights[site] if entry.is_closed else None,
                "relative_change": update.relative_change,
                "metrics": update.metrics,
            }
            for site, update in sorted(entry.accepted.items())
        ],
        "left_out": _left_out(entry),
        "model_sha256": entry.model,
        "model_relative_change": entry.relative_change,
    }
