"""Whom a run waits for, and for how long. Pure; ``now`` is a monotonic clock's reading in seconds.

Three rules, which the protocol document states:

1. **Progress.** A site that has made none for ``deadline_s`` is silent, and no longer waited for.
2. **The limit of a step.** A site may claim progress for ever, so once enough sites have done their part of a step (a
   round, the statistics phase, the packages at the end), the whole step lasts at most ``straggler_factor`` times as
   long as these took, or as ``deadline_s`` where that is longer. Who is not done by then is *overdue*.
3. **Held back.** A site that was overdue is not asked in the next 1, 2, 4, ... rounds, until an update of its is
   accepted: a site that is really slow gets its chance again, and one that holds the others up does so ever more
   rarely.

Who made progress when, and when a step began, is not journalled. It only delays: after a restart every site has the
whole time again. What decides the contributors, who was left out and how long the others took, is journalled.
"""

from __future__ import annotations

from aggregator.events import RunState


class Deadlines:
    """The clocks of a run.

    Args:
        state: the run as the journal has it.
        now: monotonic clock, seconds.
    """

    def __init__(self, state: RunState, *, now: float) -> None:
        self._last_progress: dict[str, float] = dict.fromkeys(state.members, now)
        self._last_heartbeat: dict[str, float] = {}
        self._recovered: set[str] = set()
        self._begun_at = now
        self._finish_took_s: float | None = None

    @property
    def last_progress_at(self) -> float:
        """When any site last made progress; the beginning of the step, if none did."""
        return max((*self._last_progress.values(), self._begun_at))

    def begin_step(self, state: RunState, now: float) -> None:
        """Sites are asked for something new: each of them has the whole time for it."""
        self._last_progress = dict.fromkeys(state.members, now)
        self._begun_at = now
        self._finish_took_s = None

    def elapsed_s(self, now: float) -> float:
        """How long the step has lasted, seconds; since the restart, if the aggregator was restarted in it."""
        return now - self._begun_at

    def heartbeat_received(self, site: str, now: float) -> None:
        """A site's process is alive; that alone is no progress."""
        self._last_heartbeat[site] = now

    def progress_made(self, site: str, now: float) -> None:
        """A site did something new, or its time begins anew."""
        self._last_progress[site] = now

    def recovered(self, site: str) -> None:
        """A site that may have been lost can do its part again."""
        self._recovered.add(site)

    def lost(self, *sites: str) -> None:
        """Sites failed or were left out: they are lost until they recover."""
        self._recovered.difference_update(sites)

    def is_silent(self, state: RunState, site: str, now: float) -> bool:
        """Whether a site has made no progress for ``deadline_s``."""
        return now - self._last_progress.get(site, self._begun_at) >= state.config.deadline_s

    def must_wait_for_paused(self, state: RunState, now: float) -> bool:
        """Whether the open round lacks its quorum, and a paused site whose heartbeats come could still contribute."""
        current = state.current_round
        assert current is not None
        if len(current.accepted) >= state.config.replies_needed(len(current.asked)):
            return False
        return any(
            site in state.paused and now - self._last_heartbeat.get(site, self._begun_at) < state.config.deadline_s
            for site in current.open_sites
        )

    def limit_passed(self, state: RunState, now: float) -> bool:
        """Whether the step in progress has lasted as long as it may."""
        took_s = self._enough_took_s(state, now)
        if took_s is None:
            return False
        return self.elapsed_s(now) >= state.config.straggler_factor * max(state.config.deadline_s, took_s)

    def _enough_took_s(self, state: RunState, now: float) -> float | None:
        """How long it took until enough sites had done their part; None while too few have."""
        current = state.current_round
        match state.phase:
            case "initialise":
                # One site alone is asked; the others wait for it from the beginning.
                return 0.0
            case "train" | "statistics" if current is not None:
                needed = state.config.replies_needed(len(current.asked))
                accepted = list(current.accepted.values())
                return accepted[needed - 1].elapsed_s if len(accepted) >= needed else None
            case "finish":
                settled = state.active_members & (state.finished.keys() | state.not_finished.keys())
                num_awaited = len((state.active_members - self.lost_sites(state)) | settled)
                if self._finish_took_s is None and len(settled) >= state.config.replies_needed(num_awaited):
                    self._finish_took_s = self.elapsed_s(now)
                return self._finish_took_s
            case _:
                return None

    def available_sites(self, state: RunState) -> list[str]:
        """Members that may be asked, sorted: not those that left, are paused, are lost or, for training, held back."""
        awake = state.active_members - state.paused.keys()
        held_back = set() if state.is_trained else _held_back(state)
        # If nobody else is there the lost are asked all the same; those that stay silent miss the deadline.
        present = awake - self.lost_sites(state)
        return sorted(present - held_back or present or awake)

    def lost_sites(self, state: RunState) -> set[str]:
        """Members that failed or were silent when they were last asked, and have not recovered since."""
        lost: set[str] = set()
        for entry in (*state.rounds, *filter(None, [state.statistics])):
            failed = {site for site, refusal in entry.refused.items() if refusal.reason == "failed"}
            missed = set(entry.left_out) - set(entry.paused)
            lost = (lost - entry.accepted.keys() - entry.refused.keys()) | failed | missed
        return lost - self._recovered


def _held_back(state: RunState) -> set[str]:
    """The sites that are not asked in the next round because they were overdue in earlier ones."""
    strikes: dict[str, int] = {}
    held_until: dict[str, int] = {}
    for entry in state.rounds:
        for site in entry.accepted:
            strikes.pop(site, None)
            held_until.pop(site, None)
        for site in entry.overdue:
            strikes[site] = strikes.get(site, 0) + 1
            held_until[site] = entry.number + (1 << min(strikes[site] - 1, 20))
    return {site for site, last in held_until.items() if len(state.rounds) < last}
