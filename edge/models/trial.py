"""Whether a model that was switched to proves bad: on its own failures, and on verdicts the model before did not give.

Comparing today's rate of rejects with yesterday's would blame the model for a bad batch. So the model before goes on
judging the same parts, and what counts is the parts where only one of the two rejects: a batch of bad parts is rejected
by both. Each kind (newly failed, newly passed) is tested for being more frequent than was accepted in the shadow run.

The test may look after every part for as long as the trial lasts, so it is an anytime-valid one: a mixture of
likelihood ratios of rates above the accepted one against it. For every true rate up to the accepted one its expected
value never exceeds 1, so the chance that it ever reaches ``1 / alpha`` is at most ``alpha`` (Ville's inequality; see
Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", Statistical Science 2023, section 3).
A model that rejects every part is found out within a few parts.
"""

from __future__ import annotations

import collections
import math

import msgspec
import numpy as np

from edge.models.comparison import is_fault, is_scored
from edge.results import Result
from edge.verdict import Reason

ALPHA = 1e-3
"""Chance that a trial rolls back a model whose rates are as accepted, however long it lasts."""
LEAST_RATE = 0.005
"""Accepted at least: one part in two hundred is no proof of anything, whatever was configured."""
FAULT_WINDOW = 100

_NUM_RATES = 16


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model on trial is bad: a word, and words for people."""

    reason: str
    detail: str


class RateTest:
    """Whether something happens more often than ``accepted``.

    Args:
        accepted: the rate that is all right, above 0 and below 1.
        alpha: chance of a false alarm, ever.
    """

    def __init__(self, accepted: float, alpha: float) -> None:
        rates = np.geomspace(min(1.5 * accepted, 0.99), 0.99, _NUM_RATES)
        self._yes = np.log(rates / accepted)
        self._no = np.log((1 - rates) / (1 - accepted))
        self._log_evidence = np.full(_NUM_RATES, -math.log(_NUM_RATES))
        self._bar = math.log(1 / alpha)
        self.num_yes = 0
        self.num = 0

    def add(self, happened: bool) -> bool:
        """Take a part; whether it is now proven."""
        self.num += 1
        self.num_yes += happened
        self._log_evidence += self._yes if happened else self._no
        return bool(np.logaddexp.reduce(self._log_evidence) >= self._bar)


class Trial:
    """One model on trial.

    Args:
        parts: until it is over, judged by both models.
        accepted: share of differing verdicts that was accepted.
        max_faults: of its own, in ``FAULT_WINDOW`` parts.
    """

    def __init__(self, *, parts: int, accepted: float, max_faults: int) -> None:
        rate = max(accepted, LEAST_RATE)
        self.alarm: Alarm | None = None
        """The first reason to roll back; set by whichever thread comes upon it."""
        self._parts = parts
        self._accepted = accepted
        self._max_faults = max_faults
        self._faults: collections.deque[bool] = collections.deque(maxlen=FAULT_WINDOW)
        self._newly_failed = RateTest(rate, ALPHA / 2)
        self._newly_passed = RateTest(rate, ALPHA / 2)

    @property
    def is_over(self) -> bool:
        """It has judged enough parts together with the model before."""
        return self._newly_failed.num >= self._parts

    def judged(self, result: Result) -> Alarm | None:
        """Take every verdict of the model on trial."""
        if Reason.SCORE_NOT_FINITE.value in result.reasons:
            return self._raise("not_finite", f"the score of part {result.part_id} is no finite number")
        self._faults.append(is_fault(result))
        count = sum(self._faults)
        if count < self._max_faults:
            return None
        detail = f"{count} of the last {len(self._faults)} parts without a score: {result.detail or 'no details'}"
        return self._raise("faults", detail)

    def compared(self, present: Result, before: Result) -> Alarm | None:
        """Take a part that the model before could judge as well."""
        if not (is_scored(before) and is_scored(present)):
            return None
        rejects, did_reject = present.verdict == "fail", before.verdict == "fail"
        for test, happened, reason, what in (
            (self._newly_failed, rejects and not did_reject, "rejects_too_much", "fails parts that the model before"),
            (
                self._newly_passed,
                did_reject and not rejects,
                "rejects_too_little",
                "does not fail parts that the model before",
            ),
        ):
            if test.add(happened):
                detail = (
                    f"it {what} {'passed' if test is self._newly_failed else 'failed'}: {test.num_yes} of {test.num}; "
                    f"{self._accepted:.2%} was accepted"
                )
                return self._raise(reason, detail)
        return None

    def _raise(self, reason: str, detail: str) -> Alarm:
        self.alarm = self.alarm or Alarm(reason=reason, detail=detail)
        return self.alarm
