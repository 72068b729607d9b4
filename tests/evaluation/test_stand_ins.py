from __future__ import annotations

import math

import numpy as np
import pytest

from optuna_merge.evaluation.stand_ins import Choice, Likelihood, MeanChoice, MeanText, StandIn, Text

LIKELIHOODS = np.log([0.2, 0.3, 0.1, 0.4, 0.25, 0.5, 0.05])

CHOICE = MeanChoice(
    [
        Choice((0, 1), (1.0, 0.0), (1.0, 1.0)),
        Choice((2, 3, 4), (0.0, 0.5, 1.0), (1.0, 1.0, 1.0), priors=(5, 5, 6)),
    ],
    4,
)
SCALED = MeanChoice([Choice((0, 1), (1.0, 0.0), (2.0, 1.0))], 1)
TEXT = MeanText([Text((0, 1), 1.0, 0.0), Text((2,), -1.0, 0.5)], 2)


@pytest.mark.parametrize(
    ("stand_in", "value"),
    [
        # of two documents among four: 0.2 / 0.5, and 0.1/0.5 : 0.4/0.5 : 0.25/0.05 = 0.2 : 0.8 : 5
        (CHOICE, (0.4 + (0.5 * 0.8 + 5) / 6) / 4),
        (SCALED, 0.04 / 0.34),
        (TEXT, (0.5 + (0.5 - 1.5 * 0.1)) / 2),
        (Likelihood([0, 3], 2, "mean"), math.log(0.08) / 2),
        (Likelihood([0, 3], 2, "perplexity"), 0.08**-0.5),
        (Likelihood([0, 3], 4, "bits"), -math.log2(0.08) / 4),
    ],
)
def test_values_by_hand_and_gradients_by_central_differences(stand_in: StandIn, value: float) -> None:
    assert stand_in.value(LIKELIHOODS) == pytest.approx(value, rel=1e-12)
    by_difference = [
        (stand_in.value(LIKELIHOODS + step) - stand_in.value(LIKELIHOODS - step)) / 2e-6
        for step in 1e-6 * np.eye(len(LIKELIHOODS))
    ]
    assert stand_in.gradient(LIKELIHOODS) == pytest.approx(np.array(by_difference), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("stand_in", [CHOICE, TEXT, Likelihood([0, 3], 2, "perplexity"), Likelihood([0, 3], 2, "bits")])
def test_the_gradient_of_a_group_needs_that_group_alone(stand_in: StandIn) -> None:
    whole = stand_in.gradient(LIKELIHOODS)
    grouped = {request for group in stand_in.together for request in group}
    assert {request for request in range(len(whole)) if whole[request]} <= grouped
    for group in stand_in.together:
        known = np.full_like(LIKELIHOODS, np.nan)
        known[group] = LIKELIHOODS[group]
        assert stand_in.gradient(known)[group] == pytest.approx(whole[group], rel=1e-12)
        if len(group) > 1:
            known[group[0]] = np.nan
            assert np.isnan(stand_in.gradient(known)[group[0]])


def test_log_likelihoods_far_below_zero_neither_overflow_nor_vanish() -> None:
    far = LIKELIHOODS - 2000
    assert SCALED.value(np.array([-1000.0, -2000.0])) == pytest.approx(0.5)
    assert MeanChoice([Choice((0, 1), (1.0, 0.0), (1.0, 1.0))], 1).value(far) == pytest.approx(0.4)
