"""The ledger of a run: who was asked, who contributed what, who was left out and why. Made of facts alone."""

from __future__ import annotations

from typing import Any

from aggregator.facts import Round, RunState


def ledger(state: RunState) -> dict[str, Any]:
    """The ledger as plain data for JSON; the same facts give the same ledger."""
    return {
        "run": state.run,
        "started": state.started,
        "outcome": "running" if state.ended is None else "done" if state.ended.succeeded else "failed",
        "reason": state.ended.reason if state.ended else "",
        "method": state.config.learning.method,
        "strategy": state.config.strategy,
        "rounds_planned": state.config.rounds,
        "members": sorted(state.members),
        "initial_model": None
        if state.initial is None
        else {"site": state.initial.site, "sha256": state.initial.sha256},
        "refused_initial_models": [
            {"site": fact.site, "reason": fact.reason, "detail": fact.detail}
            for _, fact in sorted(state.refused_sources.items())
        ],
        "rounds": [_round(entry, state) for entry in state.rounds],
        "model_sha256": state.model,
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


def shares(entry: Round) -> dict[str, float]:
    """The weight of each accepted update, its share of the round's samples; they sum to 1."""
    total = sum(update.num_samples for update in entry.accepted.values())
    return {site: update.num_samples / total for site, update in sorted(entry.accepted.items())}


def _round(entry: Round, state: RunState) -> dict[str, Any]:
    weights = shares(entry)
    left_out = [{"site": site, "reason": "no progress until the deadline", "detail": ""} for site in entry.left_out]
    refused = [
        {"site": site, "reason": refusal.reason, "detail": refusal.detail}
        for site, refusal in sorted(entry.refused.items())
    ]
    return {
        "round": entry.number,
        "base_sha256": entry.base,
        "asked": list(entry.asked),
        "quorum": state.config.replies_needed(len(entry.asked)),
        "contributed": [
            {
                "site": site,
                "sha256": update.sha256,
                "num_samples": update.num_samples,
                # Until the round is closed nobody's share is known.
                "weight": weights[site] if entry.is_closed else None,
                "relative_change": update.relative_change,
                "metrics": update.metrics,
            }
            for site, update in sorted(entry.accepted.items())
        ],
        "left_out": sorted(left_out + refused, key=lambda item: item["site"]),
        "model_sha256": entry.model,
    }
