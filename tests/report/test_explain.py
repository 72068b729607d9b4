from __future__ import annotations

import random
import time

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from optuna_merge.errors import StudyError
from optuna_merge.report.explain import explain, pictures_of
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import AscentStep, record_step
from optuna_merge.storage.attributes import PAIRED_ESTIMATE


def make(n_trials: int, n_groups: int, n_models: int = 2) -> optuna.Study:
    """The first group's weight of ``b`` decides the score; every third trial is pruned."""
    rng = random.Random(0)
    labels = ["b", "a", "c", "d"][:n_models]
    study = optuna.create_study(study_name="tiny", direction="maximize")
    study.set_user_attr(attributes.FINGERPRINT, {"genome.models": labels})
    space = {
        f"layers_{group:02d}_{group:02d}.{label}.weight": FloatDistribution(0, 1)
        for group in range(n_groups)
        for label in labels
    }
    trials = []
    for index in range(n_trials):
        params = {name: rng.random() for name in space}
        value = -abs(params["layers_00_00.b.weight"] - 0.7)
        pruned = index % 3 == 0
        trials.append(
            create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                value=None if pruned else value,
                params=params,
                distributions=space,
                user_attrs={PAIRED_ESTIMATE: value} if pruned else {},
            )
        )
    study.add_trials(trials)
    return study


def test_the_parameter_that_decides_is_found() -> None:
    found = explain(make(120, 3))
    assert found.n_trials == 120
    assert next(iter(found.parameters)) == "layers_00_00.b.weight"
    assert found.parameters["layers_00_00.b.weight"] > 0.5
    assert list(found.groups) == ["layers_00_00", "layers_01_01", "layers_02_02"]
    assert max(found.groups, key=lambda name: found.groups[name]) == "layers_00_00"
    assert next(iter(found.models)) == "b"
    for shares in (found.parameters, found.groups, found.models):
        assert sum(shares.values()) == pytest.approx(1)


def test_the_picture_has_its_cells_where_the_parameters_are() -> None:
    found = explain(make(60, 2))
    heat = pictures_of(found)[0]
    assert heat.columns[0] == "b"
    assert heat.rows == ["layers_00_00", "layers_01_01"]
    assert heat.values[0][0] == found.parameters["layers_00_00.b.weight"]
    assert heat.values[1][1] == found.parameters["layers_01_01.a.weight"]


def test_too_few_trials() -> None:
    with pytest.raises(StudyError, match=r"study 'tiny' must have 10 merges with a score to be explained, got 9"):
        explain(make(9, 2))


def test_a_large_study() -> None:
    study = make(500, 25, 4)
    start = time.perf_counter()
    found = explain(study)
    print(f"500 trials x 100 dimensions: {time.perf_counter() - start:.2f} s")
    assert len(found.parameters) == 100
    assert next(iter(found.parameters)) == "layers_00_00.b.weight"


def test_the_slopes_are_those_of_the_first_step_and_of_the_last_pass() -> None:
    study = make(12, 1)
    assert explain(study).slopes == {}
    trial = study.ask()
    trial.set_user_attr(attributes.ASCENT, True)
    names = ["layers_00_00.a.weight", "layers_00_00.b.weight"]
    steps: list[AscentStep] = []
    for number in range(6):
        slope = dict(zip(names, (0.1 - number, -0.5 + number), strict=True))
        steps.append(AscentStep(0.5, 10, 1.0, {}, slope))
        record_step(trial, steps, {}, None)
    found = explain(study).slopes
    assert list(found) == names[::-1]  # the steepest first
    assert found[names[0]] == pytest.approx((0.1, 0.1 - 4.5))  # a third of the steps is a pass
    assert found[names[1]] == pytest.approx((-0.5, 4.0))
