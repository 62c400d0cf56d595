"""The ledger of a run: who was asked, who contributed what, who was left out and why. Computed from the run's
events alone: the same events give the same ledger.
"""

from __future__ import annotations

from typing import Any

from aggregator.events import Round, RunState


def build_ledger(state: RunState) -> dict[str, Any]:
    """The ledger as plain data for JSON; the same facts give the same ledger."""
    return {
        "run": state.run,
        "started": state.started,
        "outcome": "running" if state.ended is None else "done" if state.ended.succeeded else "failed",
        "reason": state.ended.reason if state.ended else "",
        "method": state.config.learning.method,
        "strategy": state.config.strategy_name,
        "rounds_planned": state.config.rounds,
        "rounds_ended_early": None
        if state.ended_early is None
        else {"cause": state.ended_early.cause, "reason": state.ended_early.reason},
        "members": sorted(state.members),
        "left": [
            {"site": event.site, "by": event.by, "detail": event.detail} for _, event in sorted(state.left.items())
        ],
        "initial_model": None
        if state.initial is None
        else {"site": state.initial.site, "sha256": state.initial.sha256},
        "refused_initial_models": [
            {"site": event.site, "reason": event.reason, "detail": event.detail}
            for _, event in sorted(state.refused_initial.items())
        ],
        "rounds": [_round_entry(entry, state) for entry in state.rounds],
        "model_sha256": state.model,
        "statistics": None if state.statistics is None else _statistics_entry(state.statistics, state),
        "packages": [
            {"site": event.site, "sha256": event.package, "summary": event.summary}
            for _, event in sorted(state.finished.items())
        ],
        "packages_missing": [
            {"site": site, "reason": state.not_finished.get(site, "no progress until the deadline")}
            for site in sorted(state.members.keys() - state.finished.keys())
        ]
        if state.phase == "done"
        else [],
    }


def _statistics_entry(entry: Round, state: RunState) -> dict[str, Any]:
    weights = entry.weights()
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
        "left_out": _left_out_entries(entry),
        "sha256": entry.result_sha256,
        # Error of the covariances relative to their Frobenius norm, over the positions.
        "truncation_error": state.truncation or None,
    }


def _left_out_entries(entry: Round) -> list[dict[str, str]]:
    left_out = []
    for site in entry.left_out:
        reason = "paused" if site in entry.paused else "no progress until the deadline"
        if site in entry.overdue:
            reason = "not done when the round had lasted as long as it may"
        left_out.append({"site": site, "reason": reason, "detail": ""})
    refused = [
        {"site": site, "reason": refusal.reason, "detail": refusal.detail}
        for site, refusal in sorted(entry.refused.items())
    ]
    return sorted(left_out + refused, key=lambda item: item["site"])


def _round_entry(entry: Round, state: RunState) -> dict[str, Any]:
    weights = entry.weights(equal=state.config.rule.equal_votes)
    return {
        "round": entry.number,
        "base_sha256": entry.base_sha256,
        "asked": list(entry.asked),
        "quorum": state.config.replies_needed(len(entry.asked)),
        "contributed": [
            {
                "site": site,
                "sha256": update.sha256,
                "decoded_sha256": update.decoded,
                "num_samples": update.num_samples,
                "num_steps": update.num_steps,
                # Shares are not known until the round is closed.
                "weight": weights[site] if entry.is_closed else None,
                "relative_change": update.relative_change,
                "metrics": update.metrics,
            }
            for site, update in sorted(entry.accepted.items())
        ],
        "left_out": _left_out_entries(entry),
        "model_sha256": entry.result_sha256,
        "model_relative_change": entry.relative_change,
    }
