from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.report.summary import summarize, verdict
from optuna_merge.report.tables import markdown_table
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import best_merge, best_merges
from optuna_merge.study.holdout_file import HOLDOUT_FILE, HoldoutRow, TaskFigure, needs_holdout


@pytest.fixture
def config(study_file: Callable[..., Path]) -> StudyConfig:
    return load_study(study_file())


@pytest.fixture
def study() -> optuna.Study:
    """Trials 0 to 3: uniform, uniform x2, a source, the base; then drawn merges, the best of them trial 6."""
    study = optuna.create_study(study_name="tiny", direction="maximize")
    baselines = [("uniform", "uniform", 0.5), ("uniform x2", "uniform", 0.6), ("model_0", "source", 0.9)]
    for name, kind, value in [*baselines, ("base", "base", 0.2)]:
        study.add_trial(
            create_trial(value=value, user_attrs={attributes.BASELINE: name, attributes.BASELINE_KIND: kind})
        )
    for value in (0.55, 0.7, 0.8, 0.7, 0.3):
        study.add_trial(create_trial(value=value))
    study.add_trial(create_trial(state=optuna.trial.TrialState.PRUNED, intermediate_values={0: 0.99}))
    return study


def held(trial: int, value: float, difference: float = 0.0, stderr: float = 0.0, p_value: float = 1.0) -> HoldoutRow:
    return HoldoutRow(trial, value, {"one": TaskFigure("acc,none", value, 0.1, 10)}, difference, stderr, p_value)


def write(
    config: StudyConfig,
    rows: list[HoldoutRow],
    best: int = 6,
    study: str = "tiny",
    recipe: str | None = None,
    test: str = "permutation",
) -> None:
    config.storage_path.mkdir(exist_ok=True)
    data = {"study": study, "best_trial": best, "recipe": recipe, "rows": [asdict(row) for row in rows], "test": test}
    (config.storage_path / HOLDOUT_FILE).write_text(json.dumps(data))


def test_the_best_merges_are_those_of_the_searched_documents(study: optuna.Study) -> None:
    assert best_merge(study).number == 6
    assert [trial.number for trial in best_merges(study, 4)] == [6, 5, 7, 4]  # of equal ones, the earlier first
    assert [trial.number for trial in best_merges(study, 99)] == [6, 5, 7, 4, 8]
    assert best_merge(optuna.create_study(direction="maximize")) is None


def test_a_uniform_merge_can_be_the_best_but_no_runner_up() -> None:
    study = optuna.create_study(direction="maximize")
    for name, value in (("uniform", 0.5), ("uniform x2", 0.6), (None, 0.4)):
        labels = {} if name is None else {attributes.BASELINE: name, attributes.BASELINE_KIND: "uniform"}
        study.add_trial(create_trial(value=value, user_attrs=labels))
    assert [trial.number for trial in best_merges(study, 5)] == [1, 2]


def test_rows_end_with_the_best(study: optuna.Study, config: StudyConfig) -> None:
    rows = summarize(study, config, 3).rows
    assert [(row.name, row.kind, row.trial) for row in rows] == [
        ("model_0", "source", 2),
        ("base", "base", 3),
        ("uniform", "uniform", 0),
        ("uniform x2", "uniform", 1),
        ("best merge, rank 3", "runner-up", 7),
        ("best merge, rank 2", "runner-up", 5),
        ("best merge", "best", 6),
    ]
    assert [row.kind for row in summarize(study, config).rows].count("runner-up") == 0


def test_the_holdout_is_needed_until_each_best_merge_is_scored(study: optuna.Study, config: StudyConfig) -> None:
    assert needs_holdout(study, config.storage_path, 1)
    write(config, [held(6, 0.7), held(5, 0.6)])
    assert not needs_holdout(study, config.storage_path, 2)
    assert needs_holdout(study, config.storage_path, 3)
    write(config, [held(6, 0.7)], best=5)
    assert needs_holdout(study, config.storage_path, 1)
    write(config, [held(6, 0.7)], study="another")
    assert needs_holdout(study, config.storage_path, 1)


