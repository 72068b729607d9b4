from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from optuna_merge.config.read import load_study
from optuna_merge.evaluation.engines.speed import Speed
from optuna_merge.study import seconds
from optuna_merge.study.check import check_study
from optuna_merge.study.engines import build_scorer, make_describing_engine
from optuna_merge.study.models import StudyModels


def test_a_trial_takes_its_tokens_times_the_devices_speed(
    study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seconds, "measure_speed", lambda *_, **__: Speed(token=0.5, place=0.25))
    config = load_study(study_file())
    found = check_study(config).trial_seconds
    tasks = build_scorer(config, make_describing_engine(config, StudyModels.open(config))).describe()
    assert found is not None
    assert found["choices"] == 0.5 * tasks.choice_cost + 0.25 * tasks.n_places
    assert tasks.choice_cost > tasks.n_tokens > tasks.n_places > 0
    assert found["texts"] == tasks.text_cost == 0
    assert found["merging"] > 0


def test_a_device_that_is_not_here_is_not_timed(study_file: Callable[..., Path]) -> None:
    assert check_study(load_study(study_file()), card=24 * 2**30).trial_seconds is None
