"""Our samplers draw the same again: in another process, after a kill at any point, and by trial and name."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.internals.optuna import storage_of, trial_id
from optuna_merge.search.samplers import StableCmaEsSampler, StableRandomSampler
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.open import open_storage
from optuna_merge.storage.trials import n_finished
from tests.search.bowl import POPSIZE, SPACE, loss, made, objective, points, suggest

pytestmark = pytest.mark.usefixtures("no_warnings")


# --- killed and resumed


def outcome(study: optuna.Study, trial: optuna.Trial, params: Mapping[str, float]) -> None:
    """Every way in which a trial can end, decided by its number."""
    if trial.number % 11 == 10:
        study.tell(trial, state=TrialState.FAIL)
    elif trial.number % 7 == 6:
        study.tell(trial, state=TrialState.PRUNED)
    elif trial.number % 5 == 3:
        trial.set_user_attr(PAIRED_ESTIMATE, loss(params) + 0.01)
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, loss(params))


def opened(url: str, sampler: str = "cmaes") -> optuna.Study:
    made_sampler = StableCmaEsSampler(SPACE, seed=9) if sampler == "cmaes" else StableRandomSampler(seed=9)
    return optuna.create_study(
        storage=open_storage(url), study_name="killed", sampler=made_sampler, load_if_exists=True
    )


def go_on(url: str, n_trials: int, stop: Callable[[int], int | None], sampler: str = "cmaes") -> bool:
    """Run up to ``n_trials``; end as a killed process does, after ``stop(trial number)`` calls of suggest.

    Returns:
        Whether it came to the end.
    """
    study = opened(url, sampler)
    if not study.trials:
        study.enqueue_trial({name: d.low for name, d in SPACE.items()})
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        storage_of(study).set_trial_state_values(trial_id(trial), TrialState.WAITING)
    while n_finished(study) < n_trials:
        trial = study.ask()
        n_suggested = stop(trial.number)
        if n_suggested is not None and n_suggested <= len(SPACE):
            suggest(trial, list(SPACE)[:n_suggested] or ["a"][:n_suggested])
            return False
        outcome(study, trial, suggest(trial))
        if n_suggested is not None:  # between two trials
            return False
    return True


def record(trial: FrozenTrial) -> tuple[Any, ...]:
    # cmaes pickles memory that it never writes to; what the optimizer knows shows in the trials after it.
    attributes = {key: value for key, value in trial.system_attrs.items() if "optimizer" not in key}
    return trial.number, trial.state, trial.params, trial.value, trial.user_attrs, attributes


@pytest.mark.parametrize("kind", ["sqlite:///", "journal://"])
@pytest.mark.parametrize("sampler", ["cmaes", "random"])
def test_killed_anywhere_and_resumed_equals_uninterrupted(tmp_path: Path, kind: str, sampler: str) -> None:
    n_trials = 2 * POPSIZE + 8 if sampler == "cmaes" else 8
    whole, pieces = f"{kind}{tmp_path}/whole", f"{kind}{tmp_path}/pieces"
    assert go_on(whole, n_trials, lambda number: None, sampler)
    killed: set[int] = set()

    def stop(number: int) -> int | None:
        """Each trial is killed once: before, between, or after its calls of suggest, or when it has been told."""
        if number in killed:
            return None
        killed.add(number)
        return number % (len(SPACE) + 2)

    n_starts = 1
    while not go_on(pieces, n_trials, stop, sampler):
        n_starts += 1
    assert n_starts > n_trials
    assert len(killed) == n_trials
    expected = [record(trial) for trial in opened(whole, sampler).trials]
    assert len(expected) == n_trials
    assert {state for _, state, *_ in expected} == {TrialState.COMPLETE, TrialState.PRUNED} | (
        {TrialState.FAIL} if n_trials > 10 else set()
    )
    assert [record(trial) for trial in opened(pieces, sampler).trials] == expected


def test_a_new_process_continues_the_generation(tmp_path: Path) -> None:
    n_trials = 2 * POPSIZE + 3
    whole, halves = f"journal://{tmp_path}/whole", f"journal://{tmp_path}/halves"
    assert go_on(whole, n_trials, lambda number: None)
    assert go_on(halves, POPSIZE + 3, lambda number: None)
    code = f"from tests.search.test_samplers import go_on; assert go_on({halves!r}, {n_trials}, lambda number: None)"
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, timeout=600, env={**os.environ, "PYTHONHASHSEED": "12345"}
    )
    assert [record(t) for t in opened(halves).trials] == [record(t) for t in opened(whole).trials]


def test_the_sampler_can_be_pickled() -> None:
    expected = made(StableCmaEsSampler(SPACE, seed=9))
    expected.optimize(objective, 12)
    study = made(pickle.loads(pickle.dumps(StableCmaEsSampler(SPACE, seed=9))))
    study.optimize(objective, 12)
    assert points(study) == points(expected)


# --- random draws


def test_stable_random_draws_are_keyed_by_trial_and_name() -> None:
    study = made(StableRandomSampler(seed=1))
    study.optimize(objective, 3)
    again = made(StableRandomSampler(seed=1))
    again.optimize(lambda trial: loss(suggest(trial, ["d", "b", "a", "c"])), 3)
    assert [dict(sorted(p.items())) for p in points(again)] == points(study)
    unit = made(StableRandomSampler(seed=1))
    trial = unit.ask()
    drawn = [trial.suggest_float(f"x{i}", 0, 1) for i in range(200)]
    assert len(set(drawn)) == 200
    assert 0.4 < np.mean(drawn) < 0.6
    other = made(StableRandomSampler(seed=2)).ask()
    assert other.suggest_float("x0", 0, 1) != drawn[0]
