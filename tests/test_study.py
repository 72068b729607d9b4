from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from optuna_merge import store, study
from optuna_merge.cli.options import open_started
from optuna_merge.config import load_study
from optuna_merge.errors import StudyError, StudyLockedError, StudyMismatchError
from optuna_merge.objective import MergeObjective
from optuna_merge.report import best_merge
from optuna_merge.study import BEST_CONFIG, Watcher, run_study
from tests.test_objective import fake_objective

RUN = [sys.executable, "-m", "optuna_merge"]


def table(path: Path, name: str = "tiny") -> list[tuple]:
    """Everything of a study's trials that must not depend on interruptions."""
    trials = optuna.load_study(study_name=name, storage=f"sqlite:///{path}").trials
    return [
        (t.number, t.state, t.value, t.params, t.intermediate_values, t.user_attrs.get(store.BASELINE)) for t in trials
    ]


@pytest.fixture
def objective(study_file: Callable[..., Path]) -> MergeObjective:
    return fake_objective(study_file(gold="0", study={"name": "tiny", "n_trials": 25, "seed": 3, "n_chunks": 5}))


def test_a_study_runs_to_its_end_and_finds_the_optimum(objective: MergeObjective) -> None:
    outcome = run_study(objective.config, objective)
    found = open_started(objective.config)
    assert outcome == study.Outcome(25)
    assert len(found.trials) == 25
    best = best_merge(found)
    uniform = found.trials[0].value
    assert best.number > 5
    assert best.value > uniform + 0.02
    written = yaml.safe_load((objective.config.storage_path / BEST_CONFIG).read_text())
    assert written["merge_method"] == "task_arithmetic"
    assert written["base_model"].endswith("/base")


def test_n_trials_is_the_total_and_a_second_run_only_adds(objective: MergeObjective) -> None:
    few = objective.config.model_copy(update={"study": objective.config.study.model_copy(update={"n_trials": 8})})
    objective.config = few
    assert run_study(few, objective).n_finished == 8
    n_responses = objective._engine.n_responses
    assert run_study(few, objective).n_finished == 8
    assert objective._engine.n_responses == n_responses
    assert len(open_started(few).trials) == 8


def test_an_interrupted_study_continues_as_if_nothing_had_happened(study_file: Callable[..., Path]) -> None:
    options = {"n_trials": 20, "seed": 3, "n_chunks": 5}
    through = fake_objective(study_file(gold="0", study={"name": "tiny", **options}, storage_path="through"))
    run_study(through.config, through)
    stopped = fake_objective(study_file(gold="0", study={"name": "tiny", **options}, storage_path="stopped"))

    class Impatient(Watcher):
        def __init__(self, chunks: int) -> None:
            self.left = chunks

        def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

    for chunks in (3, 1, 7, 12, 5):
        outcome = run_study(stopped.config, stopped, Impatient(chunks))
        assert outcome.interrupted
    scored = stopped._engine.n_responses
    assert run_study(stopped.config, stopped) == study.Outcome(20)
    assert table(stopped.config.storage_path / "study.db") == table(through.config.storage_path / "study.db")
    assert (stopped.config.storage_path / BEST_CONFIG).read_text() == (
        through.config.storage_path / BEST_CONFIG
    ).read_text()
    # No chunk was scored twice: interruptions cost no answer.
    assert stopped._engine.n_responses == through._engine.n_responses > scored


def test_sigterm_is_a_clean_stop_too(objective: MergeObjective) -> None:
    class Scheduler(Watcher):
        def trial_started(self, trial: optuna.Trial) -> None:
            if trial.number == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    assert run_study(objective.config, objective, Scheduler()).interrupted
    states = [trial.state for trial in open_started(objective.config).trials]
    assert states[:4] == [TrialState.COMPLETE] * 3 + [TrialState.WAITING]


