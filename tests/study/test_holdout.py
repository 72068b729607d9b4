from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from optuna_merge.cli.options import open_started
from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import storage_of
from optuna_merge.report.summary import summarize
from optuna_merge.storage import attributes
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import local_file, storage_url
from optuna_merge.storage.trials import best_merges
from optuna_merge.study import holdout
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.holdout_file import HOLDOUT_FILE, HoldoutRow, TaskFigure, read_holdout, write_holdout
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from tests import processes
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
    assert objective.scorer.holdout.score().value == best.value


class Worker:
    """Scores the holdout as a process that has ended its run does, and writes down what it says.

    Args:
        objective: Its objective.
        file: Where its notes go.
        stops_at: It sleeps when it scores the model of this number, until it is told to go on.
    """

    def __init__(self, objective: MergeObjective, file: Path, stops_at: int | None = None) -> None:
        self.objective, self.file, self.stops_at = objective, file, stops_at
        self.go_on = file.with_suffix(".go")

    def __call__(self) -> None:
        rows = score_holdout(open_started(self.objective.config), self.objective, self.note)
        self.file.with_suffix(".rows").write_text(repr(rows))

    def note(self, text: str) -> None:
        with self.file.open("a") as file:
            file.write(text + "\n")
        while len(self.scored()) == self.stops_at and not self.go_on.exists():
            time.sleep(0.01)

    def notes(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    def scored(self) -> list[str]:
        return [note for note in self.notes() if note.startswith("scoring trial")]

    def rows(self) -> str:
        return self.file.with_suffix(".rows").read_text()


@pytest.mark.parametrize("is_killed", [False, True])
def test_one_of_several_processes_scores_and_the_others_read_its_figures(
    objective: MergeObjective, tmp_path: Path, is_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdout, "_SILENT_S", 0.2)
    first = Worker(objective, tmp_path / "first", stops_at=3)
    others = [Worker(objective, tmp_path / name) for name in ("second", "third")]
    with processes.forked(first) as [scoring]:
        processes.until(lambda: len(first.scored()) == 3)
        with processes.forked(*others) as waiting:
            processes.until(lambda: all(other.notes() for other in others))
            assert [other.notes() for other in others] == [
                ["another process scores the holdout; waiting for its figures"]
            ] * 2
            config = objective.config
            file = local_file(storage_url(config.storage_path, config.study.storage))
            with make_lock(storage_of(open_started(config)), "tiny", file)():
                pass  # nobody holds the study's lock: workers may go on asking
            if is_killed:
                processes.kill(scoring)
            else:
                first.go_on.touch()
            for process in [*waiting, *([] if is_killed else [scoring])]:
                process.join(120)
                assert process.exitcode == 0
    scored = first.scored() + others[0].scored() + others[1].scored()
    n_models = len(score_holdout(open_started(objective.config), objective))
    assert others[0].rows() == others[1].rows()
    if is_killed:  # the model that was being scored then is scored again, by one of the others
        assert len(scored) == n_models + 1
        assert [] in (others[0].scored(), others[1].scored())
    else:
        assert len(first.scored()) == len(scored) == n_models
        assert first.rows() == others[0].rows()
    assert len(set(scored)) == n_models
    assert not list(objective.config.storage_path.rglob("*.partial"))
