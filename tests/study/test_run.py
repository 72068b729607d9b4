"""A study runs, is interrupted, is refused, and goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from optuna_merge.cli.options import open_started
from optuna_merge.config.read import load_study
from optuna_merge.errors import MergeError, StudyError, StudyMismatchError
from optuna_merge.report.summary import summarize
from optuna_merge.storage import attributes
from optuna_merge.storage.open import open_storage, storage_url
from optuna_merge.storage.trials import best_merge, score_of
from optuna_merge.study import run as study
from optuna_merge.study.folder import BEST_CONFIG, write_best_config
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.study.watcher import Watcher
from tests import processes
from tests.study.killing import table
from tests.study.test_objective import fake_objective


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
    n_responses = objective.loader.engine.n_responses
    assert run_study(few, objective).n_finished == 8
    assert objective.loader.engine.n_responses == n_responses
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
    scored = stopped.loader.engine.n_responses
    assert run_study(stopped.config, stopped) == study.Outcome(20)
    assert table(f"sqlite:///{stopped.config.storage_path}/study.db") == table(
        f"sqlite:///{through.config.storage_path}/study.db"
    )
    assert (stopped.config.storage_path / BEST_CONFIG).read_text() == (
        through.config.storage_path / BEST_CONFIG
    ).read_text()
    # No chunk was scored twice: interruptions cost no answer.
    assert stopped.loader.engine.n_responses == through.loader.engine.n_responses > scored


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_several_objectives_interrupted_and_gone_on_with(study_file: Callable[..., Path], sampler: str) -> None:
    options = {"name": "tiny", "n_trials": 22, "seed": 3, "n_chunks": 5, "goal": "pareto", "sampler": sampler}
    tasks = [{"name": "one"}, {"name": "two", "weight": -0.5}]

    class Impatient(Watcher):
        left = 33

        def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

    ends, answers = [], []
    for folder, watcher in (("through", Watcher()), ("stopped", Impatient())):
        one = fake_objective(study_file(gold="0", study=options, tasks=tasks, storage_path=folder))
        if run_study(one.config, one, watcher).interrupted:
            run_study(one.config, one)
        found = open_started(one.config)
        ends.append([(t.number, t.state, t.values, t.params, t.intermediate_values) for t in found.trials])
        answers.append(one.loader.engine.n_responses)
    assert ends[0] == ends[1]
    assert answers[0] == answers[1]  # no chunk was scored twice
    assert found.metric_names == ["one", "two"]
    best = best_merge(found)
    assert score_of(best) == max(
        sum(t.values) for t in found.trials if t.user_attrs.get(attributes.BASELINE_KIND) not in ("source", "base")
    )
    summary = summarize(found, one.config, 3)
    assert {point.trial for point in summary.front} == {trial.number for trial in found.best_trials}
    assert all(set(point.values) == {"one", "two"} for point in summary.front)
    assert f"trial {best.number}, score" in (one.config.storage_path / BEST_CONFIG).read_text()
    single = load_study(study_file(gold="0", study={**options, "goal": "sum"}, tasks=tasks, storage_path="stopped"))
    with pytest.raises(StudyMismatchError, match="tasks="):
        run_study(single, fake_objective(single.path))


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
    url = storage_url(objective.config.storage_path, None)
    other = optuna.create_study(storage=open_storage(url), study_name="tiny", direction="maximize")
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

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StudyError, match=r"best_config.yaml: best merge must be writable, got .*No space left"):
            write_best_config(open_started(objective.config), objective.config.storage_path, objective.merge_file)
    with (
        processes.files_up_to(100),
        pytest.raises(StudyError, match=r"best_config.yaml: best merge must be writable, got .*File too large"),
    ):
        write_best_config(open_started(objective.config), objective.config.storage_path, objective.merge_file)
    assert file.read_text() == before
    assert not list(objective.config.storage_path.glob("*.partial"))


def test_a_full_disk_stops_the_study_and_room_lets_it_go_on(
    objective: MergeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(Watcher):
        def trial_started(self, trial: optuna.Trial) -> None:
            if trial.number == 7:
                patch.setattr(os, "fsync", full)

    message = r"trial_00007.jsonl: scores must be writable, got .*No space left on device; make room and run"
    with monkeypatch.context() as patch, pytest.raises(StudyError, match=message):
        run_study(objective.config, objective, Full())
    n_responses = objective.loader.engine.n_responses
    assert run_study(objective.config, objective) == study.Outcome(25)
    responses_of_a_trial = n_responses // 8
    assert objective.loader.engine.n_responses <= 25 * responses_of_a_trial  # none was scored twice


def test_memory_that_is_out_while_merging_stops_the_study_and_more_lets_it_go_on(
    study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path
) -> None:
    """One tensor is larger than the memory that the kernel grants; the trial is put back with its parameters."""
    name = "model.layers.0.mlp.large_proj.weight"
    for model in ("base", "model_0", "model_1"):
        shutil.copytree(tiny_models / model, tmp_path / model)
        file = tmp_path / model / "model.safetensors"
        save_file({**load_file(file), name: torch.zeros(24 << 20)}, file)
    genome = {"models": ["model_0", "model_1"], "base_model": "base", "merge_method": "linear", "layer_granularity": 1}
    options = {"name": "tiny", "n_trials": 6, "seed": 3, "n_chunks": 5}
    path = study_file(gold="0", study=options, genome=genome)
    through, stopped = (fake_objective(path, storage_path=tmp_path / folder) for folder in ("through", "stopped"))
    run_study(through.config, through)
    limit = contextlib.ExitStack()

    class Scarce(Watcher):
        def trial_started(self, trial: optuna.Trial) -> None:
            if trial.number == 5:
                limit.enter_context(processes.memory_up_to(16 << 20))

    message = rf"^{name}: merging must fit into the memory of cpu, got .*; use .*, and run the same command again$"
    with limit, pytest.raises(MergeError, match=message):
        run_study(stopped.config, stopped, Scarce())
    urls = [storage_url(one.config.storage_path, None) for one in (through, stopped)]
    assert [row[1] for row in table(urls[1])] == [*[row[1] for row in table(urls[0])][:5], TrialState.WAITING]
    n_responses = stopped.loader.engine.n_responses
    assert run_study(stopped.config, stopped) == study.Outcome(6)
    assert table(urls[0]) == table(urls[1])
    assert stopped.loader.engine.n_responses == through.loader.engine.n_responses > n_responses
