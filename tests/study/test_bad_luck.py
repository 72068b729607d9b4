"""What a study does when its surroundings change under it; docs/log.md says what a user sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial

from optuna_merge.cli.options import open_started
from optuna_merge.errors import CheckpointError
from optuna_merge.report.dashboard_watcher import DashboardWatcher
from optuna_merge.study.folder import BEST_CONFIG
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import Outcome, run_study
from optuna_merge.study.watcher import Watcher
from tests.study.test_objective import fake_objective

STUDY = {"name": "tiny", "n_trials": 12, "seed": 3, "n_chunks": 5}


def cut(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def replace(file: Path, other: Path) -> None:
    shutil.copyfile(other, file.with_name("new"))
    file.with_name("new").replace(file)


def remove(file: Path, other: Path) -> None:
    shutil.rmtree(file.parent)


class After(Watcher):
    """Calls something when a trial is finished."""

    def __init__(self, number: int, call: Callable[[], None]) -> None:
        self.number, self.call = number, call

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        if trial.number == self.number:
            self.call()


@pytest.fixture
def models(tmp_path: Path, tiny_models: Path) -> Path:
    return shutil.copytree(tiny_models, tmp_path / "models")


def objective_over(models: Path, study_file: Callable[..., Path], folder: str) -> MergeObjective:
    genome = {
        "models": [str(models / "model_0"), str(models / "model_1")],
        "base_model": str(models / "base"),
        "merge_method": "task_arithmetic",
        "layer_granularity": 1,
    }
    return fake_objective(study_file(gold="0", genome=genome, study=STUDY, storage_path=folder))


def values(objective: MergeObjective) -> list[tuple[int, float | None]]:
    return [(trial.number, trial.value) for trial in open_started(objective.config).trials]


@pytest.mark.parametrize("change", [overwrite, cut])
def test_weights_that_are_overwritten_under_a_study_stop_it(
    models: Path, study_file: Callable[..., Path], change: Callable[[Path, Path], None]
) -> None:
    through = objective_over(models, study_file, "through")
    run_study(through.config, through)
    stopped = objective_over(models, study_file, "stopped")
    file = models / "model_0" / "model.safetensors"
    kept = file.read_bytes()
    spoil = After(8, lambda: change(file, models / "base" / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model_0/model\.safetensors: weights must stay as they were .*overwrit"):
        run_study(stopped.config, stopped, spoil)
    file.write_bytes(kept)
    again = objective_over(models, study_file, "stopped")
    assert run_study(again.config, again) == Outcome(12)
    assert values(again) == values(through)


@pytest.mark.parametrize("change", [replace, remove])
def test_weights_that_are_replaced_by_another_file_stay_open(
    models: Path, study_file: Callable[..., Path], change: Callable[[Path, Path], None]
) -> None:
    through = objective_over(models, study_file, "through")
    run_study(through.config, through)
    other = objective_over(models, study_file, "other")
    file = models / "model_0" / "model.safetensors"
    spoil = After(8, lambda: change(file, models / "base" / "model.safetensors"))
    assert run_study(other.config, other, spoil) == Outcome(12)
    assert values(other) == values(through)


def test_weights_at_the_upper_end_of_their_range_are_written_to_every_merge_file(
    study_file: Callable[..., Path],
) -> None:
    objective = fake_objective(study_file(gold="0", search={"weight": [0.0, 0.1]}, study={**STUDY, "n_trials": 40}))
    dashboard = DashboardWatcher(objective.config, objective.merge_file, lambda line: None)
    assert run_study(objective.config, objective, dashboard) == Outcome(40)
    assert yaml.safe_load((objective.config.storage_path / BEST_CONFIG).read_text())["merge_method"]
    drawn = [trial for trial in open_started(objective.config).trials if trial.params and trial.number > 6]
    assert any(0.1 - 1e-9 < weight < 0.1 for trial in drawn for weight in trial.params.values())