def test_the_timeout_ends_between_trials(objective: MergeObjective, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])

    class Slow(Watcher):
        def trial_started(self, trial: optuna.Trial) -> None:
            now[0] += 30.0

    options = objective.config.study.model_copy(update={"timeout": 50.0})
    config = objective.config.model_copy(update={"study": options})
    assert run_study(config, objective, Slow()) == study.Outcome(2, timed_out=True)
    assert run_study(config, objective, Slow()) == study.Outcome(4, timed_out=True)


def test_a_changed_study_file_is_refused_by_name(objective: MergeObjective, study_file: Callable[..., Path]) -> None:
    run_study(objective.config.model_copy(), objective)
    changed = fake_objective(
        study_file(gold="0", search={"weight": [0.0, 1.0]}, limit=30, study={"name": "tiny", "seed": 3, "n_chunks": 5})
    )
    with pytest.raises(StudyMismatchError) as caught:
        run_study(changed.config, changed)
    lines = str(caught.value).splitlines()
    assert "study 'tiny' was created with limit=null, now it is 30.0; use a new study name or restore null" in lines
    assert any("created with search space=" in line for line in lines)


def test_a_study_of_something_else_is_refused(objective: MergeObjective) -> None:
    url = store.storage_url(objective.config.storage_path, None)
    other = optuna.create_study(storage=store.open_storage(url), study_name="tiny", direction="maximize")
    other.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StudyMismatchError, match=r"study 'tiny' must be made by optuna-merge"):
        run_study(objective.config, objective)


def test_a_study_that_is_not_there_is_named(objective: MergeObjective) -> None:
    with pytest.raises(
        StudyError, match=r"study 'tiny' must have been started, sqlite:///.* holds none of that name; start it"
    ):
        open_started(objective.config)
    assert not objective.config.storage_path.exists()


def test_best_config_survives_a_disk_that_is_full(objective: MergeObjective, monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(objective.config, objective)
    file = objective.config.storage_path / BEST_CONFIG
    before = file.read_text()
    real = Path.write_text

    def full(self: Path, *args: object, **kwargs: object) -> int:
        if self.name.endswith(".partial"):
            real(self, "half", encoding="utf-8")
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StudyError, match=r"best_config.yaml: best merge must be writable, got .*No space left"):
        study.write_best_config(open_started(objective.config), objective)
    assert file.read_text() == before
    assert not list(objective.config.storage_path.glob("*.partial"))


def test_two_processes_cannot_run_one_study(study_file: Callable[..., Path]) -> None:
    config = load_study(study_file())
    url = store.storage_url(config.storage_path, None)
    with store.run_lock(url, "tiny"):
        run = subprocess.run([*RUN, "run-study", str(config.path)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: study 'tiny' must be run by one process at a time")
    assert f"process {os.getpid()} on" in last
    assert "Traceback" not in run.stderr
    with pytest.raises(StudyLockedError), store.run_lock(url, "tiny"), store.run_lock(url, "tiny"):
        pass


def test_killed_at_any_point_it_ends_as_if_it_had_run_through(study_file: Callable[..., Path], tmp_path: Path) -> None:
    """The real command line, the real engine, SIGKILL."""
    file = study_file(study={"name": "tiny", "n_trials": 40, "seed": 3, "n_chunks": 10}, n_documents=200)
    through = subprocess.run(
        [*RUN, "run-study", str(file), "--storage-path", str(tmp_path / "through")], capture_output=True, check=False
    )
    assert through.returncode == 0, through.stderr.decode()
    killed = tmp_path / "killed"
    for kill in range(3):
        process = subprocess.Popen(
            [*RUN, "run-study", str(file), "--storage-path", str(killed)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while _n_rows(killed / "study.db") < 40 * (kill + 1) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = subprocess.run(
        [*RUN, "run-study", str(file), "--storage-path", str(killed)], capture_output=True, check=False
    )
    assert last.returncode == 0, last.stderr.decode()
    assert table(killed / "study.db") == table(tmp_path / "through" / "study.db")


def _n_rows(database: Path) -> int:
    """Reported chunks, read without disturbing the writer."""
    if not database.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1) as connection:
            return connection.execute("SELECT count(*) FROM trial_intermediate_values").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
