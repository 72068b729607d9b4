"""A study that begins with the ascent, with real gradients of a tiny model."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from optuna_merge.cli.options import open_started
from optuna_merge.config.read import load_study
from optuna_merge.errors import StudyError, StudyMismatchError
from optuna_merge.report.pictures import HeatMap
from optuna_merge.report.study_pictures import pictures_of_study
from optuna_merge.report.summary import summarize
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
from tests.processes import forked, until
from tests.study.killing import Killed

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
    assert all(step.slope.keys() == first.params.keys() for step in steps)
    # three passes, and on the first documents three starts
    half = objective.scorer.n_documents // 2
    assert first.user_attrs[attributes.ASCENT_DOCUMENTS] == (N_STEPS + 3) * half
    assert first.user_attrs[attributes.ASCENT_SECONDS] == pytest.approx(sum(step.seconds for step in steps), abs=1e-3)
    # the expected score has risen on all documents
    profile = Profile.from_json(end.profile)
    best_uniform = max(expected(objective, objective.space.uniform(total)) for total in (1, 1.5, 2))
    assert expected(objective, first.params, profile) > best_uniform
    # the report shows the profile: a map for each model
    pictures = pictures_of_study(study, summarize(study, objective.config), objective.config)
    maps = [picture for picture in pictures if isinstance(picture, HeatMap) and picture.key.startswith("profile")]
    assert [heat.key for heat in maps] == ["profile-1", "profile-2"]
    for model, heat in enumerate(maps):
        assert heat.columns == ["embedding", "0", "1", "head"]
        for place, numbers in profile.deviations.items():
            if place.name == "model.layers.1.mlp.up_proj.weight":
                row = heat.values[list(heat.rows).index("mlp.up_proj")]
                assert row[2] == numbers["weight"][model]
                assert row[0] is row[3] is None
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
    other = MergeObjective.from_file(objective.config.path, {"search.start": "uniform"})
    with pytest.raises(StudyMismatchError, match=r'created with search\.start="ascent", now it is null'):
        run_study(other.config, other)


def expected(objective: MergeObjective, params: Any, profile: Profile | None = None) -> float:
    objective.load(objective.space.decode(params, profile))
    chunks = range(objective.scorer.n_chunks)
    return sum(objective.scorer.differentiate_chunk(i, lambda *_: None, generate=False).value for i in chunks)


def test_a_study_that_is_killed_again_and_again_is_the_same(
    objective: MergeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {name: getattr(objective.scorer, name) for name in ("differentiate_chunk", "expected_score")}

    def run(watcher: Watcher | None = None, n_passes: int = -1) -> Outcome:
        left = itertools.count(n_passes, -1)

        def counted(name: str, *args: Any, **options: Any) -> Any:
            found = passes[name](*args, **options)
            if next(left) == 0:
                os._exit(9)  # after the pass, before its step is recorded
            return found

        for name in passes:
            monkeypatch.setattr(objective.scorer, name, functools.partial(counted, name))
        return run_study(objective.config, objective, watcher)

    kills: list[Callable[[], Any]] = [
        lambda: run(n_passes=1),  # while it compares starts
        lambda: run(Killed("step", 1)),
        lambda: run(n_passes=1),
        lambda: run(Killed("step", 2)),
        lambda: run(Killed("step", 2)),  # the last step
        lambda: run(Killed("chunk", 1)),  # while its end is scored
        lambda: run(Killed("trial", 1)),
        lambda: run(Killed("chunk", 14)),  # in the first trial that CMA-ES draws
        lambda: run(Killed("trial", 2)),
    ]
    for kill in kills:
        with forked(kill) as [process]:
            process.join(120)
            assert process.exitcode == 9
    assert run() == Outcome(N_TRIALS)
    interrupted = record(open_started(objective.config))
    other = objective.config.model_copy(update={"storage_path": objective.config.storage_path / "other"})
    again = MergeObjective(other, objective.models, objective.loader, objective.scorer)
    assert run_study(other, again) == Outcome(N_TRIALS)
    assert record(open_started(other)) == interrupted


def test_of_three_workers_one_ascends_and_the_others_score_baselines_meanwhile(
    objective: MergeObjective, tmp_path: Path
) -> None:
    class Noted(Watcher):
        def ascent_stepped(self, step: AscentStep, n_done: int, n_steps: int) -> None:
            self._note(f"step {n_done}")
            if n_done == 1:  # the other workers may come late on a busy machine
                until(lambda: "start 1 " in (tmp_path / "events").read_text())

        def trial_started(self, trial: optuna.Trial) -> None:
            self._note(f"start {trial.number}")

        def _note(self, what: str) -> None:
            with (tmp_path / "events").open("a") as file:
                file.write(f"{what} by {os.getpid()}\n")

    def work() -> None:
        run_study(objective.config, objective, Noted())

    with forked(work, work, work) as workers:
        for worker in workers:
            worker.join(240)
            assert worker.exitcode == 0
    events = [line.split(" by ") for line in (tmp_path / "events").read_text().splitlines()]
    what = [event for event, _ in events]
    assert [event for event in what if "step" in event] == [f"step {number}" for number in range(1, N_STEPS + 1)]
    assert len({pid for event, pid in events if "step" in event}) == 1
    before = what[: what.index(f"step {N_STEPS}")]
    assert {event for event in before if "start" in event} >= {"start 0", "start 1"}
    assert max(int(event.split()[1]) for event in before if "start" in event) <= 6  # none is drawn before the end
    trials = open_started(objective.config).trials
    assert len(trials) == N_TRIALS
    assert {trial.user_attrs[attributes.PROFILE] for trial in (trials[0], *trials[7:])} == {
        trials[0].user_attrs[attributes.PROFILE]
    }


def test_an_ascent_that_meets_a_gradient_with_nan_fails_and_the_search_begins_as_without(
    objective: MergeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    differentiate = objective.scorer.differentiate_chunk

    def spoilt(chunk: int, sink: Any, **options: Any) -> Any:
        return differentiate(chunk, lambda name, gradient: sink(name, gradient * float("nan")), **options)

    monkeypatch.setattr(objective.scorer, "differentiate_chunk", spoilt)
    assert run_study(objective.config, objective) == Outcome(N_TRIALS)
    first, *others = open_started(objective.config).trials
    assert first.state == TrialState.FAIL
    assert first.user_attrs[attributes.FAILURE].startswith("ascent: expected score and gradient must be finite, got 0.")
    best = max(others[:3], key=lambda trial: trial.value)
    assert open_started(objective.config).user_attrs[attributes.START] == best.params
    assert all(attributes.PROFILE not in trial.user_attrs for trial in others)


def plain_study(objective: MergeObjective) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=objective.sampler(), pruner=objective.pruner())


def test_a_plain_optuna_study_ascends_if_it_is_told_to(study_file: Callable[..., Path]) -> None:
    settings = {"start": "uniform", "profile": "group"}
    objective = MergeObjective.from_file(study_file(n_documents=16, study=STUDY, search=settings))
    study = plain_study(objective)
    for _ in range(2):
        objective.ascend(study)
        objective.enqueue_baselines(study)
    assert len(study.trials) == 7
    study.optimize(objective, n_trials=9)
    end = end_of_ascent(study.trials)
    assert end is not None
    assert end.profile == ""
    assert ascent_trial(study.trials) == study.trials[0]
    assert study.trials[0].params == end.params
    for trial in study.trials[7:]:
        away = [abs(trial.params[name] - value) for name, value in end.params.items()]
        assert 0 < max(away) < 5 * AFTER_ASCENT_SIGMA
        assert objective.recipe(trial) == objective.space.decode(trial.params)


def test_a_plain_study_without_an_ascent_is_searched_like_any_other(study_file: Callable[..., Path]) -> None:
    """Such as one from before there were ascents, whose file is now read as wanting one: it draws the same merges."""
    found = []
    for start in ("ascent", "uniform"):
        objective = MergeObjective.from_file(
            study_file(n_documents=16, study=STUDY, search={"start": start}, storage_path=start)
        )
        study = plain_study(objective)
        objective.enqueue_baselines(study)
        study.optimize(objective, n_trials=11)  # the last one is drawn by the Gaussian process
        objective.ascend(study)  # comes too late
        found.append([(trial.params, trial.value) for trial in study.trials])
    assert len(found[0]) == 11
    assert found[0] == found[1]


def test_an_ascent_that_optuna_retries_goes_on_after_its_last_step(objective: MergeObjective) -> None:
    study = plain_study(objective)
    objective.ascend(study)
    trial = study.ask()

    def stop(_: AscentStep, n_done: int, __: int) -> None:
        if n_done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        objective.evaluate(trial, on_step=stop)
    study.tell(trial, state=TrialState.FAIL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.RetryHeartbeatStaleTrialCallback()(study, study.trials[0])
    done = []
    study.optimize(
        lambda again: objective.evaluate(again, on_step=lambda _, n_done, __: done.append(n_done)),  # type: ignore[arg-type, return-value]
        n_trials=1,
    )
    assert done == [5, 6]
    end = end_of_ascent(study.trials)
    assert end is not None
    assert study.trials[1].params == end.params


def test_a_study_that_cannot_ascend_says_why(study_file: Callable[..., Path]) -> None:
    for changes, message in (
        (
            {"search": {"weight": 0.5}},
            r"study.yaml: an ascent must not be used with task_arithmetic; no parameter that",
        ),
        ({"genome": {"merge_method": ["task_arithmetic", "ties"]}}, r"merge_method must be one method .* got task_a"),
    ):
        genome = {**load_study(study_file()).genome.model_dump(exclude_none=True), **changes.pop("genome", {})}
        config = load_study(study_file(n_documents=16, genome=genome, **changes))
        with pytest.raises(StudyError, match=message):
            MergeObjective.from_config(config).ascend(optuna.create_study(direction="maximize"))
