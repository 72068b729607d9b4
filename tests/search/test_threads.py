"""Samplers in ``study.optimize(n_jobs=4)``: threads share an object, but no state of a draw."""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.internals.optuna import known_trials, set_known_trials, storage_of, study_id
from optuna_merge.search.named import RepeatableSampler, make_gp, make_named_sampler
from optuna_merge.search.samplers import StableCmaEsSampler

SPACE = {"x": FloatDistribution(-5, 5), "y": FloatDistribution(-5, 5)}

TPE = {"multivariate": True, "group": True, "n_startup_trials": 5}
SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "cmaes": lambda: StableCmaEsSampler(SPACE, seed=1, injected=make_gp(list(SPACE), 1)),
    "gp": lambda: make_named_sampler("gp", {}, list(SPACE), seed=1),
    "tpe": lambda: make_named_sampler("tpe", TPE, list(SPACE), seed=1),
}


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    before, level = sys.getswitchinterval(), optuna.logging.get_verbosity()
    sys.setswitchinterval(1e-5)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
    optuna.logging.set_verbosity(level)
    sys.setswitchinterval(before)


def drawn(sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    space = sampler.infer_relative_search_space(study, trial)
    together = sampler.sample_relative(study, trial, space)
    alone = {n: d for n, d in SPACE.items() if n not in together}
    return together | {n: sampler.sample_independent(study, trial, n, d) for n, d in alone.items()}


class Recorder(BaseSampler):
    """Passes calls on, and keeps what was known when a trial began."""

    def __init__(self, sampler: BaseSampler) -> None:
        self.sampler = sampler
        self.known: dict[int, list[FrozenTrial]] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.known[trial.number] = copy.deepcopy(known_trials(study))
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, *parameter: Any) -> Any:
        return self.sampler.sample_independent(study, trial, *parameter)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_in_a_thread_is_that_of_a_new_sampler_that_knows_the_same_trials(name: str) -> None:
    recorder = Recorder(SAMPLERS[name]())
    study = optuna.create_study(sampler=recorder)
    study.optimize(lambda t: (t.suggest_float("x", -5, 5) - 1) ** 2 + t.suggest_float("y", -5, 5) ** 2, 30, n_jobs=4)
    assert len(study.trials) == 30
    for trial in study.trials:
        alone = optuna.create_study()
        alone.add_trials([optuna.trial.create_trial(state=TrialState.FAIL)] * trial.number)
        storage = storage_of(alone)
        running = storage.get_trial(storage.create_new_trial(study_id(alone)))
        set_known_trials(alone, recorder.known[trial.number])
        assert running.number == trial.number
        assert drawn(SAMPLERS[name](), alone, running) == trial.params, trial.number


class Slow(optuna.samplers.RandomSampler):
    """Remembers from one call to the next which trial it draws for, as grouped TPE does, and takes its time."""

    trial: int | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self.trial = trial.number
        time.sleep(0.005)
        return dict(SPACE)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        assert self.trial == trial.number
        return dict.fromkeys(search_space, trial.number / 10)


def test_a_thread_never_gets_the_sampler_of_another_thread_s_trial() -> None:
    study = optuna.create_study(sampler=RepeatableSampler(lambda seed: Slow(seed=seed), list(SPACE), seed=1))
    study.optimize(lambda t: t.suggest_float("x", -5, 5) + t.suggest_float("y", -5, 5), 24, n_jobs=4)
    assert [trial.params["x"] for trial in study.trials] == [n / 10 for n in range(24)]
