from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.pruners import BasePruner, NopPruner
from optuna.trial import FrozenTrial
from scipy.stats import wilcoxon

from optuna_merge.search.pruner import SignedRankPruner, best_point, signed_rank_p


def point(value: float, intermediate_values: dict[int, float] | None = None) -> FrozenTrial:
    """A complete trial with a parameter."""
    return optuna.trial.create_trial(
        value=value,
        params={"x": 0.5},
        distributions={"x": FloatDistribution(0, 1)},
        intermediate_values=intermediate_values,
    )


def study_of(*finished: Sequence[float], direction: str = "maximize") -> optuna.Study:
    """A study with complete trials: each reported these values and is worth their mean."""
    study = optuna.create_study(direction=direction, pruner=NopPruner())
    for values in finished:
        study.add_trial(point(float(np.mean(values)), dict(enumerate(values))))
    return study


def stops_after(pruner: BasePruner, study: optuna.Study, values: Sequence[float]) -> int | None:
    """After how many chunks a trial that scores these values is stopped; None if it never is."""
    study.pruner = pruner
    trial = study.ask()
    for chunk, value in enumerate(values):
        trial.report(value, chunk)
        if trial.should_prune():
            return chunk + 1
    return None


def test_p_by_hand() -> None:
    # ranks 3, 1, 2; the sum above 0 is 1; of the 8 combinations of signs, {} and {1} have at most that
    assert signed_rank_p([-0.3, 0.1, -0.2]) == 2 / 8
    # both have rank 1.5; {} and either of them
    assert signed_rank_p([-0.2, 0.2]) == 3 / 4
    assert signed_rank_p([-0.1, -0.2, -0.3, -0.4]) == 1 / 16
    assert signed_rank_p([0.0, 0.0]) == 1
    # equal but for rounding: a tie
    assert signed_rank_p([0.3 - 0.1, 0.1 - 0.3]) == 3 / 4


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7))
def test_p_is_scipys_over_all_signs(steps: list[int]) -> None:
    differences = np.array(steps) / 20
    if differences.any():
        expected = wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue
        assert signed_rank_p(differences.tolist()) == pytest.approx(expected)


def test_p_is_scipys_for_many_differences() -> None:
    differences = np.random.default_rng(0).normal(-0.1, 1, 40)
    expected = wilcoxon(differences, alternative="less", method="exact").pvalue
    assert signed_rank_p(differences.tolist()) == pytest.approx(expected)


def test_a_trial_that_is_worse_on_every_chunk_is_stopped_at_the_fourth() -> None:
    best = [0.5, 0.7, 0.6, 0.4, 0.8, 0.6]
    worse = [value - 0.1 for value in best]
    assert stops_after(SignedRankPruner(), study_of(best), worse) == 4  # 1/16 < 0.1, 1/8 is not
    assert stops_after(SignedRankPruner(n_startup_steps=5), study_of(best), worse) == 5
    assert stops_after(SignedRankPruner(p_threshold=0.3, n_startup_steps=0), study_of(best), worse) == 2
    assert stops_after(SignedRankPruner(p_threshold=0.05), study_of(best), worse) == 5  # 1/32
    assert stops_after(SignedRankPruner(), study_of(best), [value + 0.1 for value in best]) is None


def test_minimizing_is_the_other_way_round() -> None:
    best = [0.5, 0.7, 0.6, 0.4, 0.8]
    study = study_of(best, direction="minimize")
    assert stops_after(SignedRankPruner(), study, [value + 0.1 for value in best]) == 4
    assert stops_after(SignedRankPruner(), study, [value - 0.1 for value in best]) is None


def test_only_the_shared_chunks_count() -> None:
    """The first chunks are easy: the worse trial's mean is above the best one's mean over all chunks."""
    best = [0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]
    assert stops_after(SignedRankPruner(), study_of(best), [0.8] * 4) == 4
    study = optuna.create_study(direction="maximize")
    study.add_trial(point(1.0, {2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5}))
    assert stops_after(SignedRankPruner(), study, [0.9, 0.9, 0.1, 0.1, 0.1, 0.1]) == 6


def test_nothing_to_compare_with_stops_nothing() -> None:
    assert stops_after(SignedRankPruner(), study_of(), [0.1] * 6) is None
    study = optuna.create_study(direction="maximize")
    study.add_trial(point(1.0))
    assert stops_after(SignedRankPruner(), study, [0.1] * 6) is None
    assert stops_after(SignedRankPruner(), study_of([0.5] * 6), [0.1, float("nan"), 0.1, 0.1, 0.1, 0.1]) is None


def test_a_source_that_beats_every_merge_does_not_stop_them() -> None:
    study = study_of([0.5] * 5)
    study.add_trial(optuna.trial.create_trial(value=0.9, intermediate_values=dict.fromkeys(range(5), 0.9)))
    assert best_point(study).number == 0
    assert stops_after(SignedRankPruner(), study, [0.6] * 5) is None
    assert best_point(optuna.create_study()) is None


@pytest.mark.parametrize(("direction", "best"), [("maximize", 1), ("minimize", 0)])
def test_of_equally_good_points_the_first_counts(direction: str, best: int) -> None:
    assert best_point(study_of([0.2], [0.4], [0.4], [0.2], direction=direction)).number == best
