"""Optuna's other samplers, by name or import path: they learn, and go on as they would have."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.sampler import SAMPLERS
from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import storage_of
from optuna_merge.search.named import NAMED, RepeatableSampler, make_named_sampler
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.trials import generation
from tests.search.bowl import SPACE, loss, made, objective, points, suggest

pytestmark = pytest.mark.usefixtures("no_warnings")


def far(params: Mapping[str, float]) -> float:
    """The value that a study over ``SPACE`` maximises."""
    return -loss(params)


def searched(name: str, n_trials: int, options: Mapping[str, Any] | None = None, **given: Any) -> optuna.Study:
    """A study with what ours have: a source without parameters, enqueued uniform merges, pruned trials."""
    study = optuna.create_study(
        direction="maximize",
        sampler=make_named_sampler(name, options or {}, list(SPACE), seed=1),
        study_name="s",
        load_if_exists=True,
        **given,
    )
    if not study.trials:
        study.add_trial(optuna.create_trial(value=-9.0))
        for share in (0.4, 0.6):
            study.enqueue_trial({name: d.low + share * (d.high - d.low) for name, d in SPACE.items()})

    def one(trial: optuna.Trial) -> float:
        value = far(suggest(trial))
        if trial.number > 8 and trial.number % 3 == 0:
            trial.set_user_attr(PAIRED_ESTIMATE, value)
            raise optuna.TrialPruned
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.optimize(one, n_trials=n_trials - sum(trial.state.is_finished() for trial in study.trials))
    return study


NAMED_OPTIONS: dict[str, dict[str, Any]] = {
    "gp": {},
    "tpe": {},
    "nsga2": {"population_size": 8},
    "optuna.samplers.CmaEsSampler": {"warn_independent_sampling": False},
}


@pytest.mark.parametrize("name", NAMED_OPTIONS)
def test_samplers_by_name_learn_from_the_study(name: str) -> None:
    study = searched(name, 45, NAMED_OPTIONS[name])
    late = [far(trial.params) for trial in study.trials[30:]]
    chance = [far(trial.params) for trial in searched("optuna.samplers.RandomSampler", 45).trials[30:]]
    assert np.mean(late) > np.mean(chance) + 0.1


def test_only_cma_es_has_generations() -> None:
    drawn = {
        name: searched(name, 22, NAMED_OPTIONS[name]).trials[-1] for name in ("nsga2", "optuna.samplers.CmaEsSampler")
    }
    assert any(key.endswith(":generation") for key in drawn["nsga2"].system_attrs)  # of a genetic algorithm
    assert [generation(trial) for trial in drawn.values()] == [None, 2]


@pytest.mark.parametrize("name", [*NAMED_OPTIONS, "optuna.samplers.RandomSampler"])
def test_samplers_by_name_go_on_as_they_would_have(name: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    options = NAMED_OPTIONS.get(name, {})
    searched(name, 19, options, storage=storage)  # in the middle of a generation
    assert points(searched(name, 26, options, storage=storage)) == points(searched(name, 26, options))


def test_a_sampler_is_shown_what_it_can_learn_from() -> None:
    seen: list[list[tuple[TrialState, float | None]]] = []

    class Looks(optuna.samplers.RandomSampler):
        def sample_relative(self, study: optuna.Study, *_: Any) -> dict[str, Any]:
            seen.append([(trial.state, trial.value) for trial in study.get_trials(deepcopy=False)])
            return {}

    study = made(RepeatableSampler(Looks, list(SPACE), seed=1))
    study.add_trial(optuna.create_trial(value=9.0))
    some = {"a": 0.0}
    study.add_trial(optuna.create_trial(value=8.0, params=some, distributions={"a": SPACE["a"]}))
    full = {name: d.low for name, d in SPACE.items()}
    for attributes in ({PAIRED_ESTIMATE: 7.0}, {}):
        study.add_trial(
            optuna.create_trial(state=TrialState.PRUNED, params=full, distributions=SPACE, user_attrs=attributes)
        )
    study.optimize(objective, n_trials=1)
    assert seen == [[(TrialState.COMPLETE, 7.0), (TrialState.PRUNED, None)]]
    assert [trial.state.name for trial in study.trials[:4]] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]


def test_a_sampler_is_made_for_each_trial_and_each_parameter_that_it_draws_by_itself() -> None:
    seeds: list[int] = []

    def make(seed: int) -> optuna.samplers.BaseSampler:
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    study = made(RepeatableSampler(make, list(SPACE), seed=1))
    assert seeds == [1]  # it is made at once, so that wrong arguments are refused at once
    study.optimize(objective, 2)
    assert len(set(seeds)) == 1 + 2 * (1 + len(SPACE))
    assert len(seeds) == len(set(seeds)) + 2  # when a trial has ended, with the seed that it began with


class Remembers(optuna.samplers.RandomSampler):
    """A sampler of one's own that takes no seed."""

    made: ClassVar[list[Remembers]] = []

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.made.append(self)


def test_a_sampler_without_a_seed_lives_as_long_as_the_process() -> None:
    study = made(make_named_sampler(f"{__name__}.Remembers", {}, list(SPACE), seed=1))
    study.optimize(objective, 3)
    assert len(Remembers.made) == 1


def test_showing_a_sampler_the_study_does_not_read_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    study = made(make_named_sampler("tpe", {"n_startup_trials": 1}, list(SPACE), seed=1))
    study.optimize(objective, 4)
    storage, n_read = storage_of(study), 0
    read = storage.get_all_trials

    def counted(*args: Any, **options: Any) -> list[FrozenTrial]:
        nonlocal n_read
        n_read += 1
        return read(*args, **options)

    monkeypatch.setattr(storage, "get_all_trials", counted)
    trial = study.ask()
    assert n_read <= 1  # for waiting trials
    n_read = 0
    suggest(trial)
    assert n_read == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("optuna.samplers.NoSampler", {}, r"must be cmaes, .* import path .*, got 'optuna.samplers.NoSampler': module"),
        ("no_such.Sampler", {}, r"got 'no_such.Sampler': No module named 'no_such'; is its folder on PYTHONPATH\?"),
        ("optuna.pruners.NopPruner", {}, r"must be a class derived from optuna's BaseSampler, got 'optuna.pruners"),
        ("tpe", {"populaton": 3}, r"study.sampler: tpe must be made with .*, got {'populaton': 3}: .*; correct the op"),
        (
            "optuna.samplers.TPESampler",
            {"seed": 5},
            r"study.sampler.seed must be absent for .*, got 5: .*; use study.seed",
        ),
        ("nsga2", {"population_size": 1}, r"got {'population_size': 1}: .* greater than or equal to 2"),
    ],
)
def test_samplers_that_cannot_be(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        make_named_sampler(name, options, list(SPACE), seed=1)


def test_the_study_file_knows_the_same_names() -> None:
    assert set(SAMPLERS) == {"cmaes", "random", *NAMED}