def test_the_verdict(study: optuna.Study, config: StudyConfig) -> None:
    assert verdict(summarize(study, config)) == ""
    others = [held(0, 0.65, 0.05, 0.02, 0.0124), held(1, 0.72, -0.02, 0.04, 0.6171), held(2, 0.4, 0.3, 0.03, 1e-9)]
    write(config, [held(6, 0.7), *others])
    summary = summarize(study, config)
    # "uniform x2" is the better uniform merge on the searched documents
    assert verdict(summary) == (
        "On the holdout the best merge, chosen on the searched documents, is 0.3000 ± 0.0300 better than the best"
        " source (model_0; p < 0.0001) and 0.0200 ± 0.0400 worse than the best uniform merge (uniform x2; p = 0.6171):"
        " two-sided permutation tests, paired by document."
    )
    assert markdown_table(summary).endswith(verdict(summary))
    assert "| model_0 | 0.9000 | 0.4000 | +0.3000 ± 0.0300 |" in markdown_table(summary)


def test_a_best_uniform_merge_is_not_compared_with_itself(config: StudyConfig) -> None:
    study = optuna.create_study(study_name="tiny", direction="maximize")
    study.add_trial(
        create_trial(value=0.5, user_attrs={attributes.BASELINE: "uniform", attributes.BASELINE_KIND: "uniform"})
    )
    write(config, [held(0, 0.7)], best=0)
    assert verdict(summarize(study, config)) == ""


@pytest.mark.parametrize("text", ["", "{}", '{"study": "tiny", "best_trial": 6, "recipe": null, "rows": [{}]}'])
def test_figures_that_cannot_be_read_back(study: optuna.Study, config: StudyConfig, text: str) -> None:
    write(config, [])
    (config.storage_path / HOLDOUT_FILE).write_text(text)
    with pytest.raises(StudyError, match=r"holdout.json: must hold the holdout's figures, got .*; delete it: report"):
        summarize(study, config)


def test_figures_of_another_recipe_are_not_this_study_s(study: optuna.Study, config: StudyConfig) -> None:
    write(config, [held(6, 0.7)], recipe="of a study of that name, somewhere else")
    assert needs_holdout(study, config.storage_path, 1)
    write(config, [held(6, 0.7)])
    assert not needs_holdout(study, config.storage_path, 1)


def test_p_values_of_a_z_test_are_made_again(study: optuna.Study, config: StudyConfig) -> None:
    write(config, [held(6, 0.7)], test="z")
    assert needs_holdout(study, config.storage_path, 1)


def front_study() -> optuna.Study:
    """Trial 0 is beaten by 2; 1 and 3 are the ends of the front, 1 a source; 2 has the largest sum."""
    study = optuna.create_study(study_name="tiny", directions=["maximize", "maximize"])
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["math", "poetry"])
    for values, name, kind in (
        ((0.4, 0.4), "uniform", "uniform"),
        ((0.9, 0.1), "model_0", "source"),
        ((0.6, 0.6), None, None),
        ((0.1, 0.8), None, None),
        ((0.5, 0.6), None, None),
    ):
        labels = {} if name is None else {attributes.BASELINE: name, attributes.BASELINE_KIND: kind}
        study.add_trial(create_trial(values=values, user_attrs=labels))
    return study


def test_the_front(config: StudyConfig) -> None:
    summary = summarize(front_study(), config, 3)
    assert [(point.name, point.trial) for point in summary.front] == [("model_0", 1), ("merge", 2), ("merge", 3)]
    assert summary.front[1].values == {"math": 0.6, "poetry": 0.6}
    assert summary.front[1].value == 1.2
    assert summary.best_trial == 2
    # what is on the front goes before what has a larger sum and is not
    assert [trial.number for trial in best_merges(front_study(), 3)] == [2, 3, 4]
    table = markdown_table(summary)
    assert "| front | trial | math | poetry | sum |" in table
    assert "| model_0 | 1 | 0.9000 | 0.1000 | 1.0000 |" in table


def test_progress_counts_what_is_finished(study: optuna.Study, config: StudyConfig) -> None:
    study.ask()
    summary = summarize(study, config)
    assert summary.n_finished == 10
    assert summary.progress == f"10 of {max(10, config.study.n_trials)} trials"
    assert summary.state_counts == "9 complete, 1 pruned, 1 running"


def test_one_objective_has_no_front(study: optuna.Study, config: StudyConfig) -> None:
    assert summarize(study, config).front == []
    assert "| front |" not in markdown_table(summarize(study, config))
