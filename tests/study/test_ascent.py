"""A study that begins with the ascent, with real gradients of a tiny model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from optuna_merge.cli.options import open_started
from optuna_merge.errors import StudyError, StudyMismatchError
from optuna_merge.internals.optuna import known_state
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.search.profile import Profile
from optuna_merge.search.space import AFTER_ASCENT_SIGMA
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import AscentStep, ascent_trial, end_of_ascent, steps_of
from optuna_merge.study.export import export_trial
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import Outcome, run_study
from optuna_merge.study.watcher import Watcher
from tests.merging.test_mergekit import run_mergekit
from tests.processes import forked

N_TRIALS, N_STEPS = 12, 6
STUDY = {"name": "tiny", "n_trials": N_TRIALS, "seed": 3, "n_chunks": 2}


@pytest.fixture
def objective(study_file: Callable[..., Path]) -> MergeObjective:
    return MergeObjective.from_file(study_file(n_documents=16, study=STUDY, search={"start": "ascent"}))


def record(study: optuna.Study) -> list[Any]:
    """All of a study's trials that must not depend on how often it was interrupted."""
    timed = (attributes.ASCENT_SECONDS, attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS)
    trials: list[Any] = [
        (t.state, t.values, t.params, t.intermediate_values, {k: v for k, v in t.user_attrs.items() if k not in timed})
        for t in study.trials
    ]
    return trials + [(step.expected, step.n_documents, step.params) for step in steps_of(study.trials[0])]


def test_a_study_begins_with_the_ascent_and_goes_on_from_its_end(objective: MergeObjective, tmp_path: Path) -> None:
    assert run_study(objective.config, objective) == Outcome(N_TRIALS)
    study = open_started(objective.config)
    first, *others = study.trials
    baselines = [trial.user_attrs.get(attributes.BASELINE) for trial in others]
    assert baselines == ["uniform", "uniform x1.5", "uniform x2", "model_0", "model_1", "base"] + [None] * 5
    assert first.state == TrialState.COMPLETE
    steps, end = steps_of(first), end_of_ascent(study.trials)
    assert len(steps) == N_STEPS
    assert end is not None
    assert end.params == first.params
    assert steps[-1].params == pytest.approx(first.params, abs=1e-4)
    # three passes, and on the first documents two more starts
    half = objective.scorer.n_documents // 2
    assert first.user_attrs[attributes.ASCENT_DOCUMENTS] == (N_STEPS + 2) * half
    assert first.user_attrs[attributes.ASCENT_SECONDS] == pytest.approx(sum(step.seconds for step in steps), abs=1e-3)
    # the expected score has risen on all documents
    profile = Profile.from_json(end.profile)
    best_uniform = max(expected(objective, objective.space.uniform(total)) for total in (1, 1.5, 2))
    assert expected(objective, first.params, profile) > best_uniform
    # CMA-ES begins near the end, with the profile
    for trial in others[6:]:
        assert trial.user_attrs[attributes.PROFILE] == first.user_attrs[attributes.PROFILE] == profile.digest
        away = np.array([trial.params[name] - end.params[name] for name in end.params])
        assert 0 < np.abs(away).max() < 5 * AFTER_ASCENT_SIGMA
        objective.recipe(trial, study)
    assert all(attributes.PROFILE not in trial.user_attrs for trial in others[:6])
    # another process exports a trial, scores it on the holdout, and mergekit makes the same tensors
    again = MergeObjective.from_file(objective.config.path)
    with pytest.raises(StudyError, match=r"trial 0: must be read with the profile of its study \(.*\), got none"):
        again.recipe(first)
    folder = export_trial(study, again.config, tmp_path / "model", 0).folder
    ours = dict(again.loader.merger.merge(again.recipe(first, study)))  # type: ignore[attr-defined]
    theirs = run_mergekit((folder / "mergekit_config.yml").read_text(), tmp_path / "theirs")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-7)
    assert {row.trial for row in score_holdout(study, again)} >= {0, 1, 2, 3, 4, 5, 6}
    # which start it was decides what the scores mean
    with pytest.raises(StudyMismatchError, match='created with search.start="ascent", now it is null'):
        other = MergeObjective.from_file(objective.config.path, {"search.start": "uniform"})
        run_study(other.config, other)


def expected(objective: MergeObjective, params: Any, profile: Profile | None = None) -> float:
    objective.load(objective.space.decode(params, profile))
    chunks = range(objective.scorer.n_chunks)
    return sum(objective.scorer.differentiate_chunk(i, lambda *_: None, generate=False).value for i in chunks)
