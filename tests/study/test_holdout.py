from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from optuna_merge.cli.options import open_started
from optuna_merge.errors import StudyError
from optuna_merge.report.summary import summarize
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import best_merges
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.holdout_file import HOLDOUT_FILE, HoldoutRow, TaskFigure, read_holdout, write_holdout
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from tests.study.test_objective import fake_objective


@pytest.fixture
def objective(study_file: Callable[..., Path]) -> MergeObjective:
    options = {"name": "tiny", "n_trials": 16, "seed": 3, "n_chunks": 5, "pruner": "none"}
    objective = fake_objective(study_file(gold="0", study=options))
    run_study(objective.config, objective)
    return objective


def test_the_best_merges_and_the_baselines_are_scored_once(objective: MergeObjective) -> None:
    study = open_started(objective.config)
    notes: list[str] = []
    rows = score_holdout(study, objective, notes.append, 3)
    merges = [trial.number for trial in best_merges(study, 3)]
    baselines = [t.number for t in study.trials if attributes.BASELINE in t.user_attrs and t.number != merges[0]]
    assert [row.trial for row in rows] == [*merges, *baselines]
    assert len(notes) == len(rows)
    assert score_holdout(study, objective, notes.append, 3) == rows
    assert len(notes) == len(rows)
    assert len(score_holdout(study, objective, notes.append, 4)) == len(rows) + 1
    assert len(notes) == len(rows) + 1  # only the fourth merge is new


def test_what_is_written_is_what_the_report_shows(objective: MergeObjective) -> None:
    study = open_started(objective.config)
    rows = {row.trial: row for row in score_holdout(study, objective)}
    assert (
        json.loads((objective.config.storage_path / HOLDOUT_FILE).read_text())["best_trial"]
        == best_merges(study, 1)[0].number
    )
    shown = {row.trial: row.holdout for row in summarize(study, objective.config, 5).rows}
    assert {number: row for number, row in shown.items() if row is not None} == rows
    assert all(row is not None for row in shown.values())


def test_the_file_gives_back_what_it_was_given(objective: MergeObjective) -> None:
    study, folder = open_started(objective.config), objective.config.storage_path
    best = best_merges(study, 1)[0]
    figures = {"one": TaskFigure("acc,none", 0.5, None, 10), "two": TaskFigure("acc,none", 1.0, 0.1, 10)}
    rows = [HoldoutRow(best.number, 0.75, figures, 0.0, math.inf, 1.0), HoldoutRow(0, 0.25, {}, 0.5, 0.1, 0.0)]
    write_holdout(folder, study, best, rows)
    assert read_holdout(folder, study, best) == {best.number: rows[0], 0: rows[1]}
    assert read_holdout(folder, study, study.trials[0]) == {}  # made for another best merge
    data = json.loads((folder / HOLDOUT_FILE).read_text())
    assert list(data) == ["study", "best_trial", "recipe", "rows", "test"]
    del data["rows"][1]["p_value"]
    (folder / HOLDOUT_FILE).write_text(json.dumps(data))
    with pytest.raises(StudyError, match=r"holdout.json: must hold .*, got rows.1.p_value: Field required; delete it"):
        read_holdout(folder, study, best)


def test_differences_are_from_the_merge_that_the_searched_documents_chose(objective: MergeObjective) -> None:
    study = open_started(objective.config)
    best, *others = score_holdout(study, objective)
    assert (best.trial, best.difference, best.p_value) == (best_merges(study, 1)[0].number, 0, 1)
    for row in others:
        assert row.difference == pytest.approx(best.value - row.value)
        assert 0 < row.p_value <= 1
    objective.load(objective.recipe(best_merges(study, 1)[0]))
    assert objective.scorer.score_holdout().value == best.value
